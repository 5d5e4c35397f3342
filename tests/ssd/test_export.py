import json
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import commands
from detection.evaluation import export
from detection.runtime.device import CAN_COMPILE
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.export import OUTPUTS
from ssd.export_module import ExportableSSD
from ssd.model import SSD300
from ssd.postprocess import detect
from tiny_ssd import predictions, square_detector, write_checkpoint

SETTINGS = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 200}


class PostprocessOnly(ExportableSSD):
    """Exportable graph of the postprocessing, without the network."""

    def forward(self, deltas, logits):
        return self.detect(deltas, logits)


def count_matches(outputs, deltas, logits, atol=0.0, **settings):
    expected = detect(deltas, logits, make_anchors(), **(SETTINGS | settings))
    boxes, labels, scores = outputs
    for image in range(len(deltas)):
        in_image = expected.batch_index == image
        count = int(in_image.sum())
        assert int((scores[image] > 0).sum()) == int((labels[image] > 0).sum()) == count
        assert torch.equal(labels[image, :count], expected.labels[in_image])
        torch.testing.assert_close(boxes[image, :count], expected.boxes_xyxy[in_image], rtol=0, atol=atol)
        torch.testing.assert_close(scores[image, :count], expected.scores[in_image], rtol=0, atol=atol)
    return len(expected.scores)


@pytest.mark.parametrize("settings", [{}, {"nms_threshold": 0.3, "max_detections": 17}, {"score_threshold": 0.3}])
def test_fixed_shape_detections_match_detect(settings):
    module = PostprocessOnly(nn.Identity(), **(SETTINGS | settings))
    for seed, peak in ((0, 6.0), (1, 4.0), (2, 3.0)):
        deltas, logits = predictions(seed, peak=peak)
        assert count_matches(module(deltas, logits), deltas, logits, **settings) > 0


def test_ties_and_ious_equal_to_the_threshold_match_detect():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.zeros(2, NUM_ANCHORS, 4)  # the anchors themselves: many pairs have the same IoU
    logits = torch.randint(0, 3, (2, NUM_ANCHORS, 4), generator=generator).float()
    module = PostprocessOnly(nn.Identity(), **SETTINGS)
    assert count_matches(module(deltas, logits), deltas, logits) > 0


def test_scores_below_the_threshold_give_empty_rows():
    deltas, logits = predictions(0, peak=100.0)
    logits[..., 1:] -= 100
    boxes, labels, scores = PostprocessOnly(nn.Identity(), **SETTINGS)(deltas, logits)
    assert boxes.shape == (2, 200, 4)
    assert labels.sum() == scores.sum() == 0


@pytest.mark.skipif(not CAN_COMPILE, reason="torch before 2.6 cannot export it")
def test_onnx_postprocessing_matches_detect_for_any_number_of_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    inputs = predictions(0, peak=4.0)
    dynamic = {0: torch.export.Dim("batch")}
    module = PostprocessOnly(nn.Identity(), **SETTINGS).eval()
    program = torch.export.export(module, inputs, dynamic_shapes=(dynamic, dynamic))
    export.write_onnx(program, tmp_path / "module.onnx", ["deltas", "logits"], OUTPUTS, {})
    session = onnxruntime.InferenceSession(tmp_path / "module.onnx", providers=["CPUExecutionProvider"])
    ties = torch.zeros(1, NUM_ANCHORS, 4), torch.zeros(1, NUM_ANCHORS, 4)
    ties[1][:, ::3, 2] = 1.0
    for deltas, logits in (predictions(3, batch=3, peak=3.0), predictions(4, batch=1), ties):
        outputs = session.run(None, {"deltas": deltas.numpy(), "logits": logits.numpy()})
        assert count_matches([torch.from_numpy(output) for output in outputs], deltas, logits, atol=1e-6) > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), square_detector())


