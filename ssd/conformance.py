"""Conformance: do the functions of this project give the numbers of the MLPerf reference on this device?

    python -m ssd.conformance FILE.npz [--device D] [--precision P]

FILE.npz holds vectors that were computed once with the reference. Each part prints its largest error, its
tolerance and a verdict; the exit status is 0 if all parts agree, 1 if one does not, 2 if the file cannot be used.
What an engineer runs first on a new accelerator.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.boxes import xyxy_to_cxcywh
from detection.config import device_names
from detection.config.settings import InputError
from detection.runtime.device import Precision, choose, describe, precision
from ssd import augment, checkpoint_names
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import encode, match
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.postprocess import detect

NUM_CLASSES = 81

# Largest relative error of what the network computes, by precision. The rest of the parts is float32 always.
NETWORK_TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}
# Largest relative error of the norm of a parameter's gradient. The early layers of this deep network with made-up
# weights amplify rounding: against float64, float32 is off by up to 0.2 % (channels first) or 0.55 % (channels last),
# bf16 by up to 15 % (measured on a CPU, torch 2.15).
GRADIENT_TOLERANCE = {"fp32": 1e-2, "tf32": 1e-1, "bf16": 2.5e-1, "fp16": 1e-1}
# Deciles of 20,000 draws from the same law differ by about 3 standard errors at most; see `crop_parts`.
CROP_TOLERANCE = 0.02


@dataclass(frozen=True)
class Part:
    """What one comparison gave: the largest error against the tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the error, which is nan where shapes differ, stays within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Bench:
    """What the comparisons need: the vectors, the names of the reference's tensors, the device, the precision."""

    vectors: dict[str, NDArray[Any]]
    tensors: list[tuple[str, tuple[int, ...], str]]
    parameters: list[str]
    device: torch.device
    precision: Precision

    def number(self, key: str) -> int:
        """A vector that is one whole number."""
        return int(self.vectors[key])

    def tensor(self, key: str) -> Tensor:
        """A vector as a tensor on the device."""
        return torch.from_numpy(self.vectors[key]).to(self.device)

    def made(self, array: NDArray[np.float64]) -> Tensor:
        """What a generator drew, as float32 on the device."""
        return torch.from_numpy(array.astype(np.float32)).to(self.device)

    def truth(self, cases: list[int]) -> tuple[Tensor, Tensor]:
        """Boxes (B, G, 4) and labels (B, G) of encode cases, padded."""
        boxes = [self.tensor(f"encode{case}_gt_xyxy") for case in cases]
        labels = [self.tensor(f"encode{case}_gt_labels") for case in cases]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(boxes, batch_first=True), pad(labels, batch_first=True)


