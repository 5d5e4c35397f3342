import numpy as np
import pytest
import torch
import torchvision

from detection.checkpoint import pretrained_backbone
from detection.checkpoint.backbone_urls import BACKBONE_FILES, how_to_fetch
from detection.config.settings import InputError
from ssd.model import Backbone


@pytest.fixture(scope="module")
def resnet34():
    return torchvision.models.resnet34(weights=None)


@pytest.fixture(scope="module")
def weights(resnet34, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet34.pth"
    torch.save(resnet34.state_dict(), path)
    return path


def test_torchvisions_weights_load_and_compute_the_same_features(resnet34, weights):
    trunk = Backbone()
    pretrained_backbone.load(trunk, "resnet34", weights)
    images = torch.randn(1, 3, 64, 64)
    resnet34.eval()
    trunk.eval()
    x = resnet34.maxpool(resnet34.relu(resnet34.bn1(resnet34.conv1(images))))
    wanted = resnet34.layer2(resnet34.layer1(x))
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
    assert torch.equal(trunk.layer2(trunk.layer1(x)), wanted)
    assert torch.equal(trunk.layer3[0].conv1.weight, resnet34.layer3[0].conv1.weight)


def test_layer3_keeps_the_stride_of_8():
    assert Backbone()(torch.randn(1, 3, 300, 300)).shape == (1, 256, 38, 38)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 256), ("resnet50", 1024)])
def test_every_trunk_keeps_the_stride_of_8(name, channels):
    assert Backbone(name)(torch.randn(1, 3, 300, 300)).shape == (1, channels, 38, 38)


@pytest.mark.parametrize("name", [name for name in BACKBONE_FILES if name != "resnet34"])
def test_the_files_are_those_that_torchvision_publishes(name):
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    assert url in how_to_fetch(name)


def test_a_numpy_archive_loads_too(resnet34, tmp_path):
    np.savez(tmp_path / "resnet34.npz", **{name: t.numpy() for name, t in resnet34.state_dict().items()})
    trunk = Backbone()
    pretrained_backbone.load(trunk, "resnet34", tmp_path / "resnet34.npz")
    assert torch.equal(trunk.conv1.weight, resnet34.conv1.weight)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth: no such file.*get_resnet34_backbone"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "none.pth")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(weights, tmp_path, share):
    content = weights.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut\.pth: not a whole file of weights"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "cut.pth")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_weights_of_another_network_are_refused(tmp_path, name):
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="not the weights of this ResNet"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "other.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a whole file of weights"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "evil.pth")


def test_a_file_without_a_table_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="no table of weights"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "list.pth")
