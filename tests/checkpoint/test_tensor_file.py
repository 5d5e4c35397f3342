"""Files of tensors: the layouts of several programs are found, and other files are described."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from detection.checkpoint import tensor_file
from detection.checkpoint.weights import find_network
from detection.config.settings import InputError

NAMES = ("backbone.conv.weight", "heads.0.bias")


def make_state(prefix=""):
    return {prefix + name: torch.full((2,), float(number)) for number, name in enumerate(NAMES)}


def wrap_parts(state):
    return {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state.items()}


LAYOUTS = {
    "top level": make_state(),
    "model": {"model": make_state(), "epoch": 3},
    "torchvision": {"model": make_state("module."), "optimizer": {"state": {}}, "args": Namespace(lr=0.1, amp=True)},
    "state_dict": {"epoch": 3, "state_dict": make_state(), "best": 0.3},
    "model_state_dict": {"model_state_dict": make_state(), "optimizer_state_dict": {"state": {}}},
    "ema": {"model": None, "ema": make_state()},
    "nested ema": {"date": "today", "ema": {"module": make_state(), "updates": 7}},
    "averaged model": {"model_ema": {"n_averaged": torch.tensor(3), **make_state("module.")}},
    "compiled": make_state("_orig_mod."),
    "compiled, then distributed": make_state("module._orig_mod."),
    "compiled in parts": wrap_parts(make_state()),
    "FSDP": make_state("_fsdp_wrapped_module."),
    "Lightning": {
        "state_dict": make_state("model.") | {"criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
        "loops": {},
    },
    "Lightning, compiled": {"state_dict": make_state("detector._orig_mod.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_found_in_every_layout(tmp_path, layout):
    path = tmp_path / "a.pt"
    torch.save(LAYOUTS[layout], path)
    marker, state = find_network(tensor_file.read(path, hint=""), path, "a network", ["absent", "heads.0.bias"])
    assert marker == "heads.0.bias"
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        "backbone.conv.weight": [0, 0],
        "heads.0.bias": [1, 1],
    }


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(make_state("module."), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    assert find_network(tensor_file.read(path, hint=""), path, "", ["heads.0.bias"])[1].keys() == set(NAMES)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="not a valid weights file \\(damaged or truncated\\)"):
        tensor_file.read(path, hint="")


def test_missing_package_of_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"requires the package safetensors\. Install it with"):
        tensor_file.read(tmp_path / "a.safetensors", hint="")


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>Not found</html>", "an HTML page"),
        (b"\n<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (b"0123\n", "text"),
        (b"\x80\x02}q", "damaged or truncated"),
        (b"\x80\x0200", "damaged or truncated"),
        (b"PK\x03\x04cut", "damaged or truncated"),
        (b"\x08\x0aonnx\x00\xff", "of an unknown format"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_other_files_are_described_without_internal_errors(tmp_path, content, description, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        tensor_file.read(path, hint="Name another.")
    if suffix == ".safetensors" and description in ("text", "of an unknown format"):
        description = "damaged or truncated"
    assert str(caught.value).startswith(f"{path}: not a valid weights file ({description}")
    assert str(caught.value).endswith("). Name another.")
    assert "\n" not in str(caught.value)


def test_whole_model_is_named_as_such(tmp_path):
    torch.save(nn.ReLU(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"an object of torch\.nn\.modules\.activation\.ReLU, .*save only tensors"):
        tensor_file.read(tmp_path / "a.pt", hint="")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains no dictionary of tensors, but a list"),
        (torch.ones(2), "contains no dictionary of tensors, but a Tensor"),
        ({"epoch": 3, "optimizer": {}}, r"no dictionary of tensors, but epoch \(int\), optimizer \(dict\)\."),
        ({"model": {"a": 1}, "b": 2}, r"but model \(dict\), b \(int\)\."),
        (dict.fromkeys("abcdefgh", 1), r"f \(int\), 2 more\. Name a file with tensors at the top level or under"),
        ({}, "no dictionary of tensors, but nothing"),
        ({"conv1.weight": torch.ones(2)}, r"not the weights of a network \(the first tensor is conv1.weight\)"),
    ],
)
def test_content_without_the_network_is_described(tmp_path, content, message):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=message):
        find_network(tensor_file.read(path, hint=""), path, "a network", ["heads.0.bias"])


def test_archives_of_other_programs_are_described(tmp_path):
    np.savez(tmp_path / "a.zip", a=np.zeros(2))
    (tmp_path / "a.zip.npz").rename(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"an archive that was not written by torch\.save"):
        tensor_file.read(tmp_path / "a.pt", hint="")
    np.savez(tmp_path / "b.npz", a=np.array([{}]))
    with pytest.raises(InputError, match="not a valid weights file"):
        tensor_file.read(tmp_path / "b.npz", hint="")