def absolute(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute error, nan where the shapes differ."""
    if got.shape != wanted.shape:
        return float("nan")
    return float((got.double() - wanted.double()).abs().max()) if got.numel() else 0.0


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute error over the mean magnitude of what is wanted."""
    return absolute(got, wanted) / max(float(wanted.double().abs().mean()), 1e-12)


def anchor_parts(bench: Bench) -> Iterator[Part]:
    """The default boxes in both formats."""
    anchors = make_anchors(bench.device)
    yield Part("anchors cxcywh", absolute(anchors.boxes_cxcywh, bench.tensor("default_boxes_cxcywh")), 1e-6)
    yield Part("anchors xyxy", absolute(anchors.boxes_xyxy, bench.tensor("default_boxes_xyxy")), 1e-6)


def encode_parts(bench: Bench) -> Iterator[Part]:
    """Which anchors become positive, with which box and label; all cases in one padded batch."""
    cases = list(range(bench.number("encode_cases")))
    boxes, labels = bench.truth(cases)
    anchors = make_anchors(bench.device)
    matched = match(boxes, labels, anchors)
    _, anchor_labels = encode(boxes, labels, anchors)
    for case in cases:
        (positive,) = (anchor_labels[case] > 0).nonzero(as_tuple=True)
        wanted = bench.tensor(f"encode{case}_pos_index")
        yield Part(f"encode {case}: anchors", absolute(positive, wanted), 0)
        if torch.equal(positive, wanted):
            got = anchor_labels[case, positive]
            yield Part(f"encode {case}: labels", absolute(got, bench.tensor(f"encode{case}_pos_labels")), 0)
            got = xyxy_to_cxcywh(boxes[case, matched[case, positive]])
            yield Part(f"encode {case}: boxes", absolute(got, bench.tensor(f"encode{case}_pos_cxcywh")), 1e-6)


def predictions(bench: Bench, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Made-up predictions (B, A, 4) and (B, A, 81), drawn in the reference's layout, channels before anchors."""
    rng = np.random.default_rng(seed)
    deltas = bench.made(rng.standard_normal((batch, 4, NUM_ANCHORS)))
    logits = bench.made(3 * rng.standard_normal((batch, NUM_CLASSES, NUM_ANCHORS)))
    return deltas.transpose(1, 2).requires_grad_(), logits.transpose(1, 2).requires_grad_()


def loss_parts(bench: Bench) -> Iterator[Part]:
    """The loss with hard negative mining, and its gradients."""
    anchors = make_anchors(bench.device)
    case = 0
    while f"loss{case}_seed" in bench.vectors:
        encode_cases = [int(k) for k in bench.vectors[f"loss{case}_encode_cases"]]
        pred_deltas, logits = predictions(bench, bench.number(f"loss{case}_seed"), len(encode_cases))
        loss = multibox_loss(pred_deltas, logits, *encode(*bench.truth(encode_cases), anchors)).sum(dim=1).mean()
        loss.backward()
        yield Part(f"loss {case}", relative(loss.detach(), bench.tensor(f"loss{case}_value")), 1e-5)
        for name, tensor, stride in (("loc", pred_deltas, 1), ("cls", logits, 9)):
            assert tensor.grad is not None
            gradient = tensor.grad.transpose(1, 2)
            wanted = bench.tensor(f"loss{case}_grad_{name}_sample")
            got = gradient[:, ::stride, ::97]
            yield Part(f"loss {case}: gradient of {name}", absolute(got, wanted), 1e-6)
            wanted = bench.tensor(f"loss{case}_grad_{name}_sum_abs")
            yield Part(f"loss {case}: sum of |{name}|", relative(gradient.abs().sum(), wanted), 1e-4)
        case += 1
    boxes, labels = bench.truth([bench.number("loss_empty_encode_case")])
    boxes, labels = torch.cat([boxes, torch.zeros_like(boxes)]), torch.cat([labels, torch.zeros_like(labels)])
    pred_deltas, logits = predictions(bench, bench.number("loss_empty_seed"), 2)
    loss = multibox_loss(pred_deltas, logits, *encode(boxes, labels, anchors)).sum(dim=1).mean()
    yield Part("loss with an empty image", relative(loss.detach(), bench.tensor("loss_empty_value")), 1e-5)


def detect_parts(bench: Bench) -> Iterator[Part]:
    """Decoding, threshold, suppression and the choice of the best 200."""
    case = 0
    while f"decode{case}_seed" in bench.vectors:
        rng = np.random.default_rng(bench.number(f"decode{case}_seed"))
        deltas = bench.made(0.7 * rng.standard_normal((1, 4, NUM_ANCHORS)))
        scores = rng.standard_normal((1, NUM_CLASSES, NUM_ANCHORS)).astype(np.float32)
        scores[:, 0] += bench.vectors[f"decode{case}_background_bias"]
        hot = bench.number(f"decode{case}_hot")
        if hot:
            anchor, label = rng.integers(0, NUM_ANCHORS, hot), rng.integers(1, NUM_CLASSES, hot)
            scores[0, label, anchor] += rng.uniform(4, 12, hot).astype(np.float32)
        logits = torch.from_numpy(scores).to(bench.device)
        found = detect(deltas.transpose(1, 2), logits.transpose(1, 2), make_anchors(bench.device))
        for name, got, tolerance in (
            ("xyxy", found.boxes_xyxy, 1e-5),
            ("labels", found.labels, 0),
            ("scores", found.scores, 1e-5),
        ):
            wanted = bench.tensor(f"decode{case}_{name}")
            yield Part(f"detect {case}: {name}", absolute(got, wanted), tolerance)
        case += 1


def reference_state(bench: Bench) -> dict[str, Tensor]:
    """The reference's state dict, with the weights that follow from the seed."""
    state = {}
    for i, (name, shape, kind) in enumerate(bench.tensors):
        noise = np.random.default_rng(bench.number("model_seed_base") + i).standard_normal(shape)
        match kind:
            case "conv":
                noise = noise * np.sqrt(2 / prod(shape[1:]))
            case "bn_weight":
                noise = 1 + 0.1 * noise
            case "bias" | "running_mean":
                noise = 0.1 * noise
            case "running_var":
                noise = np.exp(0.1 * noise)
            case "counter":
                noise = np.zeros(shape)
        state[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    return state


def filled(bench: Bench) -> SSD300:
    """The network with the reference's state dict, on the device, channels last."""
    model = SSD300(NUM_CLASSES)
    model.load_state_dict(checkpoint_names.from_reference(reference_state(bench)))
    return model.to(bench.device).to(memory_format=torch.channels_last)


def network_parts(bench: Bench) -> Iterator[Part]:
    """The whole network: outputs in evaluation mode, loss and gradient norms in training mode."""
    tolerance = NETWORK_TOLERANCE[bench.precision.name]
    images = bench.made(
        np.random.default_rng(bench.number("model_seed_base") - 1).standard_normal((2, 3, 300, 300))
    ).contiguous(memory_format=torch.channels_last)
    model = filled(bench).eval()
    with torch.no_grad(), bench.precision.autocast(bench.device):
        deltas, logits = model(images)
    for name, got, stride in (("loc", deltas, 1), ("cls", logits, 4)):
        got = got.float().transpose(1, 2)
        wanted = bench.tensor(f"model_eval_{name}_sample")
        yield Part(f"network, evaluation: {name}", relative(got[:, ::stride, ::53], wanted), tolerance)
        wanted = bench.tensor(f"model_eval_{name}_abs_mean")
        yield Part(f"network, evaluation: mean |{name}|", relative(got.abs().mean(), wanted), tolerance)

    model.train()
    with bench.precision.autocast(bench.device):
        deltas, logits = model(images)
        targets = encode(*bench.truth([3, 6]), make_anchors(bench.device))
        loss = multibox_loss(deltas, logits, *targets).sum(dim=1).mean()
    loss.backward()
    yield Part("network, training: loss", relative(loss.detach(), bench.tensor("model_train_loss")), tolerance)
    gradients = checkpoint_names.to_reference(
        {name: t.grad for name, t in model.named_parameters() if t.grad is not None}
    )
    got = torch.stack([gradients[name].double().norm() for name in bench.parameters])
    wanted = bench.tensor("model_train_grad_norms")
    # Behind a ReLU that never fires the gradient is 0 in the reference too.
    error = float(((got - wanted).abs() / torch.where(wanted > 0, wanted, 1)).max())
    yield Part("network, training: gradient norms", error, GRADIENT_TOLERANCE[bench.precision.name])


def crop_parts(bench: Bench) -> Iterator[Part]:
    """The law of the random IoU crop: how often it crops, and the deciles of what it gives."""
    samples = bench.number("crop_samples")
    for max_samples in (1, 50):
        for case, encode_case in enumerate(bench.vectors["crop_encode_cases"]):
            key = f"crop_it{max_samples}_case{case}"
            boxes = np.asarray(bench.vectors[f"encode{encode_case}_gt_xyxy"], dtype=np.float32)
            rng = np.random.default_rng(case)
            crops = np.stack([augment.draw_crop(rng, boxes, max_samples) for _ in range(samples)])
            crops = crops[(crops != augment.WHOLE_IMAGE).any(axis=1)]
            rate = len(crops) / samples
            yield Part(
                f"crop, {max_samples} tries, {case}: rate",
                abs(rate - float(bench.vectors[f"{key}_rate"])),
                CROP_TOLERANCE,
            )
            kept = augment.centres_inside(crops, boxes).sum(axis=1)
            left, top, right, bottom = crops.T
            for name, values in (
                ("w", right - left),
                ("h", bottom - top),
                ("left", left),
                ("top", top),
                ("kept", kept),
            ):
                deciles = np.quantile(values, np.arange(1, 10) / 10)
                wanted = bench.vectors[f"{key}_{name}_deciles"]
                error = float(np.abs(deciles - wanted).max())
                # A count moves by whole boxes where a decile lies on a step of its distribution.
                tolerance = 1.0 if name == "kept" else CROP_TOLERANCE
                yield Part(f"crop, {max_samples} tries, {case}: {name}", error, tolerance)


PARTS: tuple[Callable[[Bench], Iterator[Part]], ...] = (
    anchor_parts,
    encode_parts,
    loss_parts,
    detect_parts,
    network_parts,
    crop_parts,
)


def open_bench(path: Path, device_name: str, precision_name: str) -> Bench:
    """Read the vectors, and the names of tensors in `<stem>_state_dict.json` beside them or the built-in ones."""
    try:
        with np.load(path) as archive:
            vectors = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a file of conformance vectors ({error})") from error
    names_file = path.with_name(f"{path.stem}_state_dict.json")
    tensors = checkpoint_names.tensor_kinds()
    parameters = [name for name, _, kind in tensors if kind in ("conv", "bias", "bn_weight")]
    if names_file.exists():
        content = json.loads(names_file.read_text())
        tensors = [(name, tuple(shape), kind) for name, shape, kind in content["state_dict"]]
        parameters = content["parameters"]
    chosen = choose(device_name, local_rank=0)
    return Bench(vectors, tensors, parameters, chosen, precision(precision_name, chosen))


def main(argv: list[str]) -> int:
    """Run every part; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssd.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="vectors of the reference (.npz)")
    parser.add_argument("--device", default="auto", help=device_names.HELP)
    parser.add_argument("--precision", default="fp32", choices=NETWORK_TOLERANCE, help="of the network")
    arguments = parser.parse_args(argv)
    try:
        bench = open_bench(arguments.file, arguments.device, arguments.precision)
        print(f"{arguments.file} on {describe(bench.device)}, network in {bench.precision.name}")
        failed = count = 0
        for part in (part for parts in PARTS for part in parts(bench)):
            verdict = "ok" if part.agrees else "WRONG"
            print(f"{part.name:<40} error {part.error:9.2e}  tolerance {part.tolerance:7.0e}  {verdict}")
            failed, count = failed + (not part.agrees), count + 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: {arguments.file}: the vector {error} is missing", file=sys.stderr)
        return 2
    print(f"{count - failed} of {count} comparisons agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
