"""Tests of Mask R-CNN, which matches torchvision's losses and detections with `--variant torchvision`."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from detection.checkpoint import weights as files
from detection.config.settings import InputError
from detection.engine.optim import freeze_batch_norm
from detection.nn import box_coder, matcher
from detection.nn.resnet import conv_frozen_bn
from detection.runtime import device
from maskrcnn import masks, rpn, weights
from maskrcnn.anchors import make_anchors
from maskrcnn.backbone import make_backbone, normalize
from maskrcnn.config import TORCHVISION_PRESET, load
from maskrcnn.model import LOSS_NAMES, MaskRCNN, Targets, make_model

CPU = torch.device("cpu")
HEIGHT, WIDTH = 128, 192  # multiples of 64: at other sizes, torchvision's anchors of P6 have another stride
SMALL = ("--backbone", "resnet18", "--freeze-at", "0", "--rpn-post-nms-top-n-per-image", "25")
SMALL += ("--box-batch-size-per-image", "32")
ALL = "100000"  # more samples than anchors, so that sampling takes all
TORCHVISION = ("--variant", "torchvision", "--rpn-batch-size-per-image", ALL, "--box-batch-size-per-image", ALL)
PROPOSALS = 200  # per image, of about 1,500 that remain after suppression
TORCHVISION += ("--rpn-post-nms-top-n-per-image", str(PROPOSALS), "--rpn-post-nms-top-n-eval", str(PROPOSALS))
BOXES = ([[10, 20, 80, 100], [90, 30, 180, 120]], [[30, 10, 150, 90]])
LABELS = ([1, 3], [2])


def make_config(*flags):
    return load(["--num-classes", "5", *flags], {}).config


def diamond(box):
    x0, y0, x1, y1 = box
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.tensor([[x, y0, 1], [x0, y, 1], [x, y1, 1], [x1, y, 1], [x, y0, 1]], dtype=torch.float32)


def make_scene():
    """Return two images, their sizes, and their targets for our model and torchvision's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    boxes, labels, vertices = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 5, 3)
    torchvision_targets = []
    for image in range(2):
        gt_boxes, gt_labels = torch.tensor(BOXES[image], dtype=torch.float32), torch.tensor(LABELS[image])
        count = len(gt_boxes)
        boxes[image, :count], labels[image, :count] = gt_boxes, gt_labels
        for number, box in enumerate(BOXES[image]):
            vertices[image, number] = diamond(box)
        whole = torch.tensor([0.0, 0.0, WIDTH, WIDTH]).expand(count, 4)
        bitmaps = masks.rasterize_polygons(vertices[image, :count], whole, WIDTH)[:, :HEIGHT].to(torch.uint8)
        torchvision_targets.append({"boxes": gt_boxes, "labels": gt_labels, "masks": bitmaps})
    targets = Targets(boxes, labels, vertices, torch.tensor([1, 2]))
    return images, torch.tensor([[HEIGHT, WIDTH]] * 2), targets, torchvision_targets


def freeze(module, generator):
    """Replace every batch norm by a frozen one with random statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=1e-5)
            for buffer, low in ((frozen.weight, 0.3), (frozen.running_var, 0.5)):
                buffer.copy_(torch.rand(child.num_features, generator=generator) * 0.5 + low)
            for buffer in (frozen.bias, frozen.running_mean):
                buffer.copy_(torch.randn(child.num_features, generator=generator) * 0.1)
            setattr(module, name, frozen)
        else:
            freeze(child, generator)


@pytest.fixture(scope="module")
def torchvision_model():
    """torchvision's model with random weights that yield detections; it samples every box."""
    torch.manual_seed(6)  # of the backbone; with this seed, no two scores are so close that rounding could swap them
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=HEIGHT,
        max_size=256,
        rpn_post_nms_top_n_train=PROPOSALS,
        rpn_post_nms_top_n_test=PROPOSALS,
        rpn_batch_size_per_image=int(ALL),
        box_batch_size_per_image=int(ALL),
    )
    generator = torch.Generator().manual_seed(1)
    freeze(model, generator)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone.body"):
            scale = 0.4 if "cls_score" in name else 0.2 if "bbox_pred" in name else 0.02
            parameter.data.normal_(0, scale, generator=generator)
    return model


