"""Mask R-CNN against torchvision's, whose losses and detections it gives with `--variant torchvision`."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from detection.config.settings import InputError
from detection.engine.optim import freeze_batch_norm
from detection.runtime import device
from maskrcnn import box_coder, masks, matcher, rpn, weights
from maskrcnn.anchors import STRIDES_PX, make_anchors
from maskrcnn.backbone import Trunk, convolve, normalise
from maskrcnn.config import TORCHVISION, load
from maskrcnn.model import LOSSES, MaskRCNN, Truth, make_model
from maskrcnn.roi_align import roi_align

CPU = torch.device("cpu")
HEIGHT, WIDTH = 128, 192  # multiples of 64: torchvision's anchors of P6 have another stride elsewhere
SMALL = (
    "--backbone",
    "resnet18",
    "--freeze-at",
    "0",
    "--rpn-post-nms-top-n",
    "100",
    "--box-batch-size-per-image",
    "32",
)
ALL = "100000"  # so many samples that nothing is left to chance
BOXES = ([[10, 20, 80, 100], [90, 30, 180, 120]], [[30, 10, 150, 90]])
LABELS = ([1, 3], [2])


def settings(*flags):
    return load(["--num-classes", "5", *flags], {}).config


def diamond(box):
    x0, y0, x1, y1 = box
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.tensor([[x, y0, x0, y], [x0, y, x, y1], [x, y1, x1, y], [x1, y, x, y0]], dtype=torch.float32)


def scene():
    """Two images, and what is in them: for us and for torchvision."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    boxes, labels, edges = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 4, 4)
    theirs = []
    for image in range(2):
        own = torch.tensor(BOXES[image], dtype=torch.float32)
        boxes[image, : len(own)], labels[image, : len(own)] = own, torch.tensor(LABELS[image])
        for number, box in enumerate(BOXES[image]):
            edges[image, number] = diamond(box)
        whole = torch.tensor([0.0, 0.0, WIDTH, WIDTH]).expand(len(own), 4)
        bitmaps = masks.rasterise(edges[image, : len(own)], whole, WIDTH)[:, :HEIGHT].to(torch.uint8)
        theirs.append({"boxes": own, "labels": torch.tensor(LABELS[image]), "masks": bitmaps})
    truth = Truth(boxes, labels, edges, torch.tensor([1, 2]))
    return images, torch.tensor([[HEIGHT, WIDTH]] * 2), truth, theirs


def freeze(module, generator):
    """Frozen batch norm of made-up statistics in place of every batch norm."""
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
def torchvisions():
    """torchvision's model with made-up weights that give detections, and every sample drawn."""
    torch.manual_seed(6)  # of the trunk; no two scores are so near to each other that rounding could swap them
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=HEIGHT,
        max_size=256,
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
def ours(torchvisions, tmp_path_factory):
    """The same weights in our model, by way of a file."""
    path = tmp_path_factory.mktemp("weights") / "torchvision.pth"
    torch.save(torchvisions.state_dict(), path)
    config = settings("--variant", "torchvision", "--rpn-batch-size-per-image", ALL, "--box-batch-size-per-image", ALL)
    model = make_model(config)
    assert weights.load(model, config, path).origin == "torchvision"
    freeze_batch_norm(model)
    return model


@pytest.fixture(scope="module")
def losses(ours, torchvisions):
    """The five losses of ours and torchvision's, and their gradients in the parameters."""
    images, sizes_hw, truth, theirs = scene()
    ours.train()
    freeze_batch_norm(ours)
    torchvisions.train()
    for model in (ours, torchvisions):
        model.zero_grad()
    wanted = torchvisions([image / 255 for image in images], theirs)
    sum(wanted.values()).backward()
    got = ours(images, sizes_hw, truth)
    got.sum().backward()
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    return got.detach(), torch.stack([wanted[name].detach() for name in names])


def test_the_five_losses_are_torchvisions(losses):
    got, wanted = losses
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert (got > 0).all()


def test_the_gradients_are_torchvisions(losses, ours, torchvisions):
    wanted = weights.from_torchvision({name: p.grad for name, p in torchvisions.named_parameters()})
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < 3e-3, name  # float32 through fifty layers: .0012 with torch 2.4
            compared += 1
    assert compared > 60
    assert all(
        p.grad is None
        for n, p in ours.named_parameters()
        if n.startswith(("backbone.body.conv1", "backbone.body.layer1"))
    )


