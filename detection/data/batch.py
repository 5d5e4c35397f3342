"""One rank's part of a global batch."""

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Batch = TypeVar("Batch", bound=NamedTuple)


class RankBatch(NamedTuple, Generic[Batch]):
    """One rank's part of a global batch.

    global_batch_size: images of this global batch over all ranks. The last batch of an epoch may be smaller.
    loss_weight: factor for the sum of the losses of this part, so that the mean over ranks is the mean over the
    global batch: world_size / global_batch_size, or 0 if no images are left for this rank.
    """

    batch: Batch
    global_batch_size: int
    loss_weight: float


def split_micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Split a batch along its first dimension into `count` micro-batches, or fewer if it has fewer images.

    Its fields are tensors, or such batches themselves.
    """
    parts = (field.chunk(count) if isinstance(field, Tensor) else split_micro_batches(field, count) for field in batch)
    return [type(batch)(*fields) for fields in zip(*parts, strict=True)]
