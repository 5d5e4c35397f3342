"""Weights of the whole network: public checkpoints give the outputs that their own network gives, and no surprises."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from detection.config.settings import InputError
from ssd import checkpoint_names, conformance, preflight, weights
from ssd.config import load
from ssd.model import SSD300, ExtraBlock

CLASSES = 5
CELLS = (4, 6, 6, 6, 4, 4)


class PublicSSD300(nn.Module):
    """SSD300 v1.1 as its page describes it, with the names of its published checkpoints."""

    def __init__(self, trunk: str, channels: tuple[int, ...]):
        super().__init__()
        children = list(getattr(torchvision.models, trunk)(weights=None).children())
        self.feature_extractor = nn.Module()
        self.feature_extractor.feature_extractor = nn.Sequential(*children[:7])
        first = self.feature_extractor.feature_extractor[6][0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
        middles, strides, paddings = (256, 256, 128, 128, 128), (2, 2, 2, 1, 1), (1, 1, 1, 0, 0)
        self.additional_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, middle, 1, bias=False),
                nn.BatchNorm2d(middle),
                nn.ReLU(),
                nn.Conv2d(middle, after, 3, stride=stride, padding=padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, middle, after, stride, padding in zip(
                channels[:-1], middles, channels[1:], strides, paddings, strict=True
            )
        )
        sized = list(zip(channels, CELLS, strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * n, 3, padding=1) for c, n in sized)
        self.conf = nn.ModuleList(nn.Conv2d(c, CLASSES * n, 3, padding=1) for c, n in sized)

    def forward(self, images):
        """Boxes (B, 4, A) and classes (B, K, A)."""
        maps = [self.feature_extractor.feature_extractor(images)]
        for block in self.additional_blocks:
            maps.append(block(maps[-1]))
        boxes = [head(x).flatten(2).reshape(len(x), 4, -1) for head, x in zip(self.loc, maps, strict=True)]
        classes = [head(x).flatten(2).reshape(len(x), CLASSES, -1) for head, x in zip(self.conf, maps, strict=True)]
        return torch.cat(boxes, 2), torch.cat(classes, 2)


def made_up(network: nn.Module) -> nn.Module:
    """The network with statistics and weights of batch norm that are not those of the beginning."""
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
    return made_up(PublicSSD300("resnet50", (1024, 512, 512, 256, 256, 256)))


@pytest.fixture(scope="module")
def published(public, tmp_path_factory):
    """A file as SSD300 v1.1 writes it, with its optimiser's and scheduler's state beside the model's."""
    path = tmp_path_factory.mktemp("weights") / "epoch_64.pt"
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in public.state_dict().items())
    scheduler = {"milestones": Counter({43: 1, 54: 1}), "gamma": 0.1}
    torch.save({"epoch": 65, "model": state, "scheduler": scheduler, "label_map": {1: "person"}}, path)
    return path


def r50() -> SSD300:
    return SSD300(CLASSES, "resnet50", batch_norm=True)


def test_a_checkpoint_of_ssd300_v1_1_gives_the_outputs_of_its_own_network(public, published):
    model = r50().eval()
    assert weights.load(model, published).origin == "SSD300 v1.1"
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        boxes, classes = public(images)
        deltas, logits = model(images)
    torch.testing.assert_close(deltas, boxes.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, classes.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_smaller_trunk_loads_too(tmp_path):
    theirs = made_up(PublicSSD300("resnet18", (256, 512, 512, 256, 256, 128)))
    torch.save({"model": theirs.state_dict()}, tmp_path / "r18.pt")
    model = SSD300(CLASSES, "resnet18", batch_norm=True).eval()
    weights.load(model, tmp_path / "r18.pt")
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1], theirs(images)[1].transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_the_mlperf_reference_reproduces_its_outputs(golden, tmp_path):
    bench = conformance.open_bench(golden, "cpu", "fp32")
    state = conformance.reference_state(bench)
    torch.save(
        {"model": state, "label_map": {1: "person"}}, tmp_path / "iter_1.pt", _use_new_zipfile_serialization=False
    )
    model = SSD300().eval()
    assert weights.load(model, tmp_path / "iter_1.pt").origin == "the MLPerf reference"
    rng = np.random.default_rng(bench.number("model_seed_base") - 1)
    images = bench.made(rng.standard_normal((2, 3, 300, 300)))
    with torch.no_grad():
        deltas, logits = (t.transpose(1, 2) for t in model(images))
    assert conformance.relative(deltas[:, :, ::53], bench.tensor("model_eval_loc_sample")) < 1e-4
    assert conformance.relative(logits[:, ::4, ::53], bench.tensor("model_eval_cls_sample")) < 1e-4