def test_the_detections_are_torchvisions(ours, torchvisions):
    images, sizes_hw, _, _ = scene()
    ours.eval()
    torchvisions.eval()
    with torch.no_grad():
        wanted = torchvisions([image / 255 for image in images])
        got = ours(images, sizes_hw)
    for image, theirs in enumerate(wanted):
        count = len(theirs["scores"])
        assert count > 10
        assert (got.labels[image] > 0).sum() == count
        torch.testing.assert_close(got.scores[image, :count], theirs["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.boxes_xyxy[image, :count], theirs["boxes"], rtol=1e-4, atol=1e-2)
        assert torch.equal(got.labels[image, :count], theirs["labels"])
        x0, y0, x1, y1 = theirs["boxes"][0].round().int().tolist()
        shown = theirs["masks"][0, 0, y0:y1, x0:x1].mean()
        assert abs(got.masks[image, 0].mean() - shown) < 0.05


@pytest.mark.gpu
def test_the_device_computes_the_losses_and_detections_of_the_cpu(ours):
    accelerator = device.choose("auto", local_rank=0)
    assert accelerator.type != "cpu"
    images, sizes_hw, truth, _ = scene()
    there = make_model(
        settings("--variant", "torchvision", "--rpn-batch-size-per-image", ALL, "--box-batch-size-per-image", ALL)
    ).to(accelerator)
    there.load_state_dict(ours.state_dict())
    freeze_batch_norm(ours.train())
    freeze_batch_norm(there.train())
    on_device = Truth(*(tensor.to(accelerator) for tensor in truth))
    got = there(images.to(accelerator), sizes_hw.to(accelerator), on_device).cpu()
    torch.testing.assert_close(got, ours(images, sizes_hw, truth), rtol=1e-2, atol=1e-4)
    with torch.no_grad():
        seen = there.eval()(images.to(accelerator), sizes_hw.to(accelerator)).scores.cpu()
        torch.testing.assert_close(seen[:, :5], ours.eval()(images, sizes_hw).scores[:, :5], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("flags", [(), pytest.param(("--variant", "torchvision"), marks=pytest.mark.slow)])
def test_it_learns_a_batch_by_heart(flags):
    config = settings(*SMALL, "--no-freeze-batch-norm", "--batch-norm-eps", "1e-5", *flags)
    torch.manual_seed(0)
    model = make_model(config).train()
    images, sizes_hw, truth, _ = scene()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    losses = []
    for _ in range(7):
        loss = model(images, sizes_hw, truth)
        assert loss.shape == (len(LOSSES),)
        losses.append(float(loss.detach().sum()))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_images_without_positives_use_every_weight_for_nothing():
    """DistributedDataParallel waits for the gradient of each."""
    model = make_model(settings(*SMALL))
    model.train()
    images, sizes_hw, _, _ = scene()
    nothing = Truth(
        torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, 4), torch.arange(2)
    )
    freeze_batch_norm(model)
    losses = model(images, sizes_hw, nothing)
    losses.sum().backward()
    assert losses[LOSSES.index("mask")] == 0
    assert losses[LOSSES.index("box")] == 0
    assert torch.isfinite(losses).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_regions_are_aligned_as_by_torchvision():
    generator = torch.Generator().manual_seed(2)
    levels = [torch.randn(2, 16, 64 // 2**i, 96 // 2**i, generator=generator, requires_grad=True) for i in range(4)]
    copies = [level.detach().clone().requires_grad_() for level in levels]
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([390.0, 262.0]) - 10  # some reach outside
    boxes = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) ** 3 * 300], dim=1)
    images = torch.arange(2).repeat_interleave(30)
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    wanted = pooler({str(i): x for i, x in enumerate(copies)}, [boxes[:30], boxes[30:]], [(256, 384)] * 2)
    got = roi_align(levels, boxes, images, 7, strides_px=STRIDES_PX[:4], legacy=False)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    noise = torch.randn(got.shape, generator=generator)
    for pooled in (got, wanted):
        (pooled * noise).sum().backward()
    for level, copy in zip(levels, copies, strict=True):
        torch.testing.assert_close(level.grad, copy.grad, rtol=1e-4, atol=1e-3)


def test_legacy_anchors_are_detectrons():
    anchors = make_anchors(64, 64, CPU, legacy=True)
    # generate_anchors(4, 32, (.5, 1, 2)) of Detectron: the corners of the first cell of P2.
    wanted = [[-22.0, -10.0, 25.0, 13.0], [-14.0, -14.0, 17.0, 17.0], [-10.0, -22.0, 13.0, 25.0]]
    torch.testing.assert_close(anchors[:3], torch.tensor(wanted))
    assert len(anchors) == 3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_encoded_is_decoded(legacy):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 50, 2, generator=generator) * 500
    boxes, base = torch.cat([corners, corners + 5 + 200 * torch.rand(2, 50, 2, generator=generator)], dim=2)
    deltas = box_coder.encode(boxes, base, box_coder.HEAD_WEIGHTS, legacy=legacy)
    decoded = box_coder.decode(deltas, base, box_coder.HEAD_WEIGHTS, legacy=legacy)
    torch.testing.assert_close(decoded, boxes, rtol=1e-4, atol=1e-2)


