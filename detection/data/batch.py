"""One rank's part of a global batch."""

from typing import Generic, NamedTuple, TypeVar

Batch = TypeVar("Batch", bound=NamedTuple)


class Share(NamedTuple, Generic[Batch]):
    """A rank's share of a global batch.

    num_images: of the global batch. weight: what the sum of the losses of this share is multiplied by, so that
    the mean over ranks is the mean over the global batch: ranks / num_images, or 0 where the rank had nothing
    to add.
    """

    batch: Batch
    num_images: int
    weight: float
