"""Progress of a run: a bar or lines on the terminal, and metrics.jsonl for programs."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from detection.engine.duration import format_hms
from detection.engine.trackers import TrackerGroup
from detection.runtime.device import peak_memory_gib
from detection.runtime.distributed import DistContext

# Fits 80 columns, the width of many terminals, where a wrapped bar would not be erased.
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar:10}| {remaining} to evaluation{postfix}"

# Metadata that the summary event repeats from run_start, so that it can be read on its own.
RUN_METADATA_KEYS = ("benchmark", "network", "mode", "system", "ranks", "device", "precision", "global_batch_size")


class NonFiniteLossError(ArithmeticError):
    """Non-finite loss, raised by every rank."""


class RunLogger:
    """Logger of loss and throughput, which reads the loss from the device every `log_every` steps.

    Only the first rank prints and writes. The other ranks make the same calls to take part in the mean over ranks.
    Each epoch is one line. In between, a terminal shows a bar, and a file or pipe gets one line per reading.
    """

    def __init__(
        self,
        ranks: DistContext,
        metrics_file: Path | None,
        *,
        log_every: int,
        summary_file: Path | None = None,
        trackers: TrackerGroup | None = None,
    ):
        self.ranks, self.log_every = ranks, log_every
        self.summary_file, self.trackers = summary_file, trackers or TrackerGroup()
        self.file = metrics_file.open("a", buffering=1) if metrics_file and ranks.is_main else None
        self.bar: tqdm[None] | None = None
        self.on_terminal = sys.stderr.isatty()
        self.open_s = self.clock_s = self.start_s = time.monotonic()
        self.totals = Totals()
        self.epoch_totals = Totals()
        self.last_evaluation: dict[str, object] = {"epoch": None, "metrics": {}}
        self.num_skipped = 0
        self.losses: list[Tensor] = []  # of each step since the last reading, on the device
        self.images = 0
        self.local_s = 0.0
        self.mark_s = self.pause_s = self.start_s
        self.straggler_epoch = 0
        self.stop_s = 0.0

    def start_run(self, metadata: Mapping[str, Any]) -> None:
        """Start the timed part of the run, and write `metadata` in its first event."""
        self.clock_s = time.monotonic()
        self.metadata = metadata
        start = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.write_event("run_start", start=start, init_s=round(self.clock_s - self.open_s, 3), **metadata)

    def start_epoch(self) -> None:
        """Start or resume an epoch."""
        self.epoch_totals = Totals()
        self.epoch_s = time.monotonic()

    def end_epoch(self, epoch: int, *, step: int) -> None:
        """Log the end of an epoch after `step` steps of the run. All its losses must have been read."""
        totals = self.epoch_totals
        totals.train_s = time.monotonic() - self.epoch_s
        loss, rate = totals.loss_sum / max(1, totals.steps), totals.images / totals.train_s
        self.write_event(
            "epoch",
            epoch=epoch,
            step=step,
            loss=loss,
            images=totals.images,
            images_per_s=rate,
            seconds=round(totals.train_s, 3),
            skipped_steps=totals.skipped_steps,
        )
        self.totals.train_s += totals.train_s
        self.epoch_line = f"epoch {epoch}/{self.num_epochs}"
        if totals.steps:  # none are left if a resumed run only repeats the evaluation
            skipped = f" ({totals.skipped_steps} skipped)" if totals.skipped_steps else ""
            self.epoch_line += f": loss {loss:.3f}{skipped}, {rate:.1f} img/s"
        if epoch != self.block[-1]:
            self.print(f"{self.epoch_line}, {format_hms(totals.train_s)}")

    def stop_timer(self) -> None:
        """Stop the timer of the run."""
        self.stop_s = time.monotonic()

    def finish(self, *, converged: bool, other_eval_images: Mapping[str, object] | None = None, **more: object) -> None:
        """Write the summary of the run. more: additional fields."""
        now_s = time.monotonic()
        stop_s = self.stop_s or now_s
        totals = self.totals
        self.write_summary(
            {
                **{name: self.metadata[name] for name in RUN_METADATA_KEYS},
                "converged": converged,
                **self.last_evaluation,
                "targets": self.metadata["targets"],
                "e2e_s": round(now_s - self.open_s, 3),
                "init_s": round(self.clock_s - self.open_s, 3),
                "run_s": round(stop_s - self.clock_s, 3),
                "train_s": round(totals.train_s, 3),
                "eval_s": round(totals.eval_s, 3),
                "images": totals.images,
                "images_per_s": totals.images / totals.train_s if totals.train_s else None,
                "skipped_steps": self.num_skipped,
                "other_eval_images": other_eval_images,
                **more,
            }
        )

    def write_summary(self, values: Mapping[str, object]) -> None:
        """Write the summary event, and the file of --summary-json."""
        self.write_event("summary", **values)
        if self.summary_file is not None and self.ranks.is_main:
            try:
                self.summary_file.write_text(json.dumps(values, indent=2) + "\n")
            except OSError as error:
                self.print(f"warning: {self.summary_file}: not written: {error.strerror}")

    def start_training(self, steps_per_epoch: int, num_epochs: int, first_step: int, skipped_steps: Tensor) -> None:
        """Start the estimate of the remaining time, at `first_step`.

        skipped_steps: the counter of steps that the gradient scaler skipped, (), read together with the losses.
        """
        self.skipped_counter, self.num_skipped = skipped_steps, int(skipped_steps)
        self.steps_per_epoch, self.num_epochs, self.first_step = steps_per_epoch, num_epochs, first_step
        self.num_steps = steps_per_epoch * num_epochs
        self.start_s = self.mark_s = time.monotonic()

    def start_block(self, block: range, step: int) -> None:
        """Start the bar of the epochs up to the next evaluation, after `step` steps of the run."""
        self.block = block
        if self.ranks.is_main and self.on_terminal:
            self.bar = tqdm(
                total=len(block) * self.steps_per_epoch,
                initial=max(0, step - (block.start - 1) * self.steps_per_epoch),
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                leave=False,
            )
            self.bar.set_description_str(f"epoch {block.start}/{self.num_epochs}")

    def log_step(self, step: int, epoch: int, *, loss: Tensor, num_images: int, lr: float, local_step_s: float) -> None:
        """Count a step.

        loss: this rank's loss terms (L,) on the device, which are not read here. local_step_s: time of the step on this
        rank before the first collective operation.
        """
        self.losses.append(loss)
        self.local_s += local_step_s
        self.images += num_images
        if self.bar is not None:
            self.bar.update()
        if len(self.losses) == self.log_every:
            self.flush_losses(step, epoch, lr=lr)

    def flush_losses(self, step: int, epoch: int, *, lr: float) -> None:
        """Log the mean loss since the last call. Raise NonFiniteLossError on every rank if it is not finite."""
        steps = len(self.losses)
        if not steps:
            return
        local_step_s = torch.full((1,), self.local_s / steps, device=self.ranks.device)
        rows = self.ranks.all_gather_rows(torch.cat([*self.losses, local_step_s])[None]).cpu().double()
        terms, local_step_s_by_rank = rows[:, :-1].unflatten(1, (steps, -1)), rows[:, -1].tolist()
        losses = terms.sum(dim=2).mean(dim=1).tolist()  # of each rank
        loss = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
        median_loss = terms.sum(dim=2).mean(dim=0).median().item()
        means = dict(zip(self.metadata["loss_names"], terms.mean(dim=(0, 1)).tolist(), strict=True))
        now_s = time.monotonic()
        step_s = (now_s - self.mark_s) / steps
        rate = self.images / (now_s - self.mark_s)
        memory_gib = peak_memory_gib(self.ranks.device)
        for totals in (self.totals, self.epoch_totals):
            totals.add(steps, self.images, loss * steps)
        num_skipped = int(self.skipped_counter)
        self.epoch_totals.skipped_steps += num_skipped - self.num_skipped
        self.num_skipped = num_skipped
        self.losses = []
        self.images = 0
        self.local_s = 0.0
        self.mark_s = now_s
        self.write_event(
            "step",
            step=step,
            epoch=epoch,
            lr=lr,
            loss=loss,
            loss_median=median_loss,
            losses=means,
            images_per_s=rate,
            memory_gib=round(memory_gib, 3),
        )
        remaining_s = (now_s - self.start_s) / (step + 1 - self.first_step) * (self.num_steps - step - 1)
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {epoch}/{self.num_epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:.1f} img/s")
        elif not self.on_terminal:
            parts_text = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            self.print(
                f"epoch {epoch}/{self.num_epochs}  step {step + 1}/{self.num_steps}  loss {loss:.3f} "
                f"(median {median_loss:.3f}; {parts_text})  lr {lr:.3g}  {rate:.1f} img/s  {memory_gib:.1f} GiB  "
                f"{format_hms(remaining_s)} left"
            )
        if epoch != self.straggler_epoch and (straggler := find_straggler(local_step_s_by_rank, step_s)) is not None:
            self.straggler_epoch = epoch  # warn once per epoch
            self.print(
                f"warning: rank {straggler} is a straggler: {local_step_s_by_rank[straggler]:.2g} s of local work per "
                f"step, the median of all ranks is {median(local_step_s_by_rank):.2g} s. "
                "Check its host, data and accelerator."
            )
        if not math.isfinite(loss):
            bad_ranks = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
            raise NonFiniteLossError(
                f"non-finite loss: {losses[int(bad_ranks[0])]} at step {step} of epoch {epoch} "
                f"(learning rate {lr:.3g}), on rank {', '.join(bad_ranks)}. "
                "Lower --base-lr, raise --warmup-steps, or check the data that was read last."
            )

    def pause(self) -> None:
        """Stop the throughput timer and the bar, for an evaluation."""
        self.pause_s = time.monotonic()
        if self.bar is not None:
            self.bar.bar_format = "{desc} evaluating"
            self.bar.refresh()

    def resume(self) -> None:
        """Restart the throughput timer."""
        paused_s = time.monotonic() - self.pause_s
        self.mark_s += paused_s
        self.start_s += paused_s

    def log_evaluation(self, epoch: int, metrics: Mapping[str, float], targets: Mapping[str, float]) -> None:
        """Log the metrics of an evaluation and their distance from the targets. Epoch 0 is before training."""
        self.last_evaluation = {"epoch": epoch, "metrics": dict(metrics)}
        seconds = time.monotonic() - self.pause_s
        self.totals.eval_s += seconds
        self.write_event("evaluation", epoch=epoch, seconds=round(seconds, 3), metrics=dict(metrics))
        self.close_bar()
        if epoch:
            scores = ", ".join(f"{name} {metrics[name]:.4f}" for name in targets)
            self.print(f"{self.epoch_line}, {scores}, {format_hms(self.epoch_totals.train_s + seconds)}")
        else:
            self.print(f"evaluation of the initial weights, {format_hms(seconds)}")
        if not metrics:
            self.print("no metrics: the evaluation images have no annotations")
            return
        self.print(format_metrics(metrics))
        for name, target in targets.items():
            gap = metrics[name] - target
            self.print(
                f"  {name} {metrics[name]:.4f}, {abs(gap):.4f} {'above' if gap >= 0 else 'below'} the target {target}"
            )

    def print(self, text: str) -> None:
        """Print a line on the first rank, above the bar."""
        if not self.ranks.is_main:
            return
        self.hide_bar()
        print(text, flush=True)

    def hide_bar(self) -> None:
        """Clear the bar until the next step, so that another line can be printed."""
        if self.bar is not None:
            self.bar.clear()

    def write_event(self, event: str, **values: object) -> None:
        """Append an event to metrics.jsonl. docs/METRICS_JSONL.md describes the fields."""
        self.trackers.log_event(event, values)
        self.print_tracker_warnings()
        if self.file is not None:
            line = {"event": event, "time_s": round(time.monotonic() - self.clock_s, 3), **values}
            try:
                self.file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk ends the metrics, not the run
                self.file = None
                self.print(f"warning: metrics.jsonl: {error.strerror}. No further events are written.")

    def file_offset(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return os.fstat(self.file.fileno()).st_size if self.file is not None else 0

    def close_bar(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Remove the bar and close all files."""
        self.close_bar()
        if self.file is not None:
            self.file.close()
        self.trackers.close()
        self.print_tracker_warnings()

    def print_tracker_warnings(self) -> None:
        """Print why trackers were dropped."""
        for warning in self.trackers.warnings:
            self.print(warning)
        self.trackers.warnings.clear()


