"""Complete weights: public checkpoints reproduce the outputs of their networks, and bad files are rejected."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from detection.config.settings import InputError
from detection.evaluation.conformance import max_rel_error
from ssd import checkpoint_names, conformance, weights
from ssd.commands import describe_checkpoint
from ssd.config import load
from ssd.model import SSD300, ExtraBlock, make_model

CLASSES = 5
CELLS = (4, 6, 6, 6, 4, 4)


class PublicSSD300(nn.Module):
    """SSD300 v1.1 as documented, with the tensor names of its published checkpoints."""

    def __init__(self, backbone: str, channels: tuple[int, ...]):
        super().__init__()
        children = list(getattr(torchvision.models, backbone)(weights=None).children())
        self.feature_extractor = nn.Module()
        self.feature_extractor.feature_extractor = nn.Sequential(*children[:7])
        first = self.feature_extractor.feature_extractor[6][0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
        bottlenecks, strides, paddings = (256, 256, 128, 128, 128), (2, 2, 2, 1, 1), (1, 1, 1, 0, 0)
        self.additional_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, bottleneck, 1, bias=False),
                nn.BatchNorm2d(bottleneck),
                nn.ReLU(),
                nn.Conv2d(bottleneck, after, 3, stride=stride, padding=padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, bottleneck, after, stride, padding in zip(
                channels[:-1], bottlenecks, channels[1:], strides, paddings, strict=True
            )
        )
        sized = list(zip(channels, CELLS, strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * n, 3, padding=1) for c, n in sized)
        self.conf = nn.ModuleList(nn.Conv2d(c, CLASSES * n, 3, padding=1) for c, n in sized)

    def forward(self, images):
        """Return boxes (B, 4, A) and classes (B, K, A)."""
        maps = [self.feature_extractor.feature_extractor(images)]
        for block in self.additional_blocks:
            maps.append(block(maps[-1]))
        boxes = [head(x).flatten(2).reshape(len(x), 4, -1) for head, x in zip(self.loc, maps, strict=True)]
        classes = [head(x).flatten(2).reshape(len(x), CLASSES, -1) for head, x in zip(self.conf, maps, strict=True)]
        return torch.cat(boxes, 2), torch.cat(classes, 2)


def randomize_batch_norm(network: nn.Module) -> nn.Module:
    """Randomize the statistics and weights of batch norm."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def public():
    return randomize_batch_norm(PublicSSD300("resnet50", (1024, 512, 512, 256, 256, 256)))


@pytest.fixture(scope="module")
def published(public, tmp_path_factory):
    """File as SSD300 v1.1 writes it, with optimizer and scheduler state."""
    path = tmp_path_factory.mktemp("weights") / "epoch_64.pt"
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in public.state_dict().items())
    scheduler = {"milestones": Counter({43: 1, 54: 1}), "gamma": 0.1}
    torch.save({"epoch": 65, "model": state, "scheduler": scheduler, "label_map": {1: "person"}}, path)
    return path


def make_config(*flags, num_classes=CLASSES):
    return load(["--num-classes", str(num_classes), *flags], {}).config


R50 = make_config("--network", "ssd300-r50")


def test_ssd300_v1_1_checkpoint_reproduces_the_outputs_of_its_network(public, published):
    model = make_model(R50).eval()
    assert weights.load(model, R50, published).origin == "SSD300 v1.1"
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        boxes, classes = public(images)
        deltas, logits = model(images)
    torch.testing.assert_close(deltas, boxes.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, classes.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_checkpoint_with_a_smaller_backbone_loads(tmp_path):
    public_network = randomize_batch_norm(PublicSSD300("resnet18", (256, 512, 512, 256, 256, 128)))
    torch.save({"model": public_network.state_dict()}, tmp_path / "r18.pt")
    config = make_config("--network", "ssd300-r50", "--backbone", "resnet18")
    model = make_model(config).eval()
    weights.load(model, config, tmp_path / "r18.pt")
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1], public_network(images)[1].transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_mlperf_reference_checkpoint_reproduces_its_outputs(golden, tmp_path):
    bench = conformance.SUITE.load(golden, "cpu", "fp32")
    state = conformance.reference_state(bench)
    torch.save(
        {"model": state, "label_map": {1: "person"}}, tmp_path / "iter_1.pt", _use_new_zipfile_serialization=False
    )
    model = SSD300().eval()
    assert weights.load(model, make_config(num_classes=81), tmp_path / "iter_1.pt").origin == "the MLPerf reference"
    rng = np.random.default_rng(bench.scalar("model_seed_base") - 1)
    images = bench.as_tensor(rng.standard_normal((2, 3, 300, 300)))
    with torch.no_grad():
        deltas, logits = (t.transpose(1, 2) for t in model(images))
    assert max_rel_error(deltas[:, :, ::53], bench.vector("model_eval_loc_sample")) < 1e-4
    assert max_rel_error(logits[:, ::4, ::53], bench.vector("model_eval_cls_sample")) < 1e-4