def test_a_legacy_box_includes_its_last_pixel():
    box = torch.tensor([[2.0, 3.0, 11.0, 7.0]])
    assert box_coder.widths_heights(box, legacy=True).tolist() == [[10.0, 5.0]]
    assert box_coder.widths_heights(box, legacy=False).tolist() == [[9.0, 4.0]]
    below = torch.tensor([[2.0, 8.0, 11.0, 12.0]])  # the next row of pixels on: they touch and do not overlap
    assert box_coder.pairwise_iou(box, below - torch.tensor([0, 1, 0, 1.0]), legacy=True).item() == pytest.approx(
        10 / 90
    )
    assert box_coder.pairwise_iou(box, below, legacy=True).item() == 0
    clipped = box_coder.clip(torch.tensor([[-5.0, 2.0, 60.0, 90.0]]), torch.tensor([[40, 50]]), legacy=True)
    assert clipped.tolist() == [[0.0, 2.0, 49.0, 39.0]]


def test_every_truth_keeps_an_anchor_however_little_it_overlaps():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    truth = torch.tensor([[19.0, 0, 22, 3], [0, 0, 0, 0]])  # the second is padding
    index, kind = matcher.match(
        anchors, truth, torch.tensor([True, False]), positive_iou=0.7, negative_iou=0.3, keep_best=True, legacy=False
    )
    assert kind.tolist() == [0, 1, 0]
    assert index[1] == 0


def test_what_overlaps_in_between_is_ignored():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2]])
    truth = torch.tensor([[0.0, 0, 10, 10]])
    _, kind = matcher.match(
        anchors, truth, torch.tensor([True]), positive_iou=0.7, negative_iou=0.3, keep_best=True, legacy=False
    )
    assert kind.tolist() == [1, matcher.IGNORED, 0]


def test_a_draw_keeps_its_shares_and_is_a_function_of_the_seed_alone():
    kind = torch.zeros(3, 1000, dtype=torch.int64)
    kind[:2, ::10] = 1  # a hundred positives in two images, none in the third
    kind[:, 1::10] = matcher.IGNORED
    seeds = torch.tensor([5, 6, 7])
    drawn, is_drawn = matcher.draw(kind, seeds, 64, 0.25)
    of_kind = kind.gather(1, drawn)
    assert [int((of_kind[i][is_drawn[i]] == 1).sum()) for i in range(3)] == [16, 16, 0]
    assert is_drawn.sum(dim=1).tolist() == [64, 64, 64]
    assert (of_kind[is_drawn] >= 0).all()
    assert all(len(set(drawn[i][is_drawn[i]].tolist())) == 64 for i in range(3))
    alone, is_alone = matcher.draw(kind[1:2], seeds[1:2], 64, 0.25)
    assert torch.equal(alone[is_alone], drawn[1][is_drawn[1]])


def test_the_noise_is_even():
    noise = matcher.noise(torch.arange(20), 5000)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()  # five standard deviations
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.06
    assert abs(np.corrcoef(noise[0, :-1], noise[0, 1:])[0, 1]) < 0.06


