from types import SimpleNamespace

import pytest
import torch

from detection.config.settings import InputError
from detection.runtime import device

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: None)


def test_auto_is_the_cpu_where_there_is_no_accelerator(no_accelerator):
    assert device.choose("auto", local_rank=3) == CPU


def test_an_accelerator_that_is_not_there_is_refused_with_what_is(no_accelerator):
    with pytest.raises(InputError, match=r"--device cuda: torch .* sees no accelerator here"):
        device.choose("cuda", local_rank=0)


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"--device nonsense: torch .* knows no such device"):
        device.choose("nonsense", local_rank=0)


def test_more_ranks_than_accelerators_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="asks for 3 accelerators or more, 2 are here"):
        device.choose("auto", local_rank=2)


@pytest.mark.parametrize(
    ("name", "dtype", "scaled"),
    [("bf16", torch.bfloat16, False), ("fp16", torch.float16, True), ("tf32", None, False), ("fp32", None, False)],
)
def test_a_precision_is_what_its_name_says(name, dtype, scaled):
    precision = device.precision(name, CPU)
    assert (precision.name, precision.dtype, precision.scale_gradients) == (name, dtype, scaled)
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    with precision.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize(
    ("kind", "multiplies", "name"),
    [("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")],
)
def test_auto_takes_bf16_where_the_hardware_has_it(monkeypatch, kind, multiplies, name):
    monkeypatch.setattr(device, "multiplies_bf16", lambda _: multiplies)
    assert device.precision("auto", torch.device(kind)).name == name


def test_an_older_torch_compiles_nothing_and_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(device, "CAN_COMPILE", False)
    assert not device.compiles("auto", torch.device("cuda"))
    with pytest.raises(InputError, match=r"--compile on: needs torch 2\.6 or later, this is"):
        device.compiles("on", CPU)
    with device.eager():
        pass


def test_collectives_follow_the_device():
    assert device.collective_backend(CPU) == "gloo"
    assert device.collective_backend(torch.device("cuda", 1)) == "nccl"


@pytest.fixture
def older_torch(monkeypatch):
    """A torch that has no torch.accelerator and loads no packages of vendors, as 2.4."""
    monkeypatch.delattr(torch, "accelerator", raising=False)
    monkeypatch.delattr(torch, "_is_device_backend_autoload_enabled", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.load_vendors.cache_clear()
    yield monkeypatch
    device.load_vendors.cache_clear()


def vendors_load(monkeypatch, loaded):
    point = SimpleNamespace(name="vendor", load=lambda: loaded)
    monkeypatch.setattr(device, "entry_points", lambda group: [point] if group == "torch.backends" else [])


def test_an_older_torch_is_given_the_vendors_package_once(older_torch):
    def load():
        older_torch.setattr(torch, "privateuseone", SimpleNamespace(is_available=lambda: True), raising=False)
        loads.append(1)

    loads: list[int] = []
    vendors_load(older_torch, load)
    assert [device.accelerator() for _ in range(2)] == [torch.device("privateuseone")] * 2
    assert len(loads) == 1


def test_a_vendors_package_that_breaks_is_named(older_torch):
    def load():
        raise OSError("libvendor.so: cannot open shared object file")

    vendors_load(older_torch, load)
    with pytest.raises(InputError, match=r"vendor: this backend of torch cannot be loaded \(libvendor.so"):
        device.choose("auto", 0)


def test_without_a_device_an_older_torch_says_so(older_torch):
    assert device.accelerator() is None


@pytest.mark.parametrize(
    ("kind", "one_size", "tried"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_kernels_are_tried_only_where_all_batches_have_the_same_sizes(monkeypatch, kind, one_size, tried):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tried)
    device.tune(torch.device(kind), one_size=one_size)
    assert torch.backends.cudnn.benchmark == tried


def test_a_constant_has_the_numbers_and_the_type_of_a_copied_one():
    values = (0.485, 1 / 3, -2)
    assert torch.equal(device.constant(values, CPU), torch.tensor(values))
    assert torch.equal(device.constant((3, 2**40), CPU, torch.int64), torch.tensor([3, 2**40]))