def test_own_checkpoint_gets_the_mean_statistics_of_all_ranks(tmp_path):
    model = SSD300(CLASSES)
    size = sum(b.numel() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))
    rows = torch.stack([torch.full((size,), 1.0), torch.full((size,), 3.0)])
    torch.save({"format": 2, "benchmark": "ssd", "model": model.state_dict(), "batch_norm": rows}, tmp_path / "a.pt")
    loaded = SSD300(CLASSES)
    assert weights.load(loaded, make_config(), tmp_path / "a.pt").origin == "this program"
    assert torch.equal(loaded.heads[0].weight, model.heads[0].weight)
    assert float(loaded.backbone.bn1.running_var.mean()) == 2.0


def test_batch_norm_statistics_without_a_counter_load(tmp_path):
    state = {name: t for name, t in SSD300(CLASSES).state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    weights.load(SSD300(CLASSES), make_config(), tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--network ssd300-r50 --backbone resnet50"),
        (("--network", "ssd300-r50", "--backbone", "resnet101"), "--backbone resnet50"),
    ],
)
def test_checkpoint_of_another_network_is_rejected_with_the_right_settings(published, flags, message):
    with pytest.raises(InputError, match="holds ssd300-r50 on resnet50 for 5 classes, but the settings ask") as caught:
        describe_checkpoint(published, make_config(*flags), False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_matching_checkpoint_passes_preflight(published):
    assert "SSD300 v1.1; ssd300-r50 on resnet50 for 5 classes; 330 tensors loaded" in describe_checkpoint(
        published, R50, False
    )


def test_ssd300_v1_1_checkpoint_starts_a_network_for_other_classes(public, published):
    config = make_config("--network", "ssd300-r50", num_classes=3)
    model = make_model(config)
    initial = model.heads[1].weight.detach().unflatten(0, (6, 7)).clone()
    taken = weights.load(model, config, published)
    assert "the outputs of all 3 classes initialized (heads.0, heads.1" in taken.report
    head = model.heads[1].weight.detach().unflatten(0, (6, 7))
    assert torch.equal(head[:, 4:], initial[:, 4:])
    assert torch.equal(head[:, :4], public.loc[1].weight.detach().unflatten(0, (4, 6)).transpose(0, 1))
    assert torch.equal(model.backbone.conv1.weight, public.feature_extractor.feature_extractor[0].weight)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"model": state, "label_map": Evil()}, "not a valid weights file"),
        (lambda state: {"model": Evil()}, "not a valid weights file"),
        (lambda state: {"model": "none"}, "no dictionary of tensors"),
        (lambda state: {"model": {"a": 1}}, "no dictionary of tensors"),
        (lambda state: {"model": {}}, "no dictionary of tensors"),
        (
            lambda state: torchvision.models.resnet18(weights=None).state_dict(),
            "those of a backbone to --pretrained-backbone",
        ),
        (lambda state: without(state, "heads.2.bias"), r"1 missing tensors .*\(first: heads.2.bias\)"),
        (lambda state: state | {"backbone.x": torch.ones(1)}, r"1 unexpected tensors .*\(first: backbone.x\)"),
        (lambda state: state | {"heads.2.bias": torch.ones(9)}, r"1 mismatched tensors .*\(first: heads.2.bias, "),
        (
            lambda state: without(checkpoint_names.to_reference(state), "conf.3.bias"),
            "of the MLPerf reference.*conf.3.bias",
        ),
        (
            lambda state: checkpoint_names.to_reference(state) | {"model.x": torch.ones(1)},
            "of the MLPerf reference.*model.x",
        ),
        (lambda state: checkpoint_names.to_reference(state) | {"loc.0.bias": torch.ones(3)}, "do not fit SSD300"),
    ],
)
def test_unloadable_weights_are_rejected_in_one_line(tmp_path, capsys, change, message):
    torch.save(change(SSD300(CLASSES).state_dict()), tmp_path / "a.pt")
    with pytest.raises(InputError, match=message) as caught:
        weights.load(SSD300(CLASSES), make_config(), tmp_path / "a.pt")
    assert str(caught.value).startswith(str(tmp_path / "a.pt"))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_file_with_flipped_bits_is_rejected(published, tmp_path):
    content = bytearray(published.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(InputError, match="not a valid weights file"):
        weights.load(make_model(R50), R50, tmp_path / "flipped.pt")


def test_extra_block_trains_on_one_value_with_running_statistics():
    block = ExtraBlock(8, 4, 8, 1, 0, batch_norm=True).train()
    one = torch.randn(1, 8, 3, 3)
    mean = block.bn2.running_mean.clone()
    block(one).sum().backward()
    assert torch.equal(block.bn2.running_mean, mean)
    block(one.expand(2, 8, 3, 3) + torch.randn(2, 8, 3, 3))
    assert not torch.equal(block.bn2.running_mean, mean)
