from types import SimpleNamespace

import pytest
import torch

from detection.config.settings import InputError
from detection.runtime import device

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(device, "current_accelerator", lambda: None)


def test_auto_selects_the_cpu_without_an_accelerator(no_accelerator):
    assert device.select_device("auto", local_rank=3) == CPU


def test_a_missing_accelerator_is_rejected(no_accelerator):
    with pytest.raises(InputError, match=r"--device cuda: torch .* finds no accelerator"):
        device.select_device("cuda", local_rank=0)


def test_an_unknown_device_type_is_rejected():
    with pytest.raises(InputError, match=r"--device nonsense: unknown device type in torch"):
        device.select_device("nonsense", local_rank=0)


def test_more_ranks_than_accelerators_are_rejected(monkeypatch):
    monkeypatch.setattr(device, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="requires at least 3 accelerators, but 2 are available"):
        device.select_device("auto", local_rank=2)


@pytest.mark.parametrize(
    ("name", "dtype", "scaled"),
    [("bf16", torch.bfloat16, False), ("fp16", torch.float16, True), ("tf32", None, False), ("fp32", None, False)],
)
def test_a_precision_sets_data_type_and_gradient_scaling(name, dtype, scaled):
    precision = device.select_precision(name, CPU)
    assert (precision.name, precision.dtype, precision.scale_gradients) == (name, dtype, scaled)
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    with precision.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize(
    ("device_type", "has_native_bf16", "name"),
    [("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")],
)
def test_auto_precision_prefers_native_bf16(monkeypatch, device_type, has_native_bf16, name):
    monkeypatch.setattr(device, "has_native_bf16", lambda _: has_native_bf16)
    assert device.select_precision("auto", torch.device(device_type)).name == name


def test_older_torch_does_not_compile(monkeypatch):
    monkeypatch.setattr(device, "CAN_COMPILE", False)
    assert not device.should_compile("auto", torch.device("cuda"))
    with pytest.raises(InputError, match=r"--compile on: requires torch 2\.6, this is"):
        device.should_compile("on", CPU)
    with device.force_eager():
        pass


def test_the_collective_backend_depends_on_the_device():
    assert device.collective_backend(CPU) == "gloo"
    assert device.collective_backend(torch.device("cuda", 1)) == "nccl"


@pytest.fixture
def older_torch(monkeypatch):
    """Simulate torch 2.4, which has no torch.accelerator and loads no vendor packages."""
    monkeypatch.delattr(torch, "accelerator", raising=False)
    monkeypatch.delattr(torch, "_is_device_backend_autoload_enabled", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.load_backends.cache_clear()
    yield monkeypatch
    device.load_backends.cache_clear()


def register_vendor(monkeypatch, loaded):
    entry_point = SimpleNamespace(name="vendor", load=lambda: loaded)
    monkeypatch.setattr(device, "entry_points", lambda group: [entry_point] if group == "torch.backends" else [])


def test_older_torch_loads_a_vendor_package_once(older_torch):
    def load():
        older_torch.setattr(torch, "privateuseone", SimpleNamespace(is_available=lambda: True), raising=False)
        loads.append(1)

    loads: list[int] = []
    register_vendor(older_torch, load)
    assert [device.current_accelerator() for _ in range(2)] == [torch.device("privateuseone")] * 2
    assert len(loads) == 1


def test_a_broken_vendor_package_is_named(older_torch):
    def load():
        raise OSError("libvendor.so: cannot open shared object file")

    register_vendor(older_torch, load)
    with pytest.raises(InputError, match=r"vendor: this torch backend failed to load \(libvendor.so"):
        device.select_device("auto", 0)


def test_older_torch_without_a_device_finds_no_accelerator(older_torch):
    assert device.current_accelerator() is None


@pytest.mark.parametrize(
    ("device_type", "fixed_input_size", "is_enabled"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_kernels_are_autotuned_only_for_a_fixed_input_size(monkeypatch, device_type, fixed_input_size, is_enabled):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not is_enabled)
    device.set_kernel_autotune(torch.device(device_type), fixed_input_size=fixed_input_size)
    assert torch.backends.cudnn.benchmark == is_enabled


def test_a_device_constant_equals_a_copied_tensor():
    values = (0.485, 1 / 3, -2)
    assert torch.equal(device.device_constant(values, CPU), torch.tensor(values))
    assert torch.equal(device.device_constant((3, 2**40), CPU, torch.int64), torch.tensor([3, 2**40]))


def test_backend_without_properties_reports_neither_memory_nor_address(monkeypatch):
    known = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(
            total_memory=(index + 1) * 2**30, pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0
        )
    )
    second = torch.device("cuda", 1)
    for backend, memory_gib, address in ((known, 2, "0000:dc:00.0"), (SimpleNamespace(), None, None)):
        monkeypatch.setattr(device, "backend_module", lambda _, backend=backend: backend)
        assert device.total_memory_gib(second) == memory_gib
        assert device.pci_address(second) == address
