"""Training and evaluation on a fake CUDA device: no mixed devices, and no unexpected host synchronization."""

from pathlib import Path

import numpy as np
import pytest
import torch

import maskrcnn.config
import maskrcnn.evaluator
import maskrcnn.train
import retinanet.commands
import retinanet.config
import ssd.config
import ssd.evaluator
import ssd.train
from detection.data.batch import RankBatch
from detection.data.device_cache import DeviceImageCache
from detection.data.image_pipeline import CropSpec
from detection.data.prefetch import to_device
from detection.engine import train_loop
from detection.engine.initialization import build_state
from detection.evaluation import box_evaluator
from detection.runtime.distributed import DistContext
from narrow_ssd import make_narrow
from perf import fake_cuda
from perf.fake_cuda import CUDA, fake_cuda_device
from perf.step_costs import DeviceMonitor

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_set_only_lift_cpu_tensors"), reason=f"torch {torch.__version__} hides copies of constants"
)

RANKS = DistContext(rank=0, world_size=1, device=CUDA)
COMMON = ("--num-classes", "5", "--batch-size", "2", "--eval-batch-size", "2", "--compile", "off")
SMALL = ("--backbone", "resnet18", "--min-image-size", "96", "--max-image-size", "128")
SMALL += ("--rpn-post-nms-top-n-per-image", "25")


@pytest.fixture(autouse=True)
def narrow_ssd(monkeypatch):
    make_narrow(monkeypatch)


def ssd_workload(*flags):
    config = ssd.config.load([*COMMON, *flags], {}).config
    evaluation = ssd.evaluator.SSDEvaluator(config, RANKS)
    return ssd.train.make_workload(config, RANKS, 0, ssd.train.make_model(config), evaluation), config


def maskrcnn_workload(*flags):
    config = maskrcnn.config.load([*COMMON, *SMALL, *flags], {}).config
    detect = maskrcnn.train.predict
    evaluation = maskrcnn.evaluator.MaskRCNNEvaluator(config, RANKS, detect)
    return maskrcnn.train.make_workload(config, RANKS, 0, maskrcnn.train.make_model(config), evaluation), config


def retinanet_workload(*flags):
    small = ("--backbone", "resnet18", "--image-size", "128")
    config = retinanet.config.load([*COMMON, *small, *flags], {}).config
    return retinanet.commands.make_random_workload(config, RANKS), config


def training_syncs(syncs, workload, config):
    """Return the synchronizations of the second of two training steps, which never change the memory layout."""
    state = build_state(workload, config, RANKS)
    # Mask R-CNN has a new number of regions at each step.
    assert torch.backends.cudnn.benchmark == (config.benchmark != "maskrcnn")
    rank_batch = to_device(RankBatch(workload.dummy_batch(), config.batch_size, 1 / config.batch_size), CUDA)
    with DeviceMonitor() as monitor:
        for _ in range(2):
            syncs.take()
            monitor.restart()
            loss = train_loop.train_step(state, rank_batch, workload, config, RANKS)
    assert loss.device == CUDA
    if config.channels_last != "off":
        assert monitor.layout_changes == {}
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.device == CUDA for parameter in trained)
    assert len(state.optimizer.state) == len(trained)
    return syncs.take()


def prediction_syncs(syncs, workload, config):
    """Return the synchronizations of a prediction, its batch, and its detections."""
    state = build_state(workload, config, RANKS)
    state.model.eval()
    batch = to_device(workload.dummy_eval_batch(), CUDA)
    syncs.take()
    with torch.inference_mode(), state.precision.autocast(CUDA):
        detections = workload.predict(state.model, batch)
    return syncs.take(), batch, detections


