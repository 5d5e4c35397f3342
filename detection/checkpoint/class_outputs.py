"""Outputs of a network's classes: those of a weights file, selected by category, or initialized for other ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from detection.checkpoint import weights as files
from detection.checkpoint.weights import Weights
from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import num_classes
from detection.data.coco import Category

Config = TypeVar("Config", bound=RunConfig)

NUM_COCO_IDS = 91
"""Classes of networks with one for each of COCO's ids up to 90, 10 of which are unused, and the background 0."""


def coco_categories() -> tuple[Category, ...]:
    """Return COCO's 80 categories, ordered by id."""
    names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return tuple(Category(i, name) for i, name in enumerate(names) if name not in ("__background__", "N/A"))


@dataclass(frozen=True)
class ClassLayer:
    """Layer with outputs of the classes.

    Its channels are `num_groups` groups, such as one per anchor of a cell. A group has `num_shared` blocks that belong
    to no class, then one block for each label from `first_label` on, which is 1 if the background has no output.
    """

    name: str
    num_groups: int = 1
    num_shared: int = 0
    first_label: int = 0

    def blocks(self, labels: Sequence[int | None]) -> list[int | None]:
        """Return the blocks of a group for labels (K,), background first. That of None is None."""
        offset = self.num_shared - self.first_label
        moved = [None if label is None else label + offset for label in labels[self.first_label :]]
        return [*range(self.num_shared), *moved]


class ClassMatch(NamedTuple):
    """Label in the file of each label (K,) of the data, background first, or None to initialize it; and a report."""

    labels: Sequence[int | None]
    report: str


def count_classes(state: Mapping[str, Tensor], layer: ClassLayer) -> int:
    """Return the number of classes, with the background, of a layer whose blocks are single channels."""
    return state[f"{layer.name}.bias"].numel() // layer.num_groups - layer.num_shared + layer.first_label


def select(
    state: Mapping[str, Tensor],
    layers: Sequence[ClassLayer],
    labels: Sequence[int | None],
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return a state dict with the class outputs of these labels (K,). Take those of None from `initial`.

    layers: those with class outputs. The first has blocks of single channels.
    """
    selected = dict(state)
    old_labels = range(count_classes(state, layers[0]))
    for layer in layers:
        sources = layer.blocks(labels)
        new = [block for block, source in enumerate(sources) if source is None]
        for name in (f"{layer.name}.weight", f"{layer.name}.bias"):
            old = state[name].unflatten(0, (layer.num_groups, len(layer.blocks(old_labels)), -1))
            outputs = old[:, [source or 0 for source in sources]]  # a copy
            if initial and new:
                initial_outputs = initial[name].unflatten(0, (layer.num_groups, len(sources), -1))
                outputs[:, new] = initial_outputs[:, new].to(outputs)
            selected[name] = outputs.flatten(0, 2)
    return selected


def check_compatible(
    weights: Weights,
    layers: Sequence[ClassLayer],
    make_model: Callable[[Config], nn.Module],
    config: Config,
    path: Path,
) -> None:
    """Raise InputError unless the weights fit the network of the settings, apart from its number of classes."""
    number = count_classes(weights.state, layers[0])
    try:
        own_config = replace(config, num_classes=number)
    except ValueError:
        bias = weights.state[f"{layers[0].name}.bias"]
        raise InputError(
            f"{path}: {layers[0].name}.bias has {bias.numel()} values, which fit no number of classes. Use an "
            "unmodified checkpoint."
        ) from None
    expected = files.expected_state(make_model, own_config)
    files.check_compatible(weights.state, expected, f"{config.network_name} for {number} classes", path)


def match(
    weights: Weights, layers: Sequence[ClassLayer], config: RunConfig, path: Path, *, initialize: bool
) -> ClassMatch:
    """Match the classes of the data with those of the file, by the names of their categories.

    If the file has no names, or the run reads no data, all classes match if their number is the same, else none. The
    background matches if a category does. With `initialize`, the outputs of classes without a match are initialized.
    Otherwise raise InputError unless the file and the data have the same categories.
    """
    theirs = [category.name for category in weights.categories]
    ours = [category.name for category in num_classes.read_categories(config)] if theirs else []
    number = count_classes(weights.state, layers[0])
    labels: list[int | None]
    if not ours or theirs == ours:
        is_same = number == config.num_classes
        labels = list(range(number)) if is_same else [None] * config.num_classes
    else:
        is_unique = [theirs.count(name) == ours.count(name) == 1 for name in ours]
        matched = [1 + theirs.index(name) if unique else None for name, unique in zip(ours, is_unique, strict=True)]
        labels = [0 if any(matched) else None, *matched]
        is_same = all(matched) and len(ours) == len(theirs)
    if not is_same and not initialize:
        raise InputError(describe_difference(path, number, config, theirs, ours))
    return ClassMatch(labels, describe_match(weights.state, layers, labels, ours))


def describe_difference(path: Path, number: int, config: RunConfig, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Return the error message of a file whose classes are not those of the data."""
    if ours:
        difference = f"was trained on the categories {', '.join(theirs)}, but the annotations have {', '.join(ours)}"
    else:
        source = "annotations have" if config.required_splits else "settings ask for"
        difference = f"holds {number} classes, with the background, but the {source} {config.num_classes}"
    if not config.required_splits:
        return f"{path}: {difference}. Pass --num-classes {number}."
    return f"{path}: {difference}. Use annotations with the same categories, or train on these with --weights."


def describe_match(
    state: Mapping[str, Tensor], layers: Sequence[ClassLayer], labels: Sequence[int | None], names: Sequence[str]
) -> str:
    """Describe what a network takes from a file and what it initializes. names: those of the data, if compared."""
    loaded = f"{len(state)} tensors loaded"
    if None not in labels:
        return loaded
    new = [name for name, label in zip(names, labels[1:], strict=True) if label is None] if any(labels) else []
    classes = ", ".join(new) if new else f"all {len(labels)} classes"
    return f"{loaded}, but the outputs of {classes} initialized ({', '.join(layer.name for layer in layers)})"


def load(weights: Weights, layers: Sequence[ClassLayer], model: nn.Module, config: RunConfig, path: Path) -> Weights:
    """Load weights that `check_compatible` accepted into a model on the CPU, and return those that it took.

    A run that trains initializes the outputs of new classes. Raise InputError in another unless the categories are the
    same.
    """
    labels, report = match(weights, layers, config, path, initialize=config.trains)
    taken = replace(weights, state=select(weights.state, layers, labels, model.state_dict()), report=report)
    files.load_into(taken, model)
    return taken