@pytest.fixture(scope="module")
def our_model(torchvision_model, tmp_path_factory):
    """Our model with the same weights, loaded from a file."""
    path = tmp_path_factory.mktemp("weights") / "torchvision.pth"
    torch.save(torchvision_model.state_dict(), path)
    config = make_config(*TORCHVISION)
    model = make_model(config)
    assert weights.load(model, config, path).origin == "torchvision"
    freeze_batch_norm(model)
    return model


@pytest.fixture(scope="module")
def losses(our_model, torchvision_model):
    """The five losses of our model and torchvision's; computes the gradients of both."""
    images, sizes_hw, targets, torchvision_targets = make_scene()
    our_model.train()
    freeze_batch_norm(our_model)
    torchvision_model.train()
    for model in (our_model, torchvision_model):
        model.zero_grad()
    expected = torchvision_model([image / 255 for image in images], torchvision_targets)
    sum(expected.values()).backward()
    actual = our_model(images, sizes_hw, targets)
    actual.sum().backward()
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    return actual.detach(), torch.stack([expected[name].detach() for name in names])


def test_losses_match_torchvision(losses):
    actual, expected = losses
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert (actual > 0).all()


def test_gradients_match_torchvision(losses, our_model, torchvision_model):
    expected = weights.from_torchvision({name: p.grad for name, p in torchvision_model.named_parameters()})
    num_compared = 0
    for name, parameter in our_model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 3e-3, name  # float32 through fifty layers: 0.0012 with torch 2.4
            num_compared += 1
    assert num_compared > 60
    assert all(
        p.grad is None
        for n, p in our_model.named_parameters()
        if n.startswith(("backbone.body.conv1", "backbone.body.layer1"))
    )


def test_detections_match_torchvision(our_model, torchvision_model):
    images, sizes_hw, _, _ = make_scene()
    our_model.eval()
    torchvision_model.eval()
    with torch.no_grad():
        expected = torchvision_model([image / 255 for image in images])
        actual = our_model(images, sizes_hw)
    for image, theirs in enumerate(expected):
        count = len(theirs["scores"])
        assert count > 10
        assert (actual.labels[image] > 0).sum() == count
        torch.testing.assert_close(actual.scores[image, :count], theirs["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual.boxes_xyxy[image, :count], theirs["boxes"], rtol=1e-4, atol=1e-2)
        assert torch.equal(actual.labels[image, :count], theirs["labels"])
        x0, y0, x1, y1 = theirs["boxes"][0].round().int().tolist()
        mask_mean = theirs["masks"][0, 0, y0:y1, x0:x1].mean()
        assert abs(actual.masks[image, 0].mean() - mask_mean) < 0.05


@pytest.mark.gpu
def test_device_losses_and_detections_match_the_cpu(our_model):
    accelerator = device.select_device("auto", local_rank=0)
    assert accelerator.type != "cpu"
    images, sizes_hw, targets, _ = make_scene()
    device_model = make_model(make_config(*TORCHVISION)).to(accelerator)
    device_model.load_state_dict(our_model.state_dict())
    freeze_batch_norm(our_model.train())
    freeze_batch_norm(device_model.train())
    device_targets = Targets(*(tensor.to(accelerator) for tensor in targets))
    actual = device_model(images.to(accelerator), sizes_hw.to(accelerator), device_targets).cpu()
    torch.testing.assert_close(actual, our_model(images, sizes_hw, targets), rtol=1e-2, atol=1e-4)
    with torch.no_grad():
        scores = device_model.eval()(images.to(accelerator), sizes_hw.to(accelerator)).scores.cpu()
        expected = our_model.eval()(images, sizes_hw).scores
        torch.testing.assert_close(scores[:, :5], expected[:, :5], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("flags", [(), pytest.param(("--variant", "torchvision"), marks=pytest.mark.slow)])
def test_overfits_one_batch(flags):
    config = make_config(*SMALL, "--no-freeze-batch-norm", "--batch-norm-eps", "1e-5", *flags)
    torch.manual_seed(0)
    model = make_model(config).train()
    images, sizes_hw, targets, _ = make_scene()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    losses = []
    for _ in range(7):
        loss = model(images, sizes_hw, targets)
        assert loss.shape == (len(LOSS_NAMES),)
        losses.append(float(loss.detach().sum()))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_images_without_objects_give_every_weight_a_gradient():
    """DistributedDataParallel waits for the gradient of every parameter."""
    model = make_model(make_config(*SMALL))
    model.train()
    images, sizes_hw, _, _ = make_scene()
    empty = Targets(
        torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, 4), torch.arange(2)
    )
    freeze_batch_norm(model)
    losses = model(images, sizes_hw, empty)
    losses.sum().backward()
    assert losses[LOSS_NAMES.index("mask")] == 0
    assert losses[LOSS_NAMES.index("box")] == 0
    assert torch.isfinite(losses).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_legacy_anchors_match_detectron():
    anchors = make_anchors(64, 64, CPU, legacy=True)
    # Detectron's generate_anchors(4, 32, (0.5, 1, 2)): the corners of the first cell of P2.
    expected = [[-22.0, -10.0, 25.0, 13.0], [-14.0, -14.0, 17.0, 17.0], [-10.0, -22.0, 13.0, 25.0]]
    torch.testing.assert_close(anchors[:3], torch.tensor(expected))
    assert len(anchors) == 3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)


@pytest.mark.parametrize("legacy", [False, True])
def test_decode_inverts_encode(legacy):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 50, 2, generator=generator) * 500
    boxes, base = torch.cat([corners, corners + 5 + 200 * torch.rand(2, 50, 2, generator=generator)], dim=2)
    deltas = box_coder.encode(boxes, base, box_coder.BOX_HEAD_WEIGHTS, legacy=legacy)
    decoded = box_coder.decode(deltas, base, box_coder.BOX_HEAD_WEIGHTS, legacy=legacy)
    torch.testing.assert_close(decoded, boxes, rtol=1e-4, atol=1e-2)


