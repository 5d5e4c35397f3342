"""Conformance test: compares a program with the numbers that a reference computed once, on any device.

    python -m WORKLOAD conformance FILE.npz [--device D] [--precision P]

Run it first on a new accelerator. Each comparison prints its largest error, its tolerance and a verdict. The exit
status is 0 if all comparisons pass, 1 if one fails, and 2 if the file cannot be used. The comparisons of a workload
are in its own module `conformance`.

The reference's numbers are in float32. In another precision, the tolerances of a network follow from rounding: the same
comparisons run several times in double precision, with values rounded as in that precision. An error of a device is
another sample from the same distribution. `--record-rounding` keeps the errors of the simulations for later runs.
"""

import json
import math
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.evaluation import rounding_errors
from detection.evaluation.rounding import SimulatedPrecision
from detection.nn import placement
from detection.nn.placement import Model
from detection.runtime.device import (
    Precision,
    device_name,
    select_device,
    select_precision,
    supports_float64,
)
from detection.runtime.threads import limit_threads

# The error of a single number, such as a loss, may be close to 0 in one simulation. A normally distributed error
# exceeds three times the largest of eight once in 1,100 comparisons (twice the largest of one: once in 3.4).
NUM_SIMULATIONS = 8
ROUNDING_MARGIN = 3.0
MAX_UNMATCHED = 0.5  # fraction of proposals or detections


@dataclass(frozen=True)
class Comparison:
    """Result of one comparison: the largest error and its tolerance in float32.

    max_tolerance: in any precision. An error beyond it shows that nothing agrees.
    """

    name: str
    error: float
    tolerance: float
    max_tolerance: float = math.inf

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance. It is nan, and fails, if the shapes differ.

        The tolerance is infinite if the simulated network overflows. Nothing passes then.
        """
        return self.error <= self.tolerance < math.inf


class ReferenceTensor(NamedTuple):
    """Tensor of the reference's network. `kind` and `factor` determine how the vectors' seeds fill it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    factor: float = 1.0


class ReferenceNetwork(NamedTuple):
    """Tensors of the reference's network in the order of its checkpoints, and the names of its trained parameters.

    seed: of the first tensor's values, if it is not among the vectors.
    """

    tensors: list[ReferenceTensor]
    parameters: list[str]
    seed: int | None = None


class MissingVector(KeyError):
    """A vector that the file does not hold."""


class Vectors(dict[str, NDArray[Any]]):
    """Vectors by key. Raises MissingVector instead of KeyError."""

    def __missing__(self, key: str) -> NDArray[Any]:
        raise MissingVector(key)


@dataclass(frozen=True)
class ConformanceContext:
    """Context of the comparisons: the vectors, the reference's network, the device, the precision of the network.

    rounding_errors: largest error of each comparison, by name, if the precision is simulated; None: not recorded.
    """

    vectors: Vectors
    network: ReferenceNetwork
    device: torch.device
    precision: Precision
    rounding_errors: Mapping[str, float] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the network's weights and images."""
        return torch.float64 if isinstance(self.precision, SimulatedPrecision) else torch.float32

    def simulated(self) -> Iterator["ConformanceContext"]:
        """Yield contexts in which the precision is simulated, with errors that do not depend on each other."""
        device = self.device if supports_float64(self.device) else torch.device("cpu")
        for i in range(NUM_SIMULATIONS):
            precision = SimulatedPrecision(self.precision.name, spacing=2 ** (i / NUM_SIMULATIONS))
            yield replace(self, device=device, precision=precision)

    def scalar(self, key: str) -> int:
        """Return a vector that is a single integer."""
        return int(self.vectors[key])

    def vector(self, key: str) -> Tensor:
        """Return a vector as a tensor on the device."""
        return torch.from_numpy(self.vectors[key]).to(self.device)

    def as_tensor(self, array: NDArray[np.float64]) -> Tensor:
        """Convert an array of random numbers to float32 values on the device, in the data type of the network."""
        return torch.from_numpy(array.astype(np.float32)).to(self.device, self.dtype)


Compare = Callable[[ConformanceContext], Iterator[Comparison]]


