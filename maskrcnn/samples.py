"""Training images of Mask R-CNN as the network sees them, with the targets of its region proposals."""

from collections.abc import Iterator

from detection.data.coco import Split
from detection.data.train_sample import TrainSample
from detection.runtime.distributed import DistContext
from maskrcnn.anchors import make_anchors
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNTrainSource
from maskrcnn.rpn import assign_targets


def open_samples(config: Config, ranks: DistContext, seed: int) -> tuple[Split, Iterator[TrainSample]]:
    """Return the training split, and the images of its first epoch in the order of training, on the CPU."""
    source = MaskRCNNTrainSource(config, ranks, seed)
    return source.train, iter_samples(source, config)


def iter_samples(source: MaskRCNNTrainSource, config: Config) -> Iterator[TrainSample]:
    """Yield the images of the first epoch, without padding, and the anchors that match their boxes."""
    legacy = config.legacy_boxes
    for batch, _, _ in source.train_batches(1):
        height, width = batch.images.shape[2:]
        anchors = make_anchors(height, width, batch.images.device, legacy=legacy, sizes_px=config.anchor_sizes)
        index, match_labels = assign_targets(
            anchors,
            batch.boxes_xyxy,
            batch.labels > 0,
            batch.sizes_hw,
            drop_straddling=config.drop_straddling,
            legacy=legacy,
        )
        pixels = batch.images.permute(0, 2, 3, 1).numpy()
        for row, (rows, columns) in enumerate(batch.sizes_hw.tolist()):
            valid, positive = batch.labels[row] > 0, match_labels[row] == 1
            yield TrainSample.from_tensors(
                pixels[row, :rows, :columns],
                batch.boxes_xyxy[row][valid],
                batch.labels[row][valid],
                anchors[positive],
                index[row][positive],
            )
