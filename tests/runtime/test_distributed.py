"""Equal training at every world size with a fixed global batch size and synchronized batch norm."""

import numpy as np
import pytest
import torch
from torch import nn

import processes
from detection.runtime import distributed, sync_batch_norm

FLAGS = ("--bn-group", "0", "--log-every", "1")


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory):
    """Train one rank with batches of 8 and return run folders by number of images. With 28, the last batch has 4."""
    folders = {}
    for num_images in (24, 28):
        folders[num_images] = tmp_path_factory.mktemp("single_rank")
        flags = ("--batch-size", "8", "--num-images", str(num_images))
        status, _, err = processes.run(folders[num_images], *FLAGS, *flags)
        assert status == 3, err
    return folders


@pytest.mark.parametrize(
    ("ranks", "batch_size", "num_images"),
    [(2, 4, 28), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 2, 28), (8, 1, 24)))],
)
def test_sync_batch_norm_trains_alike_at_every_world_size(single_rank, tmp_path, ranks, batch_size, num_images):
    flags = ("--batch-size", str(batch_size), "--num-images", str(num_images))
    status, _, err = processes.run(tmp_path, *FLAGS, *flags, ranks=ranks, timeout_s=120)
    assert status == 3, err
    one = single_rank[num_images]
    assert len(processes.losses(one)) == -(-num_images // 8) * 3
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(one), rtol=1e-4)
    for name, tensor in processes.load_tensors(one).items():
        if name != "batch norm":
            torch.testing.assert_close(processes.load_tensors(tmp_path)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_groups_of_ranks_train_like_fewer_ranks_with_larger_batches(single_rank, tmp_path):
    """Two groups of two ranks compute the same statistics as two ranks with batches twice as large."""
    half = ("--batch-size", "2", "--bn-group", "2")
    assert processes.run(tmp_path / "groups", *FLAGS, *half, ranks=4)[0] == 3
    assert processes.run(tmp_path / "pair", *FLAGS, "--batch-size", "4", "--bn-group", "1", ranks=2)[0] == 3
    groups, pair = (processes.losses(tmp_path / name) for name in ("groups", "pair"))
    np.testing.assert_allclose(groups, pair, rtol=1e-4)
    assert not np.allclose(groups[1:], processes.losses(single_rank[24])[1:], rtol=1e-4)


def test_bf16_gradients_train_almost_alike(single_rank, tmp_path):
    flags = ("--batch-size", "4", "--gradient-dtype", "bf16")
    assert processes.run(tmp_path, *FLAGS, *flags, ranks=2)[0] == 3
    np.testing.assert_allclose(processes.losses(tmp_path), processes.losses(single_rank[24]), rtol=0.1)
    assert not np.allclose(processes.losses(tmp_path)[1:], processes.losses(single_rank[24])[1:], rtol=1e-6)


def test_sync_batch_norm_on_one_rank_equals_batch_norm():
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    sync = sync_batch_norm.convert_cpu_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), lambda tensor: None
    )
    sync.load_state_dict(baseline.state_dict())
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    for model in (baseline, sync):
        model(x).square().sum().backward()
    for (expected_name, expected), (name, actual) in zip(
        baseline.named_parameters(), sync.named_parameters(), strict=True
    ):
        assert name == expected_name
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for expected, actual in zip(baseline.buffers(), sync.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sync.eval()(x), baseline.eval()(x))


def test_running_stats_round_trip():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    flat = torch.arange(10.0)
    sync_batch_norm.set_running_stats(model, flat)
    assert torch.equal(sync_batch_norm.running_stats(model), flat)
    assert model[2].running_mean.tolist() == [6.0, 7.0]
    assert sync_batch_norm.running_stats(nn.Conv2d(1, 1, 1)).numel() == 0


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at pair.cc] Connection closed by peer [127.0.0.1]:52345",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 1.",
        "NCCL timeout in: ncclAllReduce",
    ],
)
def test_disconnect_messages_of_gloo_and_nccl_are_recognized(message):
    assert distributed.DISCONNECT_PATTERN.search(message)
    assert not distributed.DISCONNECT_PATTERN.search("CUDA error: an illegal memory access was encountered")
