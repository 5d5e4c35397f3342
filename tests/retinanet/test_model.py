import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detection.checkpoint.weights import Weights
from retinanet import weights
from retinanet.anchors import OCTAVE_SCALES, RATIOS, make_anchors, num_anchors
from retinanet.loss import retinanet_loss
from retinanet.model import make_model
from retinanet.postprocess import detect
from retinanet.resize import normalize_and_resize
from tiny_retinanet import make_config

CPU = torch.device("cpu")
SIZE_PX = 128


@pytest.fixture(scope="module")
def networks():
    """Our network and torchvision's detector around the same one, with random heads that detect something."""
    config = make_config()
    torch.manual_seed(0)
    ours = make_model(config).eval()
    torch.nn.init.normal_(ours.head.classification_head.cls_logits.weight, std=0.1)
    torch.nn.init.zeros_(ours.head.classification_head.cls_logits.bias)
    ours.backbone.out_channels = config.pyramid_channels  # torchvision's detector asks for it
    sizes = tuple(tuple(int(size * scale) for scale in OCTAVE_SCALES) for size in config.anchor_sizes)

    class Levels(torch.nn.Module):
        out_channels = config.pyramid_channels

        def __init__(self):
            super().__init__()
            self.levels = ours.backbone

        def forward(self, images):
            return dict(enumerate(self.levels(images)))

    theirs = RetinaNet(
        Levels(),
        config.num_outputs,
        SIZE_PX,
        SIZE_PX,
        anchor_generator=AnchorGenerator(sizes, (RATIOS,) * 5),
        head=ours.head,
        topk_candidates=1000,
        detections_per_img=300,
    )
    return ours, theirs, make_anchors(SIZE_PX, SIZE_PX, CPU, config.anchor_sizes)


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (2, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_settings_of_the_pyramid_and_the_heads_reach_the_network():
    config = make_config("--pyramid-channels", "32", "--head-init-std", "0.06")
    state = make_model(config).state_dict()
    for branch in ("classification", "regression"):
        weight = state[f"head.{branch}_head.conv.0.0.weight"]
        assert weight.shape[:2] == (32, 32)
        assert weight.std().item() == pytest.approx(0.06, rel=0.05)
    assert state["head.classification_head.cls_logits.weight"].std().item() == pytest.approx(0.01, rel=0.05)


def normalized(images):
    return normalize_and_resize(images, torch.full((2, 2), SIZE_PX), None, SIZE_PX)


def test_losses_and_gradients_equal_torchvisions(networks, images):
    ours, theirs, anchors = networks
    boxes = torch.tensor([[[10.0, 20, 60, 70], [50, 50, 120, 90]], [[5, 5, 25, 30], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 2], [1, -1]])
    outputs = ours(normalized(images))
    losses = retinanet_loss(*outputs, anchors, boxes, labels, labels >= 0).mean(dim=0)
    losses.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()

    theirs.train()
    ours.eval()
    targets = [
        {"boxes": image_boxes[valid], "labels": image_labels[valid]}
        for image_boxes, image_labels, valid in zip(boxes, labels, labels >= 0, strict=True)
    ]
    theirs.backbone.eval()
    expected = theirs(list(images.float() / 255), targets)
    sum(expected.values()).backward()
    torch.testing.assert_close(losses[0], expected["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], expected["bbox_regression"], rtol=1e-5, atol=0)
    for name, parameter in ours.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        assert error < 1e-3, name
    ours.zero_grad()


def test_detections_equal_torchvisions(networks, images):
    ours, theirs, anchors = networks
    theirs.eval()
    with torch.inference_mode():
        actual = detect(ours(normalized(images)), anchors, (SIZE_PX, SIZE_PX))
        expected = theirs(list(images.float() / 255))
    for image, detections in enumerate(expected):
        rows = actual.batch_index == image
        assert len(detections["labels"]) > 10
        assert (actual.labels[rows] - 1).tolist() == detections["labels"].tolist()
        torch.testing.assert_close(actual.scores[rows], detections["scores"])
        torch.testing.assert_close(actual.boxes_xyxy[rows], detections["boxes"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size_hw", [(128, 128), (129, 250), (800, 800)])
def test_each_level_has_an_anchor_for_each_output(size_hw):
    assert sum(map(len, make_anchors(*size_hw, CPU))) == num_anchors(*size_hw)


def test_frozen_parts_get_no_gradient():
    model = make_model(make_config("--freeze-at", "1"))
    frozen = {name.split(".")[2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}


def to_reference_names(state):
    """Return the state with the names of the MLPerf reference and of older files of torchvision."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "head" and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        elif parts[1] == "fpn" and parts[2] != "extra_blocks":
            del parts[4]
        renamed[".".join(parts)] = tensor
    return renamed


@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_of_the_reference_load(tmp_path, wrapped):
    config = make_config()
    model = make_model(config)
    state = {k: v for k, v in to_reference_names(model.state_dict()).items() if "num_batches_tracked" not in k}
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "reference.pth")
    restored = make_model(config)
    assert weights.load(restored, config, tmp_path / "reference.pth").origin == "the MLPerf reference"
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), restored.state_dict().values(), strict=True)
    )


def test_torchvisions_coco_head_is_reduced_to_the_categories_in_use():
    name = "head.classification_head.cls_logits.bias"
    state = {name: torch.arange(9.0 * 91), name.replace("bias", "weight"): torch.zeros(9 * 91, 1, 1, 1)}
    reduced = weights.drop_unused_coco_classes(Weights(state, "torchvision"))
    bias = reduced.state[name].view(9, 80)
    assert bias[0, :12].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert bias[1, 0] == 92
    assert [category.name for category in reduced.categories][::79] == ["person", "toothbrush"]
