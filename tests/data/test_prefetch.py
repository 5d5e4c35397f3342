from typing import NamedTuple

import pytest
import torch

from detection.data.prefetch import HostCopy, prefetch, to_device


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def make_batches(count):
    return [(Pair(torch.full((3,), i), torch.arange(i)), i, float(i)) for i in range(count)]


def test_to_device_keeps_the_structure_and_other_values():
    pair, number, weight = to_device(make_batches(3)[2], torch.device("meta"))
    assert isinstance(pair, Pair)
    assert pair.left.device.type == pair.right.device.type == "meta"
    assert (number, weight) == (2, 2.0)


def test_to_device_copies_the_tensors_of_lists():
    ((one, other), words) = to_device(([torch.ones(2), [torch.zeros(3)]], ["a"]), torch.device("meta"))
    assert one.device.type == other[0].device.type == "meta"
    assert words == ["a"]


def test_only_copies_to_a_device_may_be_incomplete_on_return(monkeypatch):
    original, flags = torch.Tensor.to, []

    def to(tensor, device, *, non_blocking):
        flags.append((device.type, non_blocking))
        return original(tensor, device, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for name in ("meta", "cpu"):
        to_device((torch.zeros(2),), torch.device(name))
    assert flags == [("meta", True), ("cpu", False)]


def test_host_copy_keeps_the_structure_and_other_values():
    pair, number = HostCopy((Pair(torch.ones(2), torch.zeros(3)), 4), torch.device("cpu")).wait()
    assert (pair.left.tolist(), pair.right.tolist(), number) == ([1, 1], [0, 0, 0], 4)


@pytest.mark.gpu
def test_host_copy_waits_for_the_computation():
    device = torch.accelerator.current_accelerator()
    x = torch.eye(4096, device=device)
    for _ in range(20):
        x = x @ x
    assert torch.equal(HostCopy((x,), device).wait()[0], torch.eye(4096))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_prefetch_on_cpu_yields_the_same_objects(count):
    batches = make_batches(count)
    assert all(a is b for a, b in zip(prefetch(batches, torch.device("cpu")), batches, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 5])
def test_accelerator_gets_every_batch_once_in_order(count):
    device = torch.accelerator.current_accelerator()
    batches = list(prefetch(make_batches(count), device))
    assert [number for _, number, _ in batches] == list(range(count))
    for pair, number, _ in batches:
        assert pair.left.device.type == device.type
        assert pair.left.tolist() == [number] * 3
        assert pair.right.tolist() == list(range(number))
