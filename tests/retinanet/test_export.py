"""Tests of the export: the file's detections are those of the program."""

from dataclasses import replace

import pytest
import torch

import commands
from checkpoints import write_checkpoint
from detection.evaluation import export as shared_export
from detection.nn.traceable_nms import stable_topk
from retinanet import export
from retinanet.anchors import make_anchors
from retinanet.export_module import ExportableRetinaNet, top_scores
from retinanet.model import HeadOutputs, make_model
from retinanet.postprocess import detect
from tiny_retinanet import make_config

SETTINGS = {"score_threshold": 0.1, "nms_threshold": 0.5, "pre_nms_top_n": 60, "max_detections": 40}
CONFIG = replace(make_config(), **SETTINGS)
ANCHORS = make_anchors(CONFIG.image_size, CONFIG.image_size, torch.device("cpu"), CONFIG.anchor_sizes)


class PostprocessOnly(ExportableRetinaNet):
    """Exportable graph of the postprocessing, without the network."""

    def forward(self, logits, deltas):
        return self.detect(HeadOutputs(logits, deltas))


def make_predictions(seed, bias=-1.0, step=0.0):
    """Return logits and deltas of two images. Logits are multiples of step, so that many are equal, if it is not 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = [bias + torch.randn(2, len(level), 3, generator=generator) for level in ANCHORS]
    deltas = [0.5 * torch.randn(2, len(level), 4, generator=generator) for level in ANCHORS]
    return [(level / step).round() * step if step else level for level in logits], deltas


def check_postprocess(run, logits, deltas, atol=0.0):
    """Compare with the program, and return the number of detections."""
    expected = shared_export.split_by_image(
        detect(HeadOutputs(logits, deltas), ANCHORS, (CONFIG.image_size, CONFIG.image_size), **SETTINGS), 2
    )
    outputs = run(logits, deltas)
    assert all(part.shape[:2] == (2, 40) for part in outputs)
    for actual_parts, expected_parts in zip(shared_export.drop_padding(outputs), expected, strict=True):
        for actual, part in zip(actual_parts, expected_parts, strict=True):
            torch.testing.assert_close(actual, part, rtol=0, atol=atol)
    return len(expected[0][1])


@pytest.mark.parametrize("step", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("bias", "count"), [(-1.0, 40), (-6.0, 1), (-30.0, 0)])
def test_fixed_shape_postprocessing_equals_the_program(step, bias, count, python_loops):
    logits, deltas = make_predictions(0, bias, step)
    assert check_postprocess(PostprocessOnly(torch.nn.Identity(), CONFIG), logits, deltas) >= count


@pytest.mark.parametrize("count", [1, 7, 200, 10_000])
def test_top_scores_equal_sorting_all_scores(count):
    logits = torch.randint(0, 5, (2, 300, 4), generator=torch.Generator().manual_seed(0)) - 2.0
    expected = stable_topk(logits.sigmoid().flatten(1), min(count, 1200))
    assert all(map(torch.equal, top_scores(logits, count), expected))


@pytest.mark.slow
def test_onnx_postprocessing_matches_the_program(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    inputs = [f"{kind}_{level}" for kind in ("logits", "deltas") for level in range(5)]
    program = torch.export.export(PostprocessOnly(torch.nn.Identity(), CONFIG).eval(), make_predictions(1))
    shared_export.write_onnx(program, tmp_path / "module.onnx", inputs, export.OUTPUTS, {})
    network = shared_export.load_onnx(tmp_path / "module.onnx", inputs, export.OUTPUTS)
    for seed, step in enumerate((0.0, 0.25)):
        predictions = make_predictions(seed, step=step)
        assert check_postprocess(lambda *levels: network(*levels[0], *levels[1]), *predictions, atol=1e-4) == 40


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_matches_the_checkpoint(suffix, tmp_path, capsys):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    torch.manual_seed(0)
    model = make_model(CONFIG)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -1.0)
    checkpoint, out = write_checkpoint(tmp_path, model, CONFIG), tmp_path / f"model.{suffix}"
    assert commands.retinanet("export", checkpoint, out) == 0
    assert "verified on 8 images: 320 of 320 detections match" in capsys.readouterr().out
