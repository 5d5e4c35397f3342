"""One rank's part of a global batch."""

from typing import Generic, NamedTuple, TypeVar

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