@pytest.mark.slow
def test_pt2_export_is_verified_and_runs_without_the_program(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "model.pt2"
    assert commands.ssd("export", str(checkpoint), str(out), "--score", "0.5") == 0
    assert "8 of 8 detections match" in capsys.readouterr().out
    files = {"categories": ""}
    program = torch.export.load(out, extra_files=files)
    assert [category["name"] for category in json.loads(files["categories"])] == ["disc", "square", "triangle"]
    boxes, labels, scores = program.module()(torch.zeros(5, 3, 300, 300, dtype=torch.uint8))
    assert boxes.shape == (5, 200, 4)
    assert labels[:, :2].tolist() == [[2, 0]] * 5
    torch.testing.assert_close(scores[:, 0], torch.full((5,), 0.9))
    torch.testing.assert_close(boxes[:, 0], make_anchors().boxes_xyxy[-4].expand(5, 4))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [0, 2])
def test_onnx_export_matches_the_checkpoint(tmp_path, capsys, batch_size):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    torch.manual_seed(1)
    path = write_checkpoint(tmp_path, SSD300(4))
    out = tmp_path / "model.onnx"
    assert commands.ssd("export", str(path), str(out), "--batch-size", str(batch_size)) == 0
    assert "of 1600 detections match" in capsys.readouterr().out  # a few depend on the last bit of a score
    assert [file.name for file in tmp_path.iterdir() if "model" in file.name] == ["model.onnx"]
    model = onnx.load(out)
    onnx.checker.check_model(model)
    (metadata,) = (entry for entry in model.metadata_props if entry.key == "categories")
    assert json.loads(metadata.value)[0] == {"id": 10, "name": "disc"}


@pytest.fixture
def fake_export(monkeypatch):
    """Replace the slow export: the file is empty, and the network itself, with shifted boxes, stands for it."""
    models = []
    monkeypatch.setattr(export.ExportJob, "trace", lambda job: models.append(job.module.eval()))
    monkeypatch.setattr(export, "write_pt2", lambda program, path, metadata: path.touch())

    def set_offset(offset):
        def load_pt2(path):
            def run(images):
                boxes, labels, scores = models[0](images)
                return boxes + offset, labels, scores

            return run

        monkeypatch.setattr(export, "load_pt2", load_pt2)

    return set_offset


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("L", (20, 30)).save(path)
    return path


def test_mismatching_export_is_deleted(checkpoint, tmp_path, capsys, fake_export, image):
    fake_export(0.01)
    argv = [str(checkpoint), str(tmp_path / "out/model.pt2"), "--images", str(image)]
    assert commands.ssd("export", *argv) == 2
    assert "0 of 1 detections match" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    fake_export(1e-6)
    assert commands.ssd("export", *argv) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]


def test_verification_without_detections_is_rejected(checkpoint, tmp_path, capsys, fake_export, image):
    fake_export(0.0)
    out = tmp_path / "out/model.pt2"
    assert commands.ssd("export", str(checkpoint), str(out), "--images", str(image), "--score", "0.95") == 2
    assert "nothing was detected on 1 images" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_torch_that_cannot_trace_the_network_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch._dynamo.exc.Unsupported("call_method item\n\nfrom user code: ...")

    monkeypatch.setattr(torch.export, "export", fail)
    assert commands.ssd("export", checkpoint, tmp_path / "out/model.pt2") == 2
    err = capsys.readouterr().err
    assert f"torch {torch.__version__} cannot export this network (call_method item). Use a newer torch" in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_each_error_is_one_message_with_exit_status_2(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for argv, message in (
        ((checkpoint, tmp_path / "model.onnx"), "pip install '.[export]'"),
        ((checkpoint, tmp_path / "model.pth"), "should end in .onnx or .pt2"),
        ((tmp_path / "absent.pt", tmp_path / "model.pt2"), "absent.pt: no such file. Name a checkpoint."),
        (
            (checkpoint, tmp_path / "model.pt2", "--images", tmp_path / "absent.png"),
            "absent.png: this image cannot be read",
        ),
    ):
        assert commands.ssd("export", *argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