@dataclass(frozen=True)
class ConformanceSuite:
    """Comparisons of a workload, by part.

    title: name of the network. default_network: returns the reference's network for a file without a state dict.
    network_comparisons: those of `comparisons` that compute in the precision of the context.
    """

    title: str
    comparisons: tuple[Compare, ...]
    default_network: Callable[[], ReferenceNetwork]
    network_comparisons: tuple[Compare, ...]

    def load(self, path: Path, device: str, precision: str) -> ConformanceContext:
        """Read the vectors, and the tensor names from `<stem>_state_dict.json` if it exists; raise InputError."""
        try:
            with np.load(path) as archive:
                vectors = Vectors({name: archive[name] for name in archive.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: not a file of conformance vectors ({error}). Pass the reference's .npz file."
            ) from error
        names_file = path.with_name(f"{path.stem}_state_dict.json")
        network = read_network(names_file) if names_file.exists() else self.default_network()
        errors = rounding_errors.read_errors(path).get(precision)
        torch_device = select_device(device, local_rank=0)
        return ConformanceContext(vectors, network, torch_device, select_precision(precision, torch_device), errors)

    def run(self, arguments: Namespace) -> int:
        """Run all comparisons, with the arguments of `arguments.parse_conformance`; return the exit status.

        Raises InputError.
        """
        context = self.load(arguments.file, arguments.device, arguments.precision)
        if arguments.record_rounding and (errors := self.simulate(self.network_comparisons, context)):
            print(f"Wrote {rounding_errors.record_errors(arguments.file, context.precision.name, errors)}")
            context = replace(context, rounding_errors=errors)
        print(f"{arguments.file} on {device_name(context.device)}, network in {context.precision.name}")
        if context.precision.name != "fp32" and context.rounding_errors is None:
            print(f"{context.precision.name} is simulated first: its errors are not recorded for these vectors")
        failed = count = absent = 0
        for compare in self.comparisons:
            try:
                for result in self.results(compare, context):
                    verdict = "ok" if result.passed else "FAIL"
                    numbers = f"error {result.error:9.2e}  tolerance {result.tolerance:8.1e}"
                    print(f"{result.name:<40} {numbers}  {verdict}")
                    failed, count = failed + (not result.passed), count + 1
            except MissingVector as error:
                absent += 1
                print(f"{part_name(compare):<40} absent: the file has no vector {error}")
        if not count:
            raise InputError(f"{arguments.file}: holds no vectors of {self.title}. Pass another file.")
        print(f"{count - failed} of {count} comparisons passed" + (f", {absent} parts absent" if absent else ""))
        return 1 if failed else 0

    def results(self, compare: Compare, context: ConformanceContext) -> Iterator[Comparison]:
        """Yield the results of a part, with tolerances that follow from the precision."""
        errors: Mapping[str, float] = {}
        if context.precision.name != "fp32" and compare in self.network_comparisons:
            errors = self.simulate([compare], context) if context.rounding_errors is None else context.rounding_errors
        # As the references did: more threads add in another order, and proposals of nearly equal scores change places.
        with limit_threads(1):
            for result in compare(context):
                tolerance = result.tolerance + ROUNDING_MARGIN * errors.get(result.name, 0.0)
                yield replace(result, tolerance=min(tolerance, result.max_tolerance))

    def simulate(self, comparisons: Sequence[Compare], context: ConformanceContext) -> dict[str, float]:
        """Return the largest error of each comparison, by name, if the precision is simulated."""
        errors: dict[str, float] = {}
        for compare in comparisons:
            with suppress(MissingVector):
                for simulated in context.simulated():
                    for result in compare(simulated):
                        errors[result.name] = max(errors.get(result.name, 0.0), result.error)
        return errors


def part_name(compare: Compare) -> str:
    """Return the name of the part that a function compares."""
    return compare.__name__.removeprefix("compare_")


def read_network(path: Path) -> ReferenceNetwork:
    """Read the reference's tensors and parameters from a file of their names; raise InputError."""
    try:
        content = json.loads(path.read_text())
        tensors = [ReferenceTensor(name, tuple(shape), *rest) for name, shape, *rest in content["state_dict"]]
        # RetinaNet's "parameters" include those that its reference does not train.
        parameters = content["trained"] if "trained" in content else content["parameters"]
        return ReferenceNetwork(tensors, parameters, content.get("model_seed_base"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the tensor names of a reference ({error}). Restore the file, or delete it."
        ) from error


def max_abs_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute error, or nan if the shapes differ."""
    if actual.shape != expected.shape:
        return float("nan")
    return float((to_float64(actual) - to_float64(expected)).abs().max()) if actual.numel() else 0.0


def max_rel_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute error divided by the mean magnitude of `expected`."""
    return max_abs_error(actual, expected) / max(float(to_float64(expected).abs().mean()), 1e-12)


def max_peak_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute error divided by the largest magnitude of `expected`."""
    peak = float(to_float64(expected).abs().max()) if expected.numel() else 0.0
    return max_abs_error(actual, expected) / max(peak, 1e-12)


def max_norm_error(gradients: Mapping[str, Tensor], names: Sequence[str], expected: Tensor) -> float:
    """Return the largest relative error of the norms of gradients (N,), by name.

    Norms are in double precision: a float32 sum over 13 million weights is off by 0.08% on some processors. Behind a
    ReLU that is never active, the reference's gradient is 0, too.
    """
    norms, target = torch.stack([to_float64(gradients[name]).norm() for name in names]), to_float64(expected)
    return float(((norms - target).abs() / torch.where(target > 0, target, 1)).max())


def place_model(context: ConformanceContext, model: Model, state: Mapping[str, Tensor], config: RunConfig) -> Model:
    """Load the reference's state, which counts no batches of batch norm, into a model on the meta device.

    Return it on the context's device, in its data type and in the memory layout of a run. The state stays unchanged if
    the model is trained.
    """
    counters = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if name.endswith("tracked")}
    copies = {name: tensor.to(context.dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(counters | copies, assign=True)
    return placement.place_model(
        model, context.device, context.precision, config.channels_last, trains_batch_norm=not config.freeze_batch_norm
    )


def to_float64(tensor: Tensor) -> Tensor:
    """Convert to float64 on the CPU: some devices have none."""
    return tensor.detach().cpu().double()


def compare_rows(
    name: str,
    actual: Mapping[str, Sequence[Tensor]],
    expected: Mapping[str, Sequence[Tensor]],
    tolerances: Mapping[str, float],
    *,
    unmatched_tolerance: float = 0,
    columns: bool = True,
    sampled: bool = False,
) -> Iterator[Comparison]:
    """Compare rows of several columns as sets, image by image: the order of equal scores is arbitrary.

    actual, expected: of each image the column's values, (N, ...) and (M, ...). Yields the fraction of rows without a
    counterpart within the tolerances. columns: also yield the largest error of each column between a row and its
    nearest counterpart, which has no meaning if rows may be unmatched. sampled: `expected` holds only some of the rows.
    """
    unmatched, total = 0, 0
    errors = {column: torch.zeros((), dtype=torch.float64) for column in expected}
    first, *_ = expected
    for image in range(len(expected[first])):
        distances = {column: max_distances(actual[column][image], expected[column][image]) for column in expected}
        num_actual, num_expected = distances[first].shape
        total += num_expected
        if not num_actual or not num_expected:
            unmatched += num_expected if sampled else max(num_actual, num_expected)
            continue
        joint = torch.stack([part / max(tolerances[column], 1e-9) for column, part in distances.items()]).amax(dim=0)
        nearest = [joint.min(dim=dim) for dim in ((0,) if sampled else (0, 1))]
        outliers = max(int((~(distance <= 1)).sum()) for distance, _ in nearest)  # nan is one
        unmatched += outliers if sampled else max(outliers, abs(num_actual - num_expected))
        for dim, (_, index) in enumerate(nearest):
            for column, part in distances.items():
                errors[column] = errors[column].maximum(part.gather(dim, index.unsqueeze(dim)).max())
    yield Comparison(f"{name}: unmatched", unmatched / max(total, 1), unmatched_tolerance, MAX_UNMATCHED)
    if columns:
        for column, error in errors.items():
            yield Comparison(f"{name}: {column}", float(error), tolerances[column])


def max_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest absolute difference (N, M) between the values of each pair of rows, (N, ...) and (M, ...)."""
    return torch.cdist(to_float64(a)[:, None].flatten(1), to_float64(b)[:, None].flatten(1), p=float("inf"))
