"""Compilation finishes before the timer starts, and no batch of a run triggers a recompilation."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import maskrcnn.config
import maskrcnn.train
import retinanet.commands
import ssd.config
import ssd.train
from detection.engine import initialization, train_loop
from detection.runtime import device
from detection.runtime.distributed import DistContext
from narrow_ssd import make_narrow
from tiny_retinanet import make_config as make_retinanet_config

pytestmark = pytest.mark.skipif(not device.CAN_COMPILE, reason="--compile needs torch 2.6")

CPU = torch.device("cpu")
RANKS = DistContext(rank=0, world_size=1, device=CPU)
BACKENDS = ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
"""Backends without code generation. Graphs and guards are the same."""

SSD = ("--dataset", "toy", "--num-classes", "4", "--batch-size", "2", "--num-workers", "0", "--compile", "on")
SSD += ("--backbone", "resnet18", "--precision", "fp32")
MASK_RCNN = (*SSD, "--min-image-size", "160", "--max-image-size", "224", "--no-group-by-aspect-ratio")


@pytest.fixture(params=BACKENDS)
def graphs(request, monkeypatch):
    """Function that returns the number of graphs so far. Recompilation raises."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    monkeypatch.setattr(initialization, "to_device", copy_batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def copy_batch(value, device=None):
    """Copy a batch to new memory, as `prefetch.to_device` does on an accelerator."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(*map(copy_batch, value)) if isinstance(value, tuple) else value


def count_warmup_graphs(workload, config, variants_of):
    """Warm up, then train on an epoch and on variants of its last batch. Return the number of graphs after warm-up."""
    run = SimpleNamespace(config=config, ranks=RANKS, logger=SimpleNamespace(print=str))
    state = initialization.build_state(workload, config, RANKS)
    initialization.warm_up(state, workload, run, train_loop.train_step)
    after_warm_up = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rank_batch in map(copy_batch, workload.make_train_source().train_batches(1, 0)):
        train_loop.train_step(state, rank_batch, workload, config, RANKS)
    for batch in map(copy_batch, variants_of(rank_batch.batch)):
        train_loop.train_step(state, rank_batch._replace(batch=batch), workload, config, RANKS)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    return after_warm_up


def test_ssd_compiles_to_three_graphs_for_any_number_of_boxes(graphs, four_image_coco, monkeypatch):
    make_narrow(monkeypatch)

    def variants_of(batch):
        for count in (2, 40):  # the loader pads to at least two
            boxes_xyxy, labels = batch.boxes_xyxy[:, :1].repeat(1, count, 1), batch.labels[:, :1].repeat(1, count)
            yield batch._replace(boxes_xyxy=boxes_xyxy, labels=labels)

    config = ssd.config.load([*SSD, "--data-dir", str(four_image_coco)], {}).config
    workload = ssd.train.make_workload(
        config, RANKS, 0, ssd.train.make_model(config), SimpleNamespace(predict=None, evaluate_other=None)
    )
    assert count_warmup_graphs(workload, config, variants_of) == graphs() == 3  # preprocessing, network, loss


@pytest.mark.slow
def test_mask_rcnn_compiles_to_four_graphs_for_any_image_size_and_objects(graphs, four_image_coco):
    def variants_of(batch):
        for height, width in ((160, 160), (192, 128)):
            images = torch.zeros(2, 3, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
            yield batch._replace(images=images, sizes_hw=torch.tensor([[height, width]] * 2))
        yield batch._replace(labels=torch.zeros_like(batch.labels))

    config = maskrcnn.config.load([*MASK_RCNN, "--data-dir", str(four_image_coco)], {}).config
    model = maskrcnn.train.make_model(config)
    workload = maskrcnn.train.make_workload(config, RANKS, 0, model, SimpleNamespace(evaluate_other=None))
    assert count_warmup_graphs(workload, config, variants_of) == graphs() == 4  # backbone, proposals, and the two heads


@pytest.mark.slow
def test_retinanet_compiles_to_three_graphs_for_any_image_size_and_number_of_boxes(graphs, four_image_coco):
    def variants_of(batch):
        for height, width in ((160, 160), (192, 128)):
            images = torch.zeros(2, 3, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
            yield batch._replace(images=images, sizes_hw=torch.tensor([[height, width]] * 2))
        for count in (2, 40):
            boxes_xyxy, labels = batch.boxes_xyxy[:, :1].repeat(1, count, 1), batch.labels[:, :1].repeat(1, count)
            yield batch._replace(boxes_xyxy=boxes_xyxy, labels=labels)

    config = make_retinanet_config("--compile", "on", "--data-dir", str(four_image_coco))
    workload = retinanet.commands.make_random_workload(config, RANKS)
    assert count_warmup_graphs(workload, config, variants_of) == graphs() == 3  # resize, network, losses
