"""Costs of a training step on a fake device."""

import pytest
import torch

from perf.fake_cuda import CUDA, fake_cuda_device
from perf.step_costs import CARDS, DeviceMonitor, count_step, describe, main
from perf.systems import list_systems, load_config

MIB = 2**20


def mebibytes(count):
    return torch.zeros(count * MIB // 4, device=CUDA)


def test_monitor_counts_live_and_peak_memory_and_operations():
    with fake_cuda_device(), DeviceMonitor() as monitor:
        first, second = mebibytes(3), mebibytes(5)
        view = first[10:].view(-1)
        del first
        assert monitor.live_bytes == 8 * MIB  # a view keeps its tensor
        del view
        assert (monitor.live_bytes, monitor.peak_bytes) == (5 * MIB, 8 * MIB)
        monitor.restart()
        torch.ones(100)
        second.add_(1).mul_(2)
        assert (monitor.operations, monitor.peak_bytes) == (2, 5 * MIB)


def test_backward_pass_frees_what_the_forward_pass_kept():
    layers = 8
    with fake_cuda_device(), DeviceMonitor() as monitor:
        x = mebibytes(1).requires_grad_()
        y = x
        for _ in range(layers):
            y = y.sigmoid()  # keeps its output
        loss = y.sum()
        del y
        assert monitor.live_bytes // MIB == 1 + layers
        loss.backward()
        assert x.grad.shape == x.shape
        assert monitor.live_bytes // MIB == 2
        # At most two gradients more than the kept tensors.
        assert monitor.peak_bytes // MIB <= 1 + layers + 2


def test_changes_of_the_memory_layout_are_counted():
    with fake_cuda_device(), DeviceMonitor() as monitor:
        images = torch.zeros(2, 3, 8, 8, device=CUDA)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert sum(monitor.layout_changes.values()) == 1
        channels_last.contiguous()
        assert sum(monitor.layout_changes.values()) == 2
        channels_last.clone().add(1).bfloat16()
        channels_last.contiguous(memory_format=torch.channels_last)
        torch.zeros(2, 3, 1, 1, device=CUDA).contiguous(memory_format=torch.channels_last)
        assert sum(monitor.layout_changes.values()) == 2


@pytest.mark.slow
def test_memory_of_a_step_grows_with_its_images_as_measured():
    """docs/PERFORMANCE.md, cost curve of the batch in float32 on a CPU: 1,436 MiB for 16 images."""
    common = ("--device", "cuda", "--compile", "off", "--precision", "fp32", "--grad-accum-steps", "1")
    one, two, four = (count_step("ssd", load_config("H200", (*common, "--batch-size", n))) for n in "124")
    per_image = two.peak_bytes - one.peak_bytes
    assert four.peak_bytes - two.peak_bytes == pytest.approx(2 * per_image, rel=0.05)
    assert per_image / MIB == pytest.approx(1436 / 16, rel=0.15)
    assert one.state_bytes == pytest.approx(one.weight_bytes, rel=0.01)  # momentum


def test_number_of_operations_of_retinanet_does_not_depend_on_the_batch():
    flags = ("--device", "cuda", "--compile", "off", "--backbone", "resnet18", "--image-size", "128")
    sizes = [(*flags, "--batch-size", n, "--grad-accum-steps", "1") for n in ("2", "6")]
    two, six = (count_step("retinanet", load_config("H200_retinanet", words)) for words in sizes)
    assert two.operations == six.operations


def test_every_system_with_an_accelerator_has_a_card():
    without = {name for name in list_systems() if "CPU" in name or name.startswith(("toy", "synthetic"))}
    assert set(list_systems()) == set(CARDS) | without


@pytest.mark.slow
@pytest.mark.parametrize("system", CARDS)
def test_step_of_every_system_fits_its_card(system):
    fraction = next(cell for cell in describe(system) if cell.endswith("%"))
    assert float(fraction.rstrip("%")) < 90


def test_unknown_system_is_rejected(capsys):
    assert main(["nonsense"]) == 2
    assert "nonsense: no config file" in capsys.readouterr().err