def test_legacy_box_includes_its_last_pixel():
    box = torch.tensor([[2.0, 3.0, 11.0, 7.0]])
    assert box_coder.widths_heights(box, legacy=True).tolist() == [[10.0, 5.0]]
    assert box_coder.widths_heights(box, legacy=False).tolist() == [[9.0, 4.0]]
    below = torch.tensor([[2.0, 8.0, 11.0, 12.0]])  # starts at the next row of pixels: adjacent, without overlap
    assert box_coder.pairwise_iou(box, below - torch.tensor([0, 1, 0, 1.0]), legacy=True).item() == pytest.approx(
        10 / 90
    )
    assert box_coder.pairwise_iou(box, below, legacy=True).item() == 0
    clipped = box_coder.clip(torch.tensor([[-5.0, 2.0, 60.0, 90.0]]), torch.tensor([[40, 50]]), legacy=True)
    assert clipped.tolist() == [[0.0, 2.0, 49.0, 39.0]]


def test_low_quality_matches_give_every_object_an_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    gt_boxes = torch.tensor([[19.0, 0, 22, 3], [0, 0, 0, 0]])  # the second is padding
    index, match_labels = matcher.match(
        anchors,
        gt_boxes,
        torch.tensor([True, False]),
        positive_iou=0.7,
        negative_iou=0.3,
        allow_low_quality_matches=True,
        legacy=False,
    )
    assert match_labels.tolist() == [0, 1, 0]
    assert index[1] == 0


def test_boxes_between_the_thresholds_are_ignored():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10]])
    _, match_labels = matcher.match(
        anchors,
        gt_boxes,
        torch.tensor([True]),
        positive_iou=0.7,
        negative_iou=0.3,
        allow_low_quality_matches=True,
        legacy=False,
    )
    assert match_labels.tolist() == [1, matcher.IGNORED, 0]


def test_sampling_keeps_the_positive_fraction_and_depends_only_on_the_seed():
    match_labels = torch.zeros(3, 1000, dtype=torch.int64)
    match_labels[:2, ::10] = 1  # a hundred positives in two images, none in the third
    match_labels[:, 1::10] = matcher.IGNORED
    seeds = torch.tensor([5, 6, 7])
    priority = matcher.hash_uniform(seeds, 1000)
    sampled, is_sampled = matcher.sample_pos_neg(match_labels, priority, 64, 0.25)
    sampled_labels = match_labels.gather(1, sampled)
    assert [int((sampled_labels[i][is_sampled[i]] == 1).sum()) for i in range(3)] == [16, 16, 0]
    assert is_sampled.sum(dim=1).tolist() == [64, 64, 64]
    assert (sampled_labels[is_sampled] >= 0).all()
    assert all(len(set(sampled[i][is_sampled[i]].tolist())) == 64 for i in range(3))
    single, is_single = matcher.sample_pos_neg(match_labels[1:2], priority[1:2], 64, 0.25)
    assert torch.equal(single[is_single], sampled[1][is_sampled[1]])


