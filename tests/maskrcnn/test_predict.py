"""Mask R-CNN's detections on pictures: as its evaluation finds them, as JSON and drawn."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from detection.checkpoint import checkpointer
from detection.config.settings import InputError, to_json
from detection.data import rle
from detection.evaluation import visualize
from detection.evaluation.visualize import Mark
from detection.runtime import sync_batch_norm
from detection.runtime.distributed import Ranks
from detection.synthetic import coco_scenes
from maskrcnn import predict, pretrained, weights
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNEvalData
from maskrcnn.evaluator import Evaluation
from maskrcnn.model import make_model
from maskrcnn.train import detect as detect_batch

NAMES = ("disc", "square", "triangle")
ALONE = Ranks(0, 1, torch.device("cpu"))
SCORE = 0.28  # of four classes that are as likely, a few are above


def settings(**changed):
    small = {"trunk": "resnet18", "freeze_at": 0, "freeze_batch_norm": False, "batch_norm_eps": 1e-5}
    sizes = {
        "min_image_size": 64,
        "max_image_size": 96,
        "anchor_sizes": (16, 32, 48, 64, 96),
        "input_format": "imagenet-rgb",
    }
    few = {"rpn_pre_nms_top_n_eval": 100, "rpn_post_nms_top_n_eval": 12, "max_detections": 6}
    return Config(dataset="toy", num_classes=4, **{**small, **sizes, **few, **changed})


@pytest.fixture(scope="module")
def any_network(tmp_path_factory):
    """The checkpoint of a network that has learnt nothing, and so sees much everywhere."""
    torch.manual_seed(0)
    config = settings(score_threshold=SCORE)
    model = make_model(config)
    torch.nn.init.normal_(model.box_head.predictor.cls_score.weight, std=0.1)
    torch.nn.init.normal_(model.mask_head.predictor.mask_fcn_logits.weight, std=0.5)
    return write(tmp_path_factory.mktemp("network"), model, config=to_json(config))


def write(folder, model, **extra):
    state = {
        "benchmark": "maskrcnn",
        "model": model.state_dict(),
        "batch_norm": sync_batch_norm.statistics(model).unsqueeze(0),
        "categories": [{"id": label, "name": name} for label, name in enumerate(NAMES, start=1)],
    }
    return checkpointer.save(folder, epoch=1, step=1, score=0.0, state=state | extra)


def detect(capsys, *words):
    status = predict.main([*map(str, words), "--device", "cpu"])
    return status, *capsys.readouterr()


def results(folder):
    return json.loads((folder / "detections.json").read_text())


def test_boxes_scores_and_masks_are_those_of_the_evaluation(any_network, handful, tmp_path, capsys):
    folder = tmp_path / "out"
    val = handful / "val2017"
    status, _, err = detect(capsys, any_network, val, "--score", SCORE, "--folder", folder, "--batch-size", 2)
    assert (status, err) == (0, "")
    config = settings(data_dir=handful, score_threshold=SCORE, eval_batch_size=1, num_workers=0)
    model = make_model(config)
    weights.load(model, config, any_network)
    evaluation = Evaluation(config, ALONE, detect_batch)
    data = MaskRCNNEvalData(config, ALONE)
    with torch.inference_mode():
        evaluation(model.eval(), data)
    boxes, masks = evaluation.results().values()
    wanted = {str(data.val.image_path(i)): [] for i in range(len(data.val))}
    path_of = dict(zip(data.val.image_ids.tolist(), wanted, strict=True))
    for box, mask in zip(boxes, masks, strict=True):
        wanted[path_of[box["image_id"]]].append((box, mask["segmentation"]))
    content = results(folder)
    assert sum(len(entry["detections"]) for entry in content["images"]) > len(wanted)
    for entry in content["images"]:
        there = wanted[entry["file"]]
        assert len(entry["detections"]) == len(there)
        for found, (box, mask) in zip(entry["detections"], there, strict=True):
            assert found["category_id"] == box["category_id"]
            assert found["name"] == NAMES[box["category_id"] - 1]
            assert found["score"] == pytest.approx(box["score"], abs=1e-4)
            assert found["bbox"] == pytest.approx(box["bbox"], abs=0.1)
            assert found["segmentation"]["size"] == [entry["height"], entry["width"]]
            assert (rle.bitmap(found["segmentation"]) != rle.bitmap(mask)).mean() < 1e-3
        assert (folder / entry["drawn"]).is_file()


def test_a_picture_is_answered_alike_beside_any_others(any_network, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, size in (("a", (160, 120)), ("b", (120, 160)), ("c", (500, 40)), ("d", (160, 120))):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size).save(tmp_path / f"{name}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(tmp_path / "b.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    inputs = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "turned")]
    found = []
    for size in (1, 5):
        folder = tmp_path / f"by{size}"
        detect(capsys, any_network, *inputs, "--score", SCORE, "--batch-size", size, "--folder", folder)
        entries = results(folder)["images"]
        assert all(entry["detections"] for entry in entries)
        found.append([[detection["bbox"] for detection in entry["detections"][:5]] for entry in entries])
    for alone, together in zip(*found, strict=True):
        np.testing.assert_allclose(alone, together, atol=0.05)
    np.testing.assert_allclose(found[0][1], found[0][4], atol=0.05)
    assert found[0][0] != found[0][3]


def test_detections_below_the_score_are_left_out_whatever_the_run_kept(any_network, handful, tmp_path, capsys):
    (picture, *_) = sorted((handful / "val2017").iterdir())

    def seen(score):
        assert detect(capsys, any_network, picture, "--score", score, "--folder", tmp_path)[0] == 0
        return results(tmp_path)["images"][0]["detections"]

    all_of_them = seen(0.1)  # below SCORE, with which the run was evaluated
    middle = (all_of_them[2]["score"] + all_of_them[3]["score"]) / 2
    assert seen(middle) == all_of_them[:3]
    assert seen(0.9999) == []


def test_the_network_is_made_by_the_settings_in_its_checkpoint(any_network):
    network = pretrained.load(any_network, 0.5)
    assert (network.min_size_px, network.max_size_px) == (64, 96)
    assert [category.name for category in network.categories] == list(NAMES)
    made = network.model.settings
    assert (made.trunk, made.pixels, made.anchor_sizes_px) == ("resnet18", "imagenet-rgb", (16, 32, 48, 64, 96))
    assert (made.score_threshold, made.max_detections, made.num_classes) == (0.5, 6, 4)
    assert not network.model.training


def test_torchvisions_checkpoint_takes_its_own_settings_and_cocos_names(tmp_path):
    state = {"box_head.predictor.cls_score.bias": torch.zeros(81)}
    config = pretrained.settings_of(weights.Weights(state, weights.TORCHVISION), 0.4, tmp_path)
    assert (config.variant, config.stride_in_1x1, config.input_format) == ("torchvision", False, "imagenet-rgb")
    assert (config.num_classes, config.score_threshold, config.min_image_size) == (81, 0.4, 800)
    wanted = [(category.id, category.name) for category in coco_scenes.COCO]
    assert [(category.id, category.name) for category in pretrained.coco_categories()] == wanted


def test_a_checkpoint_without_settings_or_of_another_network_is_refused(any_network, handful, tmp_path, capsys):
    (picture, *_) = (handful / "val2017").iterdir()
    content = torch.load(any_network, weights_only=True)
    del content["config"]
    torch.save(content, tmp_path / "bare.pt")
    torch.save({"model": {"backbone.x": torch.zeros(1)}}, tmp_path / "other.pt")
    for name, message in (("bare.pt", "does not say which settings"), ("other.pt", "not the weights of a Mask R-CNN")):
        status, _, err = detect(capsys, tmp_path / name, picture, "--folder", tmp_path / "out")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    shutil.copy(any_network, tmp_path / "cut.pt")
    with (tmp_path / "cut.pt").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(InputError, match="not a whole file"):
        pretrained.load(tmp_path / "cut.pt", 0.5)


@pytest.mark.parametrize("size", [(400, 300), (40, 30), (9000, 60)])
def test_a_mask_is_seen_and_seen_through(size):
    width, height = size
    pixels = np.zeros((height, width), dtype=bool, order="F")
    pixels[:, : width // 2] = True
    runs = np.diff(np.flatnonzero(np.diff(pixels.ravel("F"), prepend=0, append=0)), prepend=0)
    mask = rle.compress(np.append(runs, pixels.size - runs.sum()), (height, width))
    assert (rle.bitmap(mask) == pixels).all()
    box = (width * 0.9, height * 0.9, width * 0.95, height * 0.95)  # out of the way
    drawn = np.asarray(visualize.draw(Image.new("RGB", size, (100, 150, 40)), [Mark(box, 2, "", mask)]), dtype=int)
    inside, outside = (drawn[drawn.shape[0] // 3, drawn.shape[1] * part // 8] for part in (1, 5))
    half_way = (np.array([100, 150, 40]) + visualize.colour(2)) / 2
    np.testing.assert_allclose(inside, half_way, atol=2)
    assert outside.tolist() == [100, 150, 40]
