from typing import NamedTuple

import pytest
import torch

from detection.data.prefetch import move, prefetch


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def shares(count):
    return [(Pair(torch.full((3,), i), torch.arange(i)), i, float(i)) for i in range(count)]


def test_moving_keeps_the_structure_and_what_is_no_tensor():
    pair, number, weight = move(shares(3)[2], torch.device("meta"))
    assert isinstance(pair, Pair)
    assert pair.left.device.type == pair.right.device.type == "meta"
    assert (number, weight) == (2, 2.0)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_cpu_gets_what_there_is(count):
    given = shares(count)
    assert all(a is b for a, b in zip(prefetch(given, torch.device("cpu")), given, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_accelerator_gets_every_batch_once_in_order(count):
    device = torch.accelerator.current_accelerator()
    got = list(prefetch(shares(count), device))
    assert [number for _, number, _ in got] == list(range(count))
    for pair, number, _ in got:
        assert pair.left.device.type == device.type
        assert pair.left.tolist() == [number] * 3
        assert pair.right.tolist() == list(range(number))
