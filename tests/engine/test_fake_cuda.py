"""A step and an evaluation on an accelerator that is none: nothing meets the CPU there, and the host does not wait."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fake_cuda
import maskrcnn.config
import maskrcnn.evaluator
import maskrcnn.train
import ssd.config
import ssd.evaluator
import ssd.train
from detection.data.device_cache import DeviceCache
from detection.data.image_pipeline import Part
from detection.data.prefetch import move
from detection.engine import train_loop
from detection.runtime.distributed import Ranks
from fake_cuda import CUDA, pretend

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_set_only_lift_cpu_tensors"), reason=f"torch {torch.__version__} copies constants unseen"
)

RANKS = Ranks(rank=0, world_size=1, device=CUDA)
COMMON = ("--num-classes", "5", "--batch-size", "2", "--eval-batch-size", "2", "--compile", "off")
SMALL = ("--backbone", "resnet18", "--min-image-size", "96", "--max-image-size", "128", "--rpn-post-nms-top-n", "50")


def ssd_benchmark(*flags):
    config = ssd.config.load([*COMMON, *flags], {}).config
    evaluation = ssd.evaluator.Evaluation(config, RANKS)
    return ssd.train.make_benchmark(config, RANKS, 0, ssd.train.make_model(config), evaluation), config


def maskrcnn_benchmark(*flags):
    config = maskrcnn.config.load([*COMMON, *SMALL, *flags], {}).config
    detect = maskrcnn.train.detect
    evaluation = maskrcnn.evaluator.Evaluation(config, RANKS, detect)
    return maskrcnn.train.make_benchmark(config, RANKS, 0, maskrcnn.train.make_model(config), evaluation), config


def training_waits(waits, benchmark, config):
    """What two steps wait for, the second time."""
    state = train_loop.build(benchmark, config, RANKS)
    assert torch.backends.cudnn.benchmark == (config.benchmark == "ssd")  # the other's regions vary at each step
    share = move(train_loop.Share(benchmark.made_up_batch(), config.batch_size, 1 / config.batch_size), CUDA)
    for _ in range(2):
        waits.taken()
        loss = train_loop.train_step(state, share, 0.1, benchmark, config, RANKS)
    assert loss.device == CUDA
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.device == CUDA for parameter in trained)
    assert len(state.optimizer.state) == len(trained)
    return waits.taken()


def detection_waits(waits, benchmark, config):
    """What a batch waits for, and what is detected."""
    state = train_loop.build(benchmark, config, RANKS)
    state.model.eval()
    batch = move(benchmark.made_up_eval_batch(), CUDA)
    waits.taken()
    with torch.inference_mode(), state.precision.autocast(CUDA):
        found = benchmark.detect(state.model, batch)
    return waits.taken(), batch, found


def test_what_mixes_devices_is_refused_there_and_what_waits_is_counted():
    with pretend() as waits:
        there = torch.zeros(4, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(4)
        with pytest.raises(RuntimeError, match="device"):
            train_loop.move(there, CUDA).add_(torch.zeros(4))
        assert waits.taken() == {}
        for wait, name in (
            (lambda: there.sum().item(), "aten::_local_scalar_dense"),
            (lambda: bool(there.any()), "aten::_local_scalar_dense"),
            (there.tolist, "tolist"),
            (there.cpu, "from cuda to cpu"),
            (lambda: torch.tensor([1.0], device=CUDA), "from cpu to cuda"),
            (lambda: there.new_tensor([1.0]), "from cpu to cuda"),
            (there.nonzero, "aten::nonzero"),
            (lambda: there[there > 0], "aten::index"),
            (there.unique, "aten::_unique2"),
            (lambda: torch.equal(there, there), "aten::equal"),
            (lambda: move(torch.zeros(2), CUDA), "from cpu to cuda"),
        ):
            wait()
            assert [what for _, what in waits.taken()] == [name]
    assert fake_cuda.ANCHORS[0]().boxes_xyxy.device.type == "cpu"


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--precision", "fp16", "--grad-accum-steps", "2"),
        ("--precision", "fp32", "--no-channels-last", "--flip", "horizontal+vertical"),
        ("--precision", "bf16", "--network", "ssd300-r50", "--bias-lr-factor", "2", "--freeze-batch-norm"),
    ],
)
def test_a_training_step_of_ssd_waits_for_nothing(flags):
    with pretend() as waits:
        assert training_waits(waits, *ssd_benchmark(*flags)) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_step_of_ssd_on_a_gpu_that_is_one_waits_for_nothing(precision):
    benchmark, config = ssd_benchmark("--precision", precision)
    state = train_loop.build(benchmark, config, RANKS)
    share = move(train_loop.Share(benchmark.made_up_batch(), config.batch_size, 1 / config.batch_size), CUDA)
    train_loop.train_step(state, share, 0.0, benchmark, config, RANKS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_loop.train_step(state, share, 0.0, benchmark, config, RANKS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ssd_waits_for_its_detections_however_many_images_there_are_alike(precision):
    by_size = []
    for size in ("2", "5"):
        with pretend() as waits:
            waited, batch, found = detection_waits(
                waits, *ssd_benchmark("--precision", precision, "--eval-batch-size", size)
            )
            category_ids = torch.zeros(5, dtype=torch.int64, device=CUDA)
            waits.taken()
            rows = ssd.evaluator.to_rows(found, batch.image_ids, batch.sizes_wh, category_ids)
            assert (rows.device, rows.dtype, waits.taken()) == (CUDA, torch.float64, {})
        by_size.append(waited)
        # Candidates and what stays of them are counted, and suppression goes on until nothing changes.
        assert {place.split(" ")[0] for place, _ in waited} == {"ssd/postprocess.py"}
        assert sum(waited.values()) < 40
    assert by_size[0] == by_size[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--precision", "fp16", "--batch-size", "3", "--no-channels-last"),
        ("--precision", "fp32", "--variant", "torchvision"),
        ("--precision", "bf16", "--grad-accum-steps", "2", "--no-freeze-batch-norm", "--batch-norm-eps", "1e-5"),
    ],
)
def test_a_training_step_of_mask_rcnn_waits_for_each_suppression_and_twice_more(flags):
    with pretend() as waits:
        benchmark, config = maskrcnn_benchmark(*flags)
        waited = training_waits(waits, benchmark, config)
    assert waited == {
        ("maskrcnn/rpn.py nms_there", "torchvision::nms"): 5 * config.batch_size,  # of each level of each image
        ("maskrcnn/model.py MaskRCNN.sample", "aten::nonzero"): config.grad_accum_steps,  # the regions to learn from
        ("maskrcnn/model.py MaskRCNN.head_losses", "aten::nonzero"): config.grad_accum_steps,  # those with a mask
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mask_rcnn_waits_for_its_detections_a_few_times_a_batch_and_for_each_suppression(precision):
    with pretend() as waits:
        waited, _, found = detection_waits(waits, *maskrcnn_benchmark("--precision", precision))
        assert {tensor.device for tensor in found} == {CUDA}
    suppressed = waited.pop(("maskrcnn/rpn.py nms_there", "torchvision::nms"))
    assert suppressed == 2 * (5 + 5)  # levels of the pyramid, and classes
    assert waited == {
        ("maskrcnn/model.py MaskRCNN.detect", "aten::nonzero"): 3,  # proposals, candidates, detections
        ("maskrcnn/model.py MaskRCNN.detect", "tolist"): 1,  # candidates of each class
    }


def test_images_that_the_device_holds_are_made_there_without_waiting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    sizes_hw = np.array([[48, 64], [64, 48], [50, 50]], dtype=np.int32)
    with pretend() as waits:
        cache = DeviceCache(sizes_hw, 2**20, Path, CUDA, device_decodes=False, compiled=False)
        cache.worker.held[:] = 1
        originals = [cache.worker.read(image, Path("not there")) for image in (2, 0)]
        sent = cache.worker.lay_out([Part(original, (4, 5, 40, 47), (30, 20)) for original in originals])
        waits.taken()
        images = cache.images(sent)
        assert (images.device, images.shape, images.dtype) == (CUDA, (2, 3, 30, 20), torch.uint8)
        assert waits.taken() == {
            ("detection/data/prefetch.py move", "from cpu to cuda"): 12
        }  # from pinned memory, in a run
