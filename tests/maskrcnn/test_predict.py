"""Tests of Mask R-CNN's prediction on images: detections as in the evaluation, JSON and drawings."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import commands
from checkpoints import CATEGORY_NAMES, write_checkpoint
from detection.checkpoint import class_outputs
from detection.config.settings import InputError
from detection.data import rle
from detection.evaluation import visualize
from detection.evaluation.visualize import Annotation
from detection.runtime.distributed import DistContext
from detection.synthetic import coco_scenes
from maskrcnn import pretrained, weights
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNEvalSource
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import make_model
from maskrcnn.train import predict as predict_batch

SINGLE_RANK = DistContext(0, 1, torch.device("cpu"))
SCORE_THRESHOLD = 0.28  # a few of four equally likely classes exceed it


def make_config(**changed):
    small = {"backbone": "resnet18", "freeze_at": 0, "freeze_batch_norm": False, "batch_norm_eps": 1e-5}
    sizes = {
        "min_image_size": 64,
        "max_image_size": 96,
        "anchor_sizes": (16, 32, 48, 64, 96),
        "input_format": "imagenet-rgb",
    }
    top_n = {"rpn_pre_nms_top_n_eval": 100, "rpn_post_nms_top_n_eval": 12, "max_detections": 6}
    return Config(dataset="toy", num_classes=4, **{**small, **sizes, **top_n, **changed})


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    """Checkpoint of a network with random weights, which yields many detections everywhere."""
    torch.manual_seed(0)
    config = make_config(score_threshold=SCORE_THRESHOLD)
    model = make_model(config)
    torch.nn.init.normal_(model.box_head.predictor.cls_score.weight, std=0.1)
    torch.nn.init.normal_(model.mask_head.predictor.mask_fcn_logits.weight, std=0.5)
    return write_checkpoint(tmp_path_factory.mktemp("network"), model, config)


def run_predict(capsys, *words):
    status = commands.maskrcnn("predict", *words, "--device", "cpu")
    return status, *capsys.readouterr()


def read_results(folder):
    return json.loads((folder / "detections.json").read_text())


def test_detections_match_the_evaluator(random_checkpoint, four_image_coco, tmp_path, capsys):
    folder = tmp_path / "out"
    val = four_image_coco / "val2017"
    status, _, err = run_predict(
        capsys, random_checkpoint, val, "--score", SCORE_THRESHOLD, "--folder", folder, "--batch-size", 2
    )
    assert (status, err) == (0, "")
    config = make_config(data_dir=four_image_coco, score_threshold=SCORE_THRESHOLD, eval_batch_size=1, num_workers=0)
    model = make_model(config)
    weights.load(model, config, random_checkpoint)
    evaluator = MaskRCNNEvaluator(config, SINGLE_RANK, predict_batch)
    data = MaskRCNNEvalSource(config, SINGLE_RANK)
    with torch.inference_mode():
        evaluator(model.eval(), data)
    boxes, masks = evaluator.coco_results().values()
    expected = {str(data.val.image_path(i)): [] for i in range(len(data.val))}
    path_of = dict(zip(data.val.image_ids.tolist(), expected, strict=True))
    for box, mask in zip(boxes, masks, strict=True):
        expected[path_of[box["image_id"]]].append((box, mask["segmentation"]))
    content = read_results(folder)
    assert sum(len(entry["detections"]) for entry in content["images"]) > len(expected)
    for entry in content["images"]:
        image_results = expected[entry["file"]]
        assert len(entry["detections"]) == len(image_results)
        for detection, (box, mask) in zip(entry["detections"], image_results, strict=True):
            assert detection["category_id"] == box["category_id"]
            assert detection["name"] == CATEGORY_NAMES[box["category_id"] - 1]
            assert detection["score"] == pytest.approx(box["score"], abs=1e-4)
            assert detection["bbox"] == pytest.approx(box["bbox"], abs=0.1)
            assert detection["segmentation"]["size"] == [entry["height"], entry["width"]]
            assert (rle.decode_mask(detection["segmentation"]) != rle.decode_mask(mask)).mean() < 1e-3
        assert (folder / entry["drawn"]).is_file()


def test_detections_do_not_depend_on_the_other_images(random_checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, size in (("a", (160, 120)), ("b", (120, 160)), ("c", (500, 40)), ("d", (160, 120))):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size).save(tmp_path / f"{name}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.open(tmp_path / "b.png").transpose(Image.Transpose.ROTATE_90)
    rotated.save(tmp_path / "rotated.png", exif=exif)
    inputs = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "rotated")]
    boxes = []
    for size in (1, 5):
        folder = tmp_path / f"by{size}"
        run_predict(
            capsys, random_checkpoint, *inputs, "--score", SCORE_THRESHOLD, "--batch-size", size, "--folder", folder
        )
        entries = read_results(folder)["images"]
        assert all(entry["detections"] for entry in entries)
        boxes.append([[detection["bbox"] for detection in entry["detections"][:5]] for entry in entries])
    for single, batched in zip(*boxes, strict=True):
        np.testing.assert_allclose(single, batched, atol=0.05)
    np.testing.assert_allclose(boxes[0][1], boxes[0][4], atol=0.05)
    assert boxes[0][0] != boxes[0][3]


def test_score_threshold_overrides_the_run(random_checkpoint, four_image_coco, tmp_path, capsys):
    (image, *_) = sorted((four_image_coco / "val2017").iterdir())

    def detections(score):
        assert run_predict(capsys, random_checkpoint, image, "--score", score, "--folder", tmp_path)[0] == 0
        return read_results(tmp_path)["images"][0]["detections"]

    everything = detections(0.1)  # below SCORE_THRESHOLD, the threshold of the run
    middle = (everything[2]["score"] + everything[3]["score"]) / 2
    assert detections(middle) == everything[:3]
    assert detections(0.9999) == []


def test_network_is_built_from_the_settings_in_its_checkpoint(random_checkpoint):
    network = pretrained.load(random_checkpoint, 0.5)
    assert (network.min_size_px, network.max_size_px) == (64, 96)
    assert [category.name for category in network.categories] == list(CATEGORY_NAMES)
    config = network.model.config
    assert (config.backbone, config.input_format) == ("resnet18", "imagenet-rgb")
    assert config.anchor_sizes == (16, 32, 48, 64, 96)
    assert (config.score_threshold, config.max_detections, config.num_classes) == (0.5, 6, 4)
    assert not network.model.training


def test_torchvision_checkpoint_gets_its_settings_and_coco_names(tmp_path):
    state = {"box_head.predictor.cls_score.bias": torch.zeros(81)}
    config = pretrained.resolve_config(weights.Weights(state, weights.TORCHVISION), 0.4, tmp_path)
    assert (config.variant, config.stride_in_1x1, config.input_format) == ("torchvision", False, "imagenet-rgb")
    assert (config.num_classes, config.score_threshold, config.min_image_size) == (81, 0.4, 800)
    expected = [(category.id, category.name) for category in coco_scenes.COCO_CATEGORIES]
    assert [(category.id, category.name) for category in class_outputs.coco_categories()] == expected


def test_checkpoint_without_settings_or_of_another_network_is_rejected(
    random_checkpoint, four_image_coco, tmp_path, capsys
):
    (image, *_) = (four_image_coco / "val2017").iterdir()
    content = torch.load(random_checkpoint, weights_only=True)
    del content["config"]
    torch.save(content, tmp_path / "bare.pt")
    torch.save({"model": {"backbone.x": torch.zeros(1)}}, tmp_path / "other.pt")
    for name, message in (
        ("bare.pt", "holds no settings of its network"),
        ("other.pt", "not the weights of a Mask R-CNN"),
    ):
        status, _, err = run_predict(capsys, tmp_path / name, image, "--folder", tmp_path / "out")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    shutil.copy(random_checkpoint, tmp_path / "cut.pt")
    with (tmp_path / "cut.pt").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(InputError, match="not a valid weights file"):
        pretrained.load(tmp_path / "cut.pt", 0.5)


@pytest.mark.parametrize("size", [(400, 300), (40, 30), (9000, 60)])
def test_mask_overlay_is_half_transparent(size):
    width, height = size
    pixels = np.zeros((height, width), dtype=bool, order="F")
    pixels[:, : width // 2] = True
    runs = np.diff(np.flatnonzero(np.diff(pixels.ravel("F"), prepend=0, append=0)), prepend=0)
    mask = rle.encode_rle(np.append(runs, pixels.size - runs.sum()), (height, width))
    assert (rle.decode_mask(mask) == pixels).all()
    box = (width * 0.9, height * 0.9, width * 0.95, height * 0.95)  # away from the mask
    drawn = np.asarray(
        visualize.draw_annotations(Image.new("RGB", size, (100, 150, 40)), [Annotation(box, 2, "", mask)]), dtype=int
    )
    inside, outside = (drawn[drawn.shape[0] // 3, drawn.shape[1] * part // 8] for part in (1, 5))
    blended = (np.array([100, 150, 40]) + visualize.label_color(2)) / 2
    np.testing.assert_allclose(inside, blended, atol=2)
    assert outside.tolist() == [100, 150, 40]