def test_a_checkpoint_of_our_own_has_the_mean_statistics_of_all_ranks(tmp_path):
    model = SSD300(CLASSES)
    size = sum(b.numel() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))
    rows = torch.stack([torch.full((size,), 1.0), torch.full((size,), 3.0)])
    torch.save({"format": 2, "benchmark": "ssd", "model": model.state_dict(), "batch_norm": rows}, tmp_path / "a.pt")
    fresh = SSD300(CLASSES)
    assert weights.load(fresh, tmp_path / "a.pt").origin == "this program"
    assert torch.equal(fresh.heads[0].weight, model.heads[0].weight)
    assert float(fresh.backbone.bn1.running_var.mean()) == 2.0


def test_statistics_without_a_counter_load(tmp_path):
    state = {name: t for name, t in SSD300(CLASSES).state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    weights.load(SSD300(CLASSES), tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--network", "ssd300-r50"), "--num-classes 5"),
        (("--num-classes", "5"), "--network ssd300-r50 --backbone resnet50"),
        (("--network", "ssd300-r50", "--backbone", "resnet101", "--num-classes", "5"), "--backbone resnet50"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_with_the_settings_that_fit(published, flags, said):
    config = load([*flags, "--weights", str(published)], {}).config
    with pytest.raises(InputError, match="holds ssd300-r50 on resnet50 for 5 classes, and the settings ask") as caught:
        preflight.network(published, config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_fits_passes_before_the_clock(published):
    config = load(["--network", "ssd300-r50", "--num-classes", "5", "--weights", str(published)], {}).config
    assert "SSD300 v1.1; ssd300-r50 on resnet50 for 5 classes" in preflight.network(published, config)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {"model": state, "label_map": Evil()}, "not a whole file of weights"),
        (lambda state: {"model": Evil()}, "not a whole file of weights"),
        (lambda state: {"model": "none"}, "no table of weights"),
        (lambda state: {"model": {"a": 1}}, "no table of weights"),
        (lambda state: {"model": {}}, "not the weights of an SSD300"),
        (lambda state: torchvision.models.resnet18(weights=None).state_dict(), "are for --pretrained-backbone"),
        (lambda state: without(state, "heads.2.bias"), r"lacks 1 tensors \(first: heads.2.bias\)"),
        (lambda state: state | {"backbone.x": torch.ones(1)}, r"does not know 1 tensors \(first: backbone.x\)"),
        (
            lambda state: state | {"heads.2.bias": torch.ones(9)},
            r"another shape of 1 tensors \(first: heads.2.bias, which",
        ),
        (
            lambda state: without(checkpoint_names.to_reference(state), "conf.3.bias"),
            "of the MLPerf reference.*conf.3.bias",
        ),
        (
            lambda state: checkpoint_names.to_reference(state) | {"model.x": torch.ones(1)},
            "of the MLPerf reference.*model.x",
        ),
        (lambda state: checkpoint_names.to_reference(state) | {"loc.0.bias": torch.ones(3)}, "are of no SSD300"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, capsys, change, said):
    torch.save(change(SSD300(CLASSES).state_dict()), tmp_path / "a.pt")
    with pytest.raises(InputError, match=said) as caught:
        weights.load(SSD300(CLASSES), tmp_path / "a.pt")
    assert str(caught.value).startswith(str(tmp_path / "a.pt"))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_file_with_flipped_bits_is_refused(published, tmp_path):
    content = bytearray(published.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(InputError, match="not a whole file of weights"):
        weights.load(r50(), tmp_path / "flipped.pt")


def test_an_extra_block_trains_on_a_single_value_by_its_running_statistics():
    block = ExtraBlock(8, 4, 8, 1, 0, batch_norm=True).train()
    one = torch.randn(1, 8, 3, 3)
    mean = block.bn2.running_mean.clone()
    block(one).sum().backward()
    assert torch.equal(block.bn2.running_mean, mean)
    block(one.expand(2, 8, 3, 3) + torch.randn(2, 8, 3, 3))
    assert not torch.equal(block.bn2.running_mean, mean)