@dataclass
class Totals:
    """Steps, images and time so far. train_s excludes evaluations, eval_s is evaluations only.

    skipped_steps: steps that the gradient scaler skipped, counted for epochs only.
    """

    steps: int = 0
    images: int = 0
    loss_sum: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0
    skipped_steps: int = 0

    def add(self, steps: int, images: int, loss_sum: float) -> None:
        """Add steps and their summed loss."""
        self.steps += steps
        self.images += images
        self.loss_sum += loss_sum


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format metrics as a table of at most 80 columns, with a row for boxes and one for masks, if any."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, stat = name.rpartition("_")
        rows.setdefault(kind or "box", {})[stat] = value
    lines = ["      " + "".join(f"{stat:>6}" for stat in rows["box"])]
    for kind, row in rows.items():
        lines.append(f"  {kind:<4}" + "".join(f"{'-' if value == -1 else f'{value:.3f}':>6}" for value in row.values()))
    return "\n".join(lines)


def find_straggler(local_step_s: list[float], step_s: float) -> int | None:
    """Return the slowest rank if it delays the others by at least 10% of the step and takes 1.5 times as long."""
    if len(local_step_s) == 1:
        return None
    rank = max(range(len(local_step_s)), key=local_step_s.__getitem__)
    typical_s = median(local_step_s[:rank] + local_step_s[rank + 1 :])
    return rank if local_step_s[rank] > max(1.5 * typical_s, typical_s + 0.1 * step_s) else None
