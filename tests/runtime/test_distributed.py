"""The same mathematics at any width: ranks × batch, with batch norm shared over all ranks."""

import numpy as np
import pytest
import torch
from torch import nn

import processes
from detection.runtime import distributed, sync_batch_norm

SAME = ("--bn-group", "0", "--log-every", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank with batches of 8: by number of images. The last batch of 28 images is one of 4."""
    folders = {}
    for num_images in (24, 28):
        folders[num_images] = tmp_path_factory.mktemp("alone")
        flags = ("--batch-size", "8", "--num-images", str(num_images))
        status, _, err = processes.run(folders[num_images], *SAME, *flags)
        assert status == 3, err
    return folders


@pytest.mark.parametrize(
    ("ranks", "batch_size", "num_images"),
    [(2, 4, 28), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 2, 28), (8, 1, 24)))],
)
def test_shared_batch_norm_makes_every_width_train_alike(alone, tmp_path, ranks, batch_size, num_images):
    flags = ("--batch-size", str(batch_size), "--num-images", str(num_images))
    status, _, err = processes.run(tmp_path, *SAME, *flags, ranks=ranks, timeout_s=120)
    assert status == 3, err
    one = alone[num_images]
    assert len(processes.losses(one)) == -(-num_images // 8) * 3
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(one), rtol=1e-4)
    for name, tensor in processes.weights(one).items():
        if name != "batch norm":
            torch.testing.assert_close(processes.weights(tmp_path)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_group_of_half_the_ranks_trains_otherwise_than_all_and_than_one(alone, tmp_path):
    """Two groups of two ranks share what two ranks of batches twice as large have each for itself."""
    half = ("--batch-size", "2", "--bn-group", "2")
    assert processes.run(tmp_path / "groups", *SAME, *half, ranks=4)[0] == 3
    assert processes.run(tmp_path / "pair", *SAME, "--batch-size", "4", "--bn-group", "1", ranks=2)[0] == 3
    groups, pair = (processes.losses(tmp_path / name) for name in ("groups", "pair"))
    np.testing.assert_allclose(groups, pair, rtol=1e-4)
    assert not np.allclose(groups[1:], processes.losses(alone[24])[1:], rtol=1e-4)


def test_gradients_that_travel_in_half_the_bytes_train_nearly_alike(alone, tmp_path):
    flags = ("--batch-size", "4", "--gradient-dtype", "bf16")
    assert processes.run(tmp_path, *SAME, *flags, ranks=2)[0] == 3
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(alone[24]), rtol=0.1)
    assert not np.allclose(processes.losses(tmp_path)[1:], processes.losses(alone[24])[1:], rtol=1e-6)


def test_shared_batch_norm_alone_is_batch_norm():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    shared = sync_batch_norm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), lambda tensor: None)
    shared.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    for model in (plain, shared):
        model(x).square().sum().backward()
    for (name, one), (other_name, other) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
    for one, other in zip(plain.buffers(), shared.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))


def test_statistics_come_back_as_they_were():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    flat = torch.arange(10.0)
    sync_batch_norm.set_statistics(model, flat)
    assert torch.equal(sync_batch_norm.statistics(model), flat)
    assert model[2].running_mean.tolist() == [6.0, 7.0]
    assert sync_batch_norm.statistics(nn.Conv2d(1, 1, 1)).numel() == 0


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at pair.cc] Connection closed by peer [127.0.0.1]:52345",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 1.",
        "NCCL timeout in: ncclAllReduce",
    ],
)
def test_what_gloo_and_nccl_say_of_a_lost_peer_is_known(message):
    assert distributed.GONE.search(message)
    assert not distributed.GONE.search("CUDA error: an illegal memory access was encountered")