def test_hash_is_uniform():
    values = matcher.hash_uniform(torch.arange(20), 5000)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()  # five standard deviations
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.06
    assert abs(np.corrcoef(values[0, :-1], values[0, 1:])[0, 1]) < 0.06


def test_sampling_takes_all_if_there_are_too_few():
    match_labels = torch.tensor([[1, 0, matcher.IGNORED, 0]])
    sampled, is_sampled = matcher.sample_pos_neg(match_labels, torch.rand(1, 4), 64, 0.5)
    assert sorted(sampled[is_sampled].tolist()) == [0, 1, 3]


def test_straddling_anchors_can_be_ignored():
    anchors = make_anchors(64, 64, CPU, legacy=True)
    gt_boxes = torch.tensor([[[0.0, 0, 63, 63]]])
    for drop in (False, True):
        _, match_labels = rpn.assign_targets(
            anchors, gt_boxes, torch.tensor([[True]]), torch.tensor([[64, 64]]), drop_straddling=drop, legacy=True
        )
        crosses = (anchors < 0).any(dim=1) | (anchors > 63).any(dim=1)
        assert (match_labels[0, crosses] != matcher.IGNORED).any() != drop


def test_folded_batch_norm_is_exact():
    conv, norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False).double(), nn.BatchNorm2d(8).double()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(conv_frozen_bn(x, conv, norm), norm(conv(x)))


@pytest.mark.parametrize(("flag", "strides"), [("--stride-in-1x1", (2, 1)), ("--no-stride-in-1x1", (1, 2))])
def test_stride_and_frozen_stages_follow_the_settings(flag, strides):
    backbone = make_backbone(make_config("--freeze-at", "1", flag))
    first = backbone.body.layer2[0]
    assert (first.conv1.stride[0], first.conv2.stride[0]) == strides
    trainable = {
        name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad and name.startswith("body")
    }
    assert trainable == {"layer2", "layer3", "layer4"}


def test_normalized_padding_is_zero():
    images = torch.full((1, 3, 4, 6), 7, dtype=torch.uint8)
    for input_format in ("caffe-bgr", "imagenet-rgb"):
        normalized = normalize(images, torch.tensor([[3, 5]]), input_format)
        assert not normalized[0, :, 3:].any()
        assert not normalized[0, :, :, 5:].any()
        assert normalized[0, :, :3, :5].all()
    blue = torch.zeros(1, 3, 1, 1)
    blue[0, 2] = 255
    assert normalize(blue.byte(), torch.tensor([[1, 1]]), "caffe-bgr").flatten().tolist() == pytest.approx(
        [255 - 102.9801, -115.9465, -122.7717], abs=1e-3
    )


def test_coco_checkpoint_of_91_classes_is_reduced_to_81(tmp_path):
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    old = {}
    for name, tensor in model.state_dict().items():  # with the older names of torchvision's file
        for new, before in ((".0.0.", "."), (".0.", ".")):
            if name.startswith(("backbone.fpn", "rpn.head.conv")) and new in name[len("backbone.fpn.inner") :]:
                name = name.replace(new, before, 1) if name.startswith("rpn") else name
        old[name] = tensor
    torch.save(old, tmp_path / "coco.pth")
    without_data = ["--mode", "bench-train", "--benchmark-input", "synthetic"]
    config = load(["--variant", "torchvision", *without_data], {}).config
    our_model = make_model(config)
    weights.load(our_model, config, tmp_path / "coco.pth")
    rows = model.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(our_model.box_head.predictor.cls_score.weight[0], rows[0])
    assert torch.equal(our_model.box_head.predictor.cls_score.weight[12], rows[13])  # COCO has no category 12
    assert torch.equal(our_model.box_head.predictor.cls_score.weight[80], rows[90])
    assert torch.equal(
        our_model.box_head.predictor.bbox_pred.weight[4 * 80 :],
        model.roi_heads.box_predictor.bbox_pred.weight[4 * 90 :],
    )
    assert torch.equal(
        our_model.mask_head.predictor.mask_fcn_logits.bias[80], model.roi_heads.mask_predictor.mask_fcn_logits.bias[90]
    )


