"""What is compiled is so before the clock starts: no batch of a run makes it compile again, whatever is in it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import maskrcnn.config
import maskrcnn.train
import ssd.config
import ssd.train
from detection.engine import train_loop
from detection.runtime import device
from detection.runtime.distributed import Ranks

pytestmark = pytest.mark.skipif(not device.CAN_COMPILE, reason="--compile needs torch 2.6")

CPU = torch.device("cpu")
RANKS = Ranks(rank=0, world_size=1, device=CPU)
BACKENDS = ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
"""Without code for the device: what is traced, and whether it fits the next batch, is the same."""

SSD = ("--dataset", "toy", "--num-classes", "4", "--batch-size", "2", "--num-workers", "0", "--compile", "on")
SSD += ("--backbone", "resnet18", "--precision", "fp32")
MASK_RCNN = (*SSD, "--min-image-size", "160", "--max-image-size", "224", "--no-aspect-groups")


@pytest.fixture(params=BACKENDS)
def graphs(request, monkeypatch):
    """The number of graphs so far; whatever needs another one after its first fails."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    monkeypatch.setattr(train_loop, "move", copied)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def copied(value, device=None):
    """A batch as `prefetch.move` lays it out in the memory of an accelerator."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(*map(copied, value)) if isinstance(value, tuple) else value


def trained(benchmark, config, changed):
    """Warm up, then train the batches of an epoch and of what `changed` makes of the last."""
    run = SimpleNamespace(config=config, ranks=RANKS, progress=SimpleNamespace(say=str))
    state = train_loop.build(benchmark, config, RANKS)
    train_loop.warm_up(state, benchmark, run)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for share in map(copied, benchmark.open_data().shares(1, 0)):
        train_loop.train_step(state, share, 0.0, benchmark, config, RANKS)
    for batch in map(copied, changed(share.batch)):
        train_loop.train_step(state, share._replace(batch=batch), 0.0, benchmark, config, RANKS)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    return before


def test_ssd_is_three_graphs_for_any_number_of_boxes(graphs, handful):
    def changed(batch):
        for count in (2, 40):  # the loader makes no room for fewer than two
            boxes_xyxy, labels = batch.boxes_xyxy[:, :1].repeat(1, count, 1), batch.labels[:, :1].repeat(1, count)
            yield batch._replace(boxes_xyxy=boxes_xyxy, labels=labels)

    config = ssd.config.load([*SSD, "--data-dir", str(handful)], {}).config
    benchmark = ssd.train.make_benchmark(config, RANKS, 0, ssd.train.make_model(config), SimpleNamespace(detect=None))
    assert trained(benchmark, config, changed) == graphs() == 3  # before the network, the network, its loss


@pytest.mark.slow
def test_mask_rcnn_is_four_graphs_for_images_of_any_size_with_or_without_objects(graphs, handful):
    def changed(batch):
        for height, width in ((160, 160), (192, 128)):
            images = torch.zeros(2, 3, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
            yield batch._replace(images=images, sizes_hw=torch.tensor([[height, width]] * 2))
        yield batch._replace(labels=torch.zeros_like(batch.labels))

    config = maskrcnn.config.load([*MASK_RCNN, "--data-dir", str(handful)], {}).config
    model = maskrcnn.train.make_model(config)
    benchmark = maskrcnn.train.make_benchmark(config, RANKS, 0, model, SimpleNamespace())
    assert trained(benchmark, config, changed) == graphs() == 4  # trunk, proposals, and the two heads
