"""Blocks and epochs that remain of a run. A resumed run takes the same path as a new one."""

from collections.abc import Iterator

from detection.engine.state import RunContext, TrainState


def remaining_blocks(state: TrainState, run: RunContext) -> Iterator[range]:
    """Yield the blocks of epochs up to the next evaluation, and log the start of each.

    A resumed run skips those that it has evaluated. The log that it appends to has the start of a block in progress.
    """
    for block in run.config.eval_blocks():
        if block[-1] < state.epoch + state.epoch_evaluated:
            continue
        if state.epoch_evaluated or not run.appends_to_log:
            run.log.start("block", first_epoch_num=block.start, epoch_count=len(block))
        yield block


def remaining_epochs(block: range, state: TrainState, run: RunContext) -> Iterator[int]:
    """Start and yield the epochs of a block, and log the start of each. Continue an epoch in progress."""
    first_epoch = block.start if state.epoch_evaluated else state.epoch
    in_progress = not state.epoch_evaluated
    for epoch in range(first_epoch, block.stop):
        if not (in_progress and run.appends_to_log):
            run.log.start("epoch", epoch_num=epoch)
        if not in_progress:
            state.start_epoch(epoch)
        in_progress = False
        yield epoch