def test_too_few_are_drawn_whole():
    kind = torch.tensor([[1, 0, matcher.IGNORED, 0]])
    drawn, is_drawn = matcher.draw(kind, torch.tensor([1]), 64, 0.5)
    assert sorted(drawn[is_drawn].tolist()) == [0, 1, 3]


def test_proposals_can_be_cut_per_batch():
    anchors = make_anchors(64, 64, CPU, legacy=False)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, len(anchors), generator=generator) + torch.tensor([[3.0], [-3.0]])
    deltas = torch.zeros(2, len(anchors), 4)
    images, sizes_hw = torch.zeros(2, 3, 64, 64), torch.full((2, 2), 64)

    def propose(per_batch):
        how = rpn.ProposalSettings(before_nms=2000, after_nms=30, nms_threshold=0.7, per_batch=per_batch, legacy=False)
        return rpn.propose(logits, deltas, anchors, images, sizes_hw, how).is_proposal.sum(dim=1).tolist()

    assert propose(per_batch=False) == [30, 30]
    first, second = propose(per_batch=True)
    assert first + second == 30
    assert first > 25


def test_anchors_that_cross_the_border_can_be_left_out():
    anchors = make_anchors(64, 64, CPU, legacy=True)
    truth = torch.tensor([[[0.0, 0, 63, 63]]])
    for drop in (False, True):
        _, kind = rpn.targets(
            anchors, truth, torch.tensor([[True]]), torch.tensor([[64, 64]]), drop_straddling=drop, legacy=True
        )
        crosses = (anchors < 0).any(dim=1) | (anchors > 63).any(dim=1)
        assert (kind[0, crosses] != matcher.IGNORED).any() != drop


def test_frozen_batch_norm_is_folded_exactly():
    convolution, norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False).double(), nn.BatchNorm2d(8).double()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(convolve(x, convolution, norm), norm(convolution(x)))


@pytest.mark.parametrize(("stride_in_1x1", "strides"), [(True, (2, 1)), (False, (1, 2))])
def test_the_stride_is_where_the_weights_want_it(stride_in_1x1, strides):
    trunk = Trunk("resnet50", stride_in_1x1=stride_in_1x1, freeze_at=1, batch_norm_eps=0.0)
    first = trunk.body.layer2[0]
    assert (first.conv1.stride[0], first.conv2.stride[0]) == strides
    trainable = {
        name.split(".")[1] for name, p in trunk.named_parameters() if p.requires_grad and name.startswith("body")
    }
    assert trainable == {"layer2", "layer3", "layer4"}


def test_padding_is_0_to_the_network():
    images = torch.full((1, 3, 4, 6), 7, dtype=torch.uint8)
    for pixels in ("caffe-bgr", "imagenet-rgb"):
        seen = normalise(images, torch.tensor([[3, 5]]), pixels)
        assert not seen[0, :, 3:].any()
        assert not seen[0, :, :, 5:].any()
        assert seen[0, :, :3, :5].all()
    blue = torch.zeros(1, 3, 1, 1)
    blue[0, 2] = 255
    assert normalise(blue.byte(), torch.tensor([[1, 1]]), "caffe-bgr").flatten().tolist() == pytest.approx(
        [255 - 102.9801, -115.9465, -122.7717], abs=1e-3
    )


def test_cocos_own_checkpoint_of_91_classes_becomes_one_of_81(tmp_path):
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    old = {}
    for name, tensor in model.state_dict().items():  # as torchvision's file has it, which is older than its names
        for new, before in ((".0.0.", "."), (".0.", ".")):
            if name.startswith(("backbone.fpn", "rpn.head.conv")) and new in name[len("backbone.fpn.inner") :]:
                name = name.replace(new, before, 1) if name.startswith("rpn") else name
        old[name] = tensor
    torch.save(old, tmp_path / "coco.pth")
    config = load(["--variant", "torchvision"], {}).config
    ours = make_model(config)
    weights.load(ours, config, tmp_path / "coco.pth")
    rows = model.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(ours.box_head.predictor.cls_score.weight[0], rows[0])
    assert torch.equal(ours.box_head.predictor.cls_score.weight[12], rows[13])  # 12 is no category of COCO
    assert torch.equal(ours.box_head.predictor.cls_score.weight[80], rows[90])
    assert torch.equal(
        ours.box_head.predictor.bbox_pred.weight[4 * 80 :], model.roi_heads.box_predictor.bbox_pred.weight[4 * 90 :]
    )
    assert torch.equal(
        ours.mask_head.predictor.mask_fcn_logits.bias[80], model.roi_heads.mask_predictor.mask_fcn_logits.bias[90]
    )