def test_fake_device_rejects_mixed_devices_and_counts_synchronizations():
    with fake_cuda_device() as syncs:
        on_device = torch.zeros(4, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            on_device + torch.zeros(4)
        with pytest.raises(RuntimeError, match="device"):
            to_device(on_device, CUDA).add_(torch.zeros(4))
        assert syncs.take() == {}
        for operation, name in (
            (lambda: on_device.sum().item(), "aten::_local_scalar_dense"),
            (lambda: bool(on_device.any()), "aten::_local_scalar_dense"),
            (on_device.tolist, "tolist"),
            (on_device.cpu, "from cuda to cpu"),
            (lambda: torch.tensor([1.0], device=CUDA), "from cpu to cuda"),
            (lambda: on_device.new_tensor([1.0]), "from cpu to cuda"),
            (on_device.nonzero, "aten::nonzero"),
            (lambda: on_device[on_device > 0], "aten::index"),
            (on_device.unique, "aten::_unique2"),
            (lambda: torch.equal(on_device, on_device), "aten::equal"),
            (lambda: to_device(torch.zeros(2), CUDA), "from cpu to cuda"),
        ):
            operation()
            assert [recorded for _, recorded in syncs.take()] == [name]
    assert fake_cuda.ANCHORS[0]().boxes_xyxy.device.type == "cpu"


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--precision", "fp16", "--grad-accum-steps", "2"),
        ("--precision", "fp32", "--channels-last", "off", "--flip", "horizontal+vertical"),
        ("--precision", "bf16", "--network", "ssd300-r50", "--bias-lr-factor", "2", "--freeze-batch-norm"),
    ],
)
def test_ssd_training_step_never_synchronizes(flags):
    with fake_cuda_device() as syncs:
        assert training_syncs(syncs, *ssd_workload(*flags)) == {}


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--precision", "fp16", "--grad-accum-steps", "2", "--optimizer", "adamw"),
        ("--precision", "fp32", "--channels-last", "off", "--no-freeze-batch-norm", "--freeze-at", "0"),
    ],
)
def test_retinanet_training_step_never_synchronizes(flags):
    with fake_cuda_device() as syncs:
        assert training_syncs(syncs, *retinanet_workload(*flags)) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ssd_training_step_never_synchronizes_on_a_real_gpu(precision):
    workload, config = ssd_workload("--precision", precision)
    state = build_state(workload, config, RANKS)
    rank_batch = to_device(RankBatch(workload.dummy_batch(), config.batch_size, 1 / config.batch_size), CUDA)
    train_loop.train_step(state, rank_batch, workload, config, RANKS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_loop.train_step(state, rank_batch, workload, config, RANKS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ssd_prediction_synchronizes_independently_of_the_batch_size(precision):
    by_size = []
    for size in ("2", "5"):
        with fake_cuda_device() as syncs:
            counts, batch, detections = prediction_syncs(
                syncs, *ssd_workload("--precision", precision, "--eval-batch-size", size)
            )
            syncs.take()
            rows = box_evaluator.to_result_rows(detections, batch.image_indices, batch.sizes_wh)
            assert (rows.device, rows.dtype, syncs.take()) == (CUDA, torch.float64, {})
        by_size.append(counts)
        # Counts candidates and kept boxes, and repeats suppression until nothing changes.
        assert {function.split(" ")[0] for function, _ in counts} == {"ssd/postprocess.py", "detection/nn/nms.py"}
        assert sum(counts.values()) < 40
    assert by_size[0] == by_size[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_retinanet_prediction_synchronizes_independently_of_the_batch_size(precision):
    by_size = []
    for size in ("2", "5"):
        with fake_cuda_device() as syncs:
            counts, _, detections = prediction_syncs(
                syncs, *retinanet_workload("--precision", precision, "--eval-batch-size", size)
            )
            assert {tensor.device for tensor in detections} == {CUDA}
        by_size.append(counts)
    assert by_size[0] == by_size[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--precision", "fp16", "--batch-size", "3", "--channels-last", "off", "--roi-align", "gather"),
        ("--precision", "fp32", "--variant", "torchvision"),
        ("--precision", "bf16", "--grad-accum-steps", "2", "--no-freeze-batch-norm", "--batch-norm-eps", "1e-5"),
    ],
)
def test_mask_rcnn_training_step_synchronizes_twice(flags):
    with fake_cuda_device() as syncs:
        workload, config = maskrcnn_workload(*flags)
        counts = training_syncs(syncs, workload, config)
    assert counts == {
        ("detection/nn/nms.py nms_parallel", "aten::equal"): config.grad_accum_steps,  # of all levels and images
        ("maskrcnn/model.py MaskRCNN.head_losses", "aten::nonzero"): config.grad_accum_steps,  # regions with a mask
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mask_rcnn_prediction_synchronizes_four_times(precision):
    with fake_cuda_device() as syncs:
        counts, _, detections = prediction_syncs(syncs, *maskrcnn_workload("--precision", precision))
        assert {tensor.device for tensor in detections} == {CUDA}
    assert counts == {
        ("detection/nn/nms.py nms_parallel", "aten::equal"): 2,  # pyramid levels, classes
        ("maskrcnn/postprocess.py select_detections", "aten::_local_scalar_dense"): 1,  # candidates of a class
        ("maskrcnn/model.py MaskRCNN.detect", "aten::nonzero"): 1,  # detections
    }


def test_cached_images_are_resized_on_the_device_without_synchronization(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    sizes_hw = np.array([[48, 64], [64, 48], [50, 50]], dtype=np.int32)
    with fake_cuda_device() as syncs:
        cache = DeviceImageCache(sizes_hw, 2**20, Path, CUDA, device_decodes=False, compiled=False)
        cache.pipeline.is_cached[:] = 1
        sources = [cache.pipeline.read(image, Path("absent")) for image in (2, 0)]
        sent = cache.pipeline.collate([CropSpec(source, (4, 5, 40, 47), (30, 20)) for source in sources])
        syncs.take()
        images = cache.assemble_batch(sent)
        assert (images.device, images.shape, images.dtype) == (CUDA, (2, 3, 30, 20), torch.uint8)
        assert syncs.take() == {
            ("detection/data/prefetch.py move", "from cpu to cuda"): 12
        }  # from pinned memory in a real run