def test_names_in_old_torchvision_files_are_mapped():
    renamed = weights.from_torchvision(
        dict.fromkeys(
            (
                "rpn.head.conv.weight",
                "backbone.fpn.inner_blocks.2.bias",
                "roi_heads.mask_head.mask_fcn3.weight",
                "roi_heads.box_head.fc6.bias",
            ),
            torch.zeros(1),
        )
    )
    expected = files.expected_state(make_model, make_config())
    assert set(renamed) <= set(expected)
    assert "mask_head.features.2.0.weight" in renamed


def test_torchvision_checkpoint_is_rejected_with_reference_settings(tmp_path):
    torch.save(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), tmp_path / "coco.pth")
    with pytest.raises(InputError, match="--variant torchvision"):
        weights.load(MaskRCNN.__new__(MaskRCNN), load([], {}).config, tmp_path / "coco.pth")


def test_file_of_another_network_is_rejected(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not the weights of a Mask R-CNN"):
        weights.read(tmp_path / "other.pth")


def to_detectron_pickle(state):
    """Return the content of Detectron's pickle of a ResNet-50."""
    blobs = {}
    for name, tensor in state.items():
        if name.startswith("fc") or "running" in name or "num_batches" in name:
            continue
        layer, kind = name.rsplit(".", 1)
        if layer in ("conv1", "bn1"):
            blob = "conv1_w" if layer == "conv1" else f"res_conv1_bn_{'s' if kind == 'weight' else 'b'}"
        else:
            stage, block, part = layer.split(".", 2)
            branch = "1" if part.startswith("downsample") else "2" + "abc"[int(part[-1]) - 1]
            norm = part in ("downsample.1", "bn1", "bn2", "bn3")
            suffix = ("bn_s" if kind == "weight" else "bn_b") if norm else "w"
            blob = f"res{int(stage[-1]) + 1}_{block}_branch{branch}_{suffix}"
        blobs[blob] = tensor.numpy()
    return {"blobs": blobs}


def test_detectron_pickle_loads_into_the_backbone(tmp_path):
    resnet = torchvision.models.resnet50(weights=None)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(to_detectron_pickle(resnet.state_dict()), protocol=2))
    config = make_config("--pretrained-backbone", str(path))
    model = make_model(config)
    weights.load_backbone(model, config)
    for name, tensor in model.backbone.body.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, resnet.state_dict()[name]), name
    assert (model.backbone.body.layer4[2].bn3.running_var == 1).all()


def test_imagenet_weights_of_another_input_format_are_rejected(tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    config = make_config("--pretrained-backbone", str(tmp_path / "resnet50.pth"))
    with pytest.raises(InputError, match=r"torchvision's, but .* fit MSRA's\. Name R-50\.pkl"):
        weights.load_backbone(make_model(config), config)
    config = make_config("--variant", "torchvision", "--pretrained-backbone", str(tmp_path / "resnet50.pth"))
    model = make_model(config)
    weights.load_backbone(model, config)


def test_code_in_a_pickle_is_never_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": Malicious()}}, protocol=2))
    with pytest.raises(InputError, match=r"it asks for (__builtin__|builtins)\.print"):
        weights.read_pickle(tmp_path / "R-50.pkl")


def test_variant_sets_defaults_only():
    resolved = load(["--variant", "torchvision", "--box-smooth-l1-beta", "0.5"], {"MASKRCNN_STRIDE_IN_1X1": "true"})
    config = resolved.config
    assert (config.box_smooth_l1_beta, config.stride_in_1x1, config.input_format) == (0.5, True, "imagenet-rgb")
    assert resolved.sources["input_format"] == "variant torchvision"
    changed = {name for name in TORCHVISION_PRESET if getattr(config, name) != getattr(load([], {}).config, name)}
    assert changed == set(TORCHVISION_PRESET) - {"stride_in_1x1"}


@pytest.mark.parametrize(
    ("batch", "lr", "steps"), [(96, 0.12, (12000, 16000)), (64, 0.08, (18000, 24000)), (48, 0.06, (24000, 32000))]
)
def test_recipe_scales_with_the_global_batch_as_published_ones(batch, lr, steps):
    config = load(["--batch-size", str(batch // 4)], {}).config
    assert config.peak_lr(4) == pytest.approx(lr)
    assert config.decay_steps(4) == steps
