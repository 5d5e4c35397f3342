import json
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from ssd import export
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.export_module import Detector
from ssd.model import SSD300
from ssd.postprocess import detect
from tiny_ssd import predictions, sure_of_one_square, write_checkpoint

RULES = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 200}


class FromPredictions(Detector):
    """The part behind the network alone."""

    def forward(self, deltas, logits):
        return self.detect(deltas, logits)


def agrees(answer, deltas, logits, atol=0.0, **rules):
    wanted = detect(deltas, logits, make_anchors(), **(RULES | rules))
    boxes, labels, scores = answer
    for image in range(len(deltas)):
        mine = wanted.images == image
        count = int(mine.sum())
        assert int((scores[image] > 0).sum()) == int((labels[image] > 0).sum()) == count
        assert torch.equal(labels[image, :count], wanted.labels[mine])
        torch.testing.assert_close(boxes[image, :count], wanted.boxes_xyxy[mine], rtol=0, atol=atol)
        torch.testing.assert_close(scores[image, :count], wanted.scores[mine], rtol=0, atol=atol)
    return len(wanted.scores)


@pytest.mark.parametrize("rules", [{}, {"nms_threshold": 0.3, "max_detections": 17}, {"score_threshold": 0.3}])
def test_detections_in_fixed_shapes_are_those_of_detect(rules):
    part = FromPredictions(nn.Identity(), **(RULES | rules))
    for seed, peak in ((0, 6.0), (1, 4.0), (2, 3.0)):
        deltas, logits = predictions(seed, peak=peak)
        assert agrees(part(deltas, logits), deltas, logits, **rules) > 0


def test_equal_scores_and_overlaps_of_exactly_the_limit_are_treated_alike():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.zeros(2, NUM_ANCHORS, 4)  # the anchors themselves: many overlap by the same
    logits = torch.randint(0, 3, (2, NUM_ANCHORS, 4), generator=generator).float()
    part = FromPredictions(nn.Identity(), **RULES)
    assert agrees(part(deltas, logits), deltas, logits) > 0


def test_nothing_above_the_threshold_gives_empty_rows():
    deltas, logits = predictions(0, peak=100.0)
    logits[..., 1:] -= 100
    boxes, labels, scores = FromPredictions(nn.Identity(), **RULES)(deltas, logits)
    assert boxes.shape == (2, 200, 4)
    assert labels.sum() == scores.sum() == 0


def test_onnx_suppresses_as_detect_does_for_any_number_of_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    inputs = predictions(0, peak=4.0)
    dynamic = {0: torch.export.Dim("batch")}
    part = FromPredictions(nn.Identity(), **RULES).eval()
    program = torch.export.export(part, inputs, dynamic_shapes=(dynamic, dynamic))
    export.save_onnx(program, tmp_path / "part.onnx", ["deltas", "logits"], {})
    session = onnxruntime.InferenceSession(tmp_path / "part.onnx", providers=["CPUExecutionProvider"])
    ties = torch.zeros(1, NUM_ANCHORS, 4), torch.zeros(1, NUM_ANCHORS, 4)
    ties[1][:, ::3, 2] = 1.0
    for deltas, logits in (predictions(3, batch=3, peak=3.0), predictions(4, batch=1), ties):
        answer = session.run(None, {"deltas": deltas.numpy(), "logits": logits.numpy()})
        assert agrees([torch.from_numpy(part) for part in answer], deltas, logits, atol=1e-6) > 0


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("square"), sure_of_one_square())


@pytest.mark.slow
def test_pt2_is_written_checked_and_answers_by_itself(square, tmp_path, capsys):
    out = tmp_path / "new" / "model.pt2"
    assert export.main([str(square), str(out), "--score", "0.5"]) == 0
    assert "8 of 8 detections are alike" in capsys.readouterr().out
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
def test_onnx_answers_as_the_checkpoint_does(tmp_path, capsys, batch_size):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    torch.manual_seed(1)
    path = write_checkpoint(tmp_path, SSD300(4))
    out = tmp_path / "model.onnx"
    assert export.main([str(path), str(out), "--batch-size", str(batch_size)]) == 0
    assert "of 1600 detections are alike" in capsys.readouterr().out  # a few hang on the last bit of a score
    assert [file.name for file in tmp_path.iterdir() if "model" in file.name] == ["model.onnx"]
    model = onnx.load(out)
    onnx.checker.check_model(model)
    (metadata,) = (entry for entry in model.metadata_props if entry.key == "categories")
    assert json.loads(metadata.value)[0] == {"id": 10, "name": "disc"}


@pytest.fixture
def not_traced(monkeypatch):
    """Export without its minutes: the file holds nothing, and what answers for it is the network itself, shifted."""
    kept = []
    monkeypatch.setattr(export, "trace", lambda detector, batch_size: kept.append(detector))
    monkeypatch.setattr(export, "write_pt2", lambda program, network, path: path.touch())

    def shift(by):
        def open_file(path):
            def answer(images):
                boxes, labels, scores = kept[0](images)
                return boxes + by, labels, scores

            return answer

        monkeypatch.setattr(export, "open_pt2", open_file)

    return shift


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("L", (20, 30)).save(path)
    return path


def test_an_export_that_answers_otherwise_is_not_kept(square, tmp_path, capsys, not_traced, picture):
    not_traced(0.01)
    words = [str(square), str(tmp_path / "out/model.pt2"), "--images", str(picture)]
    assert export.main(words) == 2
    assert "0 of 1 detections are alike" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    not_traced(1e-6)
    assert export.main(words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]


def test_a_check_that_sees_nothing_proves_nothing(square, tmp_path, capsys, not_traced, picture):
    not_traced(0.0)
    out = tmp_path / "out/model.pt2"
    assert export.main([str(square), str(out), "--images", str(picture), "--score", "0.95"]) == 2
    assert "nothing was detected on the 1 pictures" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_mistakes_are_one_message_and_2(square, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for words, message in (
        ((square, tmp_path / "model.onnx"), "pip install '.[export]'"),
        ((square, tmp_path / "model.pth"), "should end in .onnx or .pt2"),
        ((tmp_path / "absent.pt", tmp_path / "model.pt2"), "absent.pt: no such file. Name a checkpoint."),
        (
            (square, tmp_path / "model.pt2", "--images", tmp_path / "absent.png"),
            "absent.png: this picture cannot be read",
        ),
    ):
        assert export.main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