def test_names_of_torchvisions_older_files_are_known():
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
    wanted = weights.wanted(settings())
    assert set(renamed) <= set(wanted)
    assert "mask_head.features.2.0.weight" in renamed


def test_torchvisions_checkpoint_is_refused_with_the_references_settings(tmp_path):
    torch.save(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), tmp_path / "coco.pth")
    with pytest.raises(InputError, match="--variant torchvision"):
        weights.load(MaskRCNN.__new__(MaskRCNN), load([], {}).config, tmp_path / "coco.pth")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not the weights of a Mask R-CNN"):
        weights.read(tmp_path / "other.pth")


def detectrons(state):
    """The pickle that Detectron would have of a ResNet-50."""
    blobs = {}
    for name, tensor in state.items():
        if name.startswith("fc") or "running" in name or "num_batches" in name:
            continue
        layer, kind = name.rsplit(".", 1)
        if layer in ("conv1", "bn1"):
            own = "conv1_w" if layer == "conv1" else f"res_conv1_bn_{'s' if kind == 'weight' else 'b'}"
        else:
            stage, block, part = layer.split(".", 2)
            branch = "1" if part.startswith("downsample") else "2" + "abc"[int(part[-1]) - 1]
            norm = part in ("downsample.1", "bn1", "bn2", "bn3")
            end = ("bn_s" if kind == "weight" else "bn_b") if norm else "w"
            own = f"res{int(stage[-1]) + 1}_{block}_branch{branch}_{end}"
        blobs[own] = tensor.numpy()
    return {"blobs": blobs}


def test_detectrons_pickle_loads_into_the_trunk_and_means_the_same(tmp_path):
    resnet = torchvision.models.resnet50(weights=None)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(detectrons(resnet.state_dict()), protocol=2))
    config = settings("--pretrained-backbone", str(path))
    model = make_model(config)
    weights.load_trunk(model, config)
    for name, tensor in model.backbone.body.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, resnet.state_dict()[name]), name
    assert (model.backbone.body.layer4[2].bn3.running_var == 1).all()


def test_imagenet_weights_of_the_other_kind_are_refused(tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    config = settings("--pretrained-backbone", str(tmp_path / "resnet50.pth"))
    with pytest.raises(InputError, match=r"torchvision's, and .* for MSRA's: name R-50\.pkl"):
        weights.load_trunk(make_model(config), config)
    config = settings("--variant", "torchvision", "--pretrained-backbone", str(tmp_path / "resnet50.pth"))
    model = make_model(config)
    weights.load_trunk(model, config)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": Evil()}}, protocol=2))
    with pytest.raises(InputError, match=r"it asks for (__builtin__|builtins)\.print"):
        weights.read_pickle(tmp_path / "R-50.pkl")


def test_the_variant_sets_what_is_not_set_by_itself():
    resolved = load(["--variant", "torchvision", "--box-smooth-l1-beta", "0.5"], {"MASKRCNN_STRIDE_IN_1X1": "true"})
    config = resolved.config
    assert (config.box_smooth_l1_beta, config.stride_in_1x1, config.input_format) == (0.5, True, "imagenet-rgb")
    assert resolved.sources["pixels"] == "variant torchvision"
    changed = {name for name in TORCHVISION if getattr(config, name) != getattr(load([], {}).config, name)}
    assert changed == set(TORCHVISION) - {"stride_in_1x1"}


@pytest.mark.parametrize(
    ("batch", "lr", "steps"), [(96, 0.12, (12000, 16000)), (64, 0.08, (18000, 24000)), (48, 0.06, (24000, 32000))]
)
def test_the_recipe_follows_the_global_batch_as_the_winning_ones_do(batch, lr, steps):
    config = load(["--batch-size", str(batch // 4)], {}).config
    assert config.peak_lr(4) == pytest.approx(lr)
    assert config.decay_steps(4) == steps
