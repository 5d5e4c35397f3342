"""Tests of the export: the file's detections are those of the program."""

import json

import pytest
import torch

import commands
from detection.checkpoint import checkpointer
from detection.config.settings import to_json
from detection.evaluation import export as shared_export
from detection.runtime import sync_batch_norm
from maskrcnn import export, pretrained
from maskrcnn.config import Config
from maskrcnn.model import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint of a small network with random weights, which yields 100 detections per image."""
    torch.manual_seed(0)
    config = Config(
        dataset="toy",
        num_classes=4,
        backbone="resnet18",
        freeze_batch_norm=False,
        batch_norm_eps=1e-5,
        input_format="imagenet-rgb",
        min_image_size=96,
        max_image_size=128,
        anchor_sizes=(8, 16, 32, 64, 96),
        rpn_pre_nms_top_n_eval=100,
        rpn_post_nms_top_n_eval=60,
    )
    model = make_model(config)
    torch.nn.init.normal_(model.mask_head.predictor.mask_fcn_logits.weight, std=0.5)
    state = {
        "benchmark": "maskrcnn",
        "model": model.state_dict(),
        "batch_norm": sync_batch_norm.running_stats(model).unsqueeze(0),
        "categories": [{"id": label, "name": name} for label, name in enumerate("abc", start=1)],
        "config": to_json(config),
    }
    return checkpointer.save(tmp_path_factory.mktemp("run"), epoch=1, step=1, score=0.0, state=state)


def check_sizes(checkpoint, exported):
    """Compare images of several sizes, with and without detections."""
    model = pretrained.load(checkpoint, None).model
    generator = torch.Generator().manual_seed(1)
    num_detections = []
    for height, width in ((96, 128), (128, 96), (30, 103)):
        images = [torch.randint(0, 256, (3, height, width - 7), dtype=torch.uint8, generator=generator)] * 2
        assert "detections match" in export.verify_export(model, images, 0, exported)
        sizes_hw = export.stack_sizes(images)
        boxes, labels, scores, masks = exported(export.pad_images(images), sizes_hw)
        num_detections += (labels > 0).sum(dim=1).tolist()
        unused = labels == 0
        assert not any(part[unused].any() for part in (boxes, scores, masks))
    return num_detections


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_matches_the_checkpoint_at_any_size(checkpoint, tmp_path, capsys, suffix):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    out = tmp_path / f"model.{suffix}"
    assert commands.maskrcnn("export", str(checkpoint), str(out)) == 0
    assert "verified on 8 images" in capsys.readouterr().out
    if suffix == "onnx":
        exported = shared_export.load_onnx(out, ["images", "sizes_hw"], export.OUTPUTS)
    else:
        files = {"categories": ""}
        torch.export.load(out, extra_files=files)
        assert [category["name"] for category in json.loads(files["categories"])] == ["a", "b", "c"]
        exported = shared_export.load_pt2(out)
    assert set(check_sizes(checkpoint, exported)) == {100}


@pytest.mark.slow
def test_scores_below_the_threshold_give_empty_rows(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    assert commands.maskrcnn("export", str(checkpoint), str(out), "--score", "0.9") == 2
    assert "nothing was detected on 8 images with a score of 0.9 or more" in capsys.readouterr().err
    assert not out.exists()
