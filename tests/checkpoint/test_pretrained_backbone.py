import numpy as np
import pytest
import torch
import torchvision

from detection.checkpoint import pretrained_backbone
from detection.checkpoint.backbone_urls import BACKBONE_FILES, fetch_command
from detection.checkpoint.public_weights import PUBLIC_WEIGHTS
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


def test_torchvision_weights_load_and_compute_the_same_features(resnet34, weights):
    backbone = Backbone()
    pretrained_backbone.load(backbone, "resnet34", weights)
    images = torch.randn(1, 3, 64, 64)
    resnet34.eval()
    backbone.eval()
    x = resnet34.maxpool(resnet34.relu(resnet34.bn1(resnet34.conv1(images))))
    expected = resnet34.layer2(resnet34.layer1(x))
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
    assert torch.equal(backbone.layer2(backbone.layer1(x)), expected)
    assert torch.equal(backbone.layer3[0].conv1.weight, resnet34.layer3[0].conv1.weight)


def test_layer3_keeps_stride_8():
    assert Backbone()(torch.randn(1, 3, 300, 300)).shape == (1, 256, 38, 38)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 256), ("resnet50", 1024)])
def test_every_backbone_keeps_stride_8(name, channels):
    assert Backbone(name)(torch.randn(1, 3, 300, 300)).shape == (1, channels, 38, 38)


@pytest.mark.parametrize("name", [name for name in BACKBONE_FILES if name != "resnet34"])
def test_files_are_those_that_torchvision_publishes(name):
    assert torchvision.models.get_model_weights(name).IMAGENET1K_V1.url == PUBLIC_WEIGHTS[name].url
    assert fetch_command(name) == f"./get_weights.sh {name}"


def test_numpy_archive_loads(resnet34, tmp_path):
    np.savez(tmp_path / "resnet34.npz", **{name: t.numpy() for name, t in resnet34.state_dict().items()})
    backbone = Backbone()
    pretrained_backbone.load(backbone, "resnet34", tmp_path / "resnet34.npz")
    assert torch.equal(backbone.conv1.weight, resnet34.conv1.weight)


def test_backbone_in_the_layout_of_another_program_loads(resnet34, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in resnet34.state_dict().items()}
    torch.save({"epoch": 90, "arch": "resnet34", "state_dict": state}, tmp_path / "best.pth")
    backbone = Backbone()
    pretrained_backbone.load(backbone, "resnet34", tmp_path / "best.pth")
    assert torch.equal(backbone.conv1.weight, resnet34.conv1.weight)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth: no such file.*get_weights.sh resnet34"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "none.pth")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_truncated_file_is_rejected(weights, tmp_path, fraction):
    content = weights.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(InputError, match=r"cut\.pth: not a valid weights file"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "cut.pth")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_of_another_network_are_rejected(tmp_path, name):
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="not the weights of this ResNet"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "other.pth")


def test_pickle_with_code_is_rejected(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a valid weights file"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "evil.pth")


def test_file_without_a_dictionary_is_rejected(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="no dictionary of tensors"):
        pretrained_backbone.load(Backbone(), "resnet34", tmp_path / "list.pth")
