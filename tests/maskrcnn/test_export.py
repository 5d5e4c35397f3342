"""Tests of the export: the file's detections are those of the program."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import commands
from checkpoints import CATEGORY_NAMES, write_checkpoint
from detection.evaluation import export as shared_export
from maskrcnn import export
from maskrcnn.config import Config
from maskrcnn.export_module import ExportableMaskRCNN
from maskrcnn.model import make_model
from maskrcnn.postprocess import select_detections
from tiny_maskrcnn import SIZES_HW, make_outputs


def make_network(**settings):
    """Return a small network with random weights, which yields 30 detections per image.

    Its activations have a scale of 1, as after training. Larger ones would amplify rounding.
    """
    torch.manual_seed(0)
    config = Config(
        dataset="toy",
        num_classes=4,
        backbone="resnet18",
        freeze_batch_norm=False,
        batch_norm_eps=1e-5,
        input_format="imagenet-rgb",
        min_image_size=64,
        max_image_size=96,
        anchor_sizes=(8, 16, 32, 64, 96),
        rpn_pre_nms_top_n_eval=50,
        rpn_post_nms_top_n_eval=40,
        max_detections=30,
        **settings,
    )
    model = make_model(config)
    torch.nn.init.normal_(model.mask_head.predictor.mask_fcn_logits.weight, std=0.5)
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize(("legacy", "size_hw"), [(True, (64, 96)), (False, (110, 32))])
def test_fixed_shape_detections_equal_the_program_at_any_size(legacy, size_hw, python_loops):
    model = make_network(legacy_boxes=legacy)
    images = [torch.randint(0, 256, (3, *size_hw), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))]
    inputs = export.make_inputs(images)
    (expected,) = export.detect_images(model, *inputs)
    (actual,) = shared_export.drop_padding(ExportableMaskRCNN(model)(*inputs))
    assert len(expected[1]) == 30
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


class PostprocessOnly(ExportableMaskRCNN):
    """Exportable graph of the postprocessing, without the network."""

    def forward(self, logits, deltas, proposals, valid, sizes_hw):
        return self.select_detections(logits, deltas, proposals, valid, sizes_hw)


def make_postprocess(legacy):
    model = torch.nn.Identity()
    model.config = Config(dataset="toy", num_classes=6, max_detections=50, legacy_boxes=legacy)
    return PostprocessOnly(model).eval()


def check_postprocess(run, legacy, seed, atol=0.0):
    """Compare postprocessing, with equal scores, padded proposals and boxes without area."""
    logits, deltas, proposals = make_outputs(torch.Generator().manual_seed(seed))
    deltas[:, ::5, :, 2:] -= 100
    boxes, labels, scores = run(logits, deltas, proposals.boxes_xyxy, proposals.valid, SIZES_HW)
    expected = select_detections(logits, deltas, proposals, SIZES_HW, make_postprocess(legacy).config)
    assert (labels > 0).sum() > 40
    assert torch.equal(labels, expected[2])
    torch.testing.assert_close((boxes, scores), expected[:2], rtol=0, atol=atol)


@pytest.mark.parametrize("legacy", [True, False])
def test_fixed_shape_postprocessing_equals_the_program(legacy, python_loops):
    for seed in range(3):
        check_postprocess(make_postprocess(legacy), legacy, seed)


@pytest.mark.slow
def test_onnx_postprocessing_matches_the_program(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    logits, deltas, proposals = make_outputs(torch.Generator().manual_seed(9))
    example = {
        "logits": logits,
        "deltas": deltas,
        "proposals": proposals.boxes_xyxy,
        "valid": proposals.valid,
        "sizes_hw": SIZES_HW,
    }
    program = torch.export.export(make_postprocess(legacy=True), tuple(example.values()))
    outputs = export.OUTPUTS[:3]
    shared_export.write_onnx(program, tmp_path / "module.onnx", list(example), outputs, {})
    for seed in range(3):
        check_postprocess(
            shared_export.load_onnx(tmp_path / "module.onnx", list(example), outputs), True, seed, atol=1e-4
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_network()
    return write_checkpoint(tmp_path_factory.mktemp("run"), model, model.config)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_matches_the_checkpoint_at_any_size(checkpoint, tmp_path, capsys, suffix):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    out = tmp_path / f"model.{suffix}"
    assert commands.maskrcnn("export", checkpoint, out) == 0
    assert "verified on 8 images: 240 of 240 detections match" in capsys.readouterr().out
    job = export.prepare(Namespace(checkpoint=checkpoint, score=None, batch_size=0, images=[]))
    if suffix == "onnx":
        exported = shared_export.load_onnx(out, list(job.example), export.OUTPUTS)
    else:
        files = {"categories": ""}
        torch.export.load(out, extra_files=files)
        assert [category["name"] for category in json.loads(files["categories"])] == list(CATEGORY_NAMES)
        exported = shared_export.load_pt2(out)
    for height, width in ((64, 96), (96, 64), (64, 64), (200, 130)):
        images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8)] * 2
        sized = replace(job, images=images)
        assert "60 of 60 detections match" in shared_export.verify(sized, exported)


@pytest.mark.slow
def test_scores_below_the_threshold_give_empty_rows(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    assert commands.maskrcnn("export", checkpoint, out, "--score", "0.9") == 2
    assert "nothing was detected on 8 images with a score of 0.9 or more" in capsys.readouterr().err
    assert not out.exists()
