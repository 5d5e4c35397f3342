"""What a run says while it trains: a bar or plain lines for people, metrics.jsonl for programs."""

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

from detection.engine.tensorboard import Board
from detection.runtime.device import peak_memory_gib
from detection.runtime.distributed import Ranks

# What the last event of a run repeats from its first, so that each can be read by itself.
SHARED_FACTS = ("benchmark", "network", "mode", "system", "ranks", "device", "precision", "global_batch_size")


class Diverged(ArithmeticError):
    """The loss is no longer a number: every rank stops."""


class Progress:
    """Loss and throughput of a run, read from the device only every `log_every` steps.

    Only the first rank prints and writes; on the others the same calls take part in the mean over ranks.
    On a terminal there is a bar, elsewhere a line each time the loss is read.
    """

    def __init__(
        self,
        ranks: Ranks,
        metrics_file: Path | None,
        *,
        log_every: int,
        summary_file: Path | None = None,
        board: Board | None = None,
    ):
        self.ranks, self.log_every = ranks, log_every
        self.summary_file, self.board = summary_file, board
        self.file = metrics_file.open("a", buffering=1) if metrics_file and ranks.is_first else None
        self.bar: tqdm[None] | None = None
        self.on_terminal = sys.stderr.isatty()
        self.open_s = self.clock_s = self.start_s = time.monotonic()
        self.totals = Totals()
        self.epoch_totals = Totals()
        self.last_evaluation: dict[str, object] = {"epoch": None, "metrics": {}}
        self.losses: list[Tensor] = []  # of each step since they were last read, on the device
        self.images = 0
        self.alone_s = 0.0
        self.mark_s = self.pause_s = self.start_s
        self.slow_epoch = 0

    def start_clock(self, facts: Mapping[str, Any]) -> None:
        """The clock runs; facts: what the run is, for its first event."""
        self.clock_s = time.monotonic()
        self.facts = facts
        start = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.write("run_start", start=start, init_s=round(self.clock_s - self.open_s, 3), **facts)

    def begin_epoch(self) -> None:
        """An epoch starts, or goes on."""
        self.epoch_totals = Totals()
        self.epoch_s = time.monotonic()

    def end_epoch(self, epoch: int, *, step: int) -> None:
        """An epoch is over, after `step` steps of the run; all its losses are read."""
        done = self.epoch_totals
        done.train_s = time.monotonic() - self.epoch_s
        self.write(
            "epoch",
            epoch=epoch,
            step=step,
            loss=done.loss_sum / max(1, done.steps),
            images=done.images,
            images_per_s=done.images / done.train_s,
            seconds=round(done.train_s, 3),
        )
        self.totals.train_s += done.train_s

    def end(self, *, converged: bool, **more: object) -> None:
        """The run is over: its last event, and the file of --summary-json. more: what else is to be said."""
        now_s = time.monotonic()
        done = self.totals
        self.summarise(
            {
                **{name: self.facts[name] for name in SHARED_FACTS},
                "converged": converged,
                **self.last_evaluation,
                "targets": self.facts["targets"],
                "e2e_s": round(now_s - self.open_s, 3),
                "init_s": round(self.clock_s - self.open_s, 3),
                "run_s": round(now_s - self.clock_s, 3),
                "train_s": round(done.train_s, 3),
                "eval_s": round(done.eval_s, 3),
                "images": done.images,
                "images_per_s": done.images / done.train_s if done.train_s else None,
                **more,
            }
        )

    def summarise(self, values: Mapping[str, object]) -> None:
        """Write the outcome of a run, as its last event and to the file of --summary-json."""
        self.write("summary", **values)
        if self.summary_file is not None and self.ranks.is_first:
            try:
                self.summary_file.write_text(json.dumps(values, indent=2) + "\n")
            except OSError as error:
                self.say(f"warning: {self.summary_file} could not be written: {error.strerror}")

    def begin(self, num_steps: int, num_epochs: int, first_step: int) -> None:
        """The data are open: of `num_steps` steps in `num_epochs` epochs those from `first_step` on lie ahead."""
        self.num_steps, self.num_epochs, self.first_step = num_steps, num_epochs, first_step
        self.start_s = self.mark_s = time.monotonic()
        if self.ranks.is_first and self.on_terminal:
            layout = "{desc} {percentage:3.0f}%|{bar:24}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=num_steps, initial=first_step, bar_format=layout, dynamic_ncols=True, leave=False)

    def step(self, step: int, epoch: int, *, loss: Tensor, num_images: int, lr: float, alone_s: float) -> None:
        """Count a step; `loss` (L,) are this rank's parts of it, on the device, and are not waited for.

        alone_s: how long the rank worked by itself, before it met the others.
        """
        self.losses.append(loss)
        self.alone_s += alone_s
        self.images += num_images
        if self.bar is not None:
            self.bar.update()
        if len(self.losses) == self.log_every:
            self.read(step, epoch, lr=lr)

    def read(self, step: int, epoch: int, *, lr: float) -> None:
        """Read the mean loss of the steps since the last time; raises Diverged on every rank if it is not finite."""
        steps = len(self.losses)
        if not steps:
            return
        seconds = torch.full((1,), self.alone_s / steps, device=self.ranks.device)
        rows = self.ranks.gather_rows(torch.cat([*self.losses, seconds])[None]).cpu().double()
        parts, alone_s = rows[:, :-1].unflatten(1, (steps, -1)), rows[:, -1].tolist()
        losses = parts.sum(dim=2).mean(dim=1).tolist()  # of each rank
        loss = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
        middle = parts.sum(dim=2).mean(dim=0).median().item()
        means = dict(zip(self.facts["loss_names"], parts.mean(dim=(0, 1)).tolist(), strict=True))
        now_s = time.monotonic()
        step_s = (now_s - self.mark_s) / steps
        rate = self.images / (now_s - self.mark_s)
        memory_gib = peak_memory_gib(self.ranks.device)
        for totals in (self.totals, self.epoch_totals):
            totals.add(steps, self.images, loss * steps)
        self.losses = []
        self.images = 0
        self.alone_s = 0.0
        self.mark_s = now_s
        self.write(
            "step",
            step=step,
            epoch=epoch,
            lr=lr,
            loss=loss,
            loss_median=middle,
            losses=means,
            images_per_s=rate,
            memory_gib=round(memory_gib, 3),
        )
        left_s = (now_s - self.start_s) / (step + 1 - self.first_step) * (self.num_steps - step - 1)
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}/{self.num_epochs}")
            self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2g}, {rate:.1f} img/s")
        elif not self.on_terminal:
            each = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            self.say(
                f"epoch {epoch}/{self.num_epochs}  step {step + 1}/{self.num_steps}  loss {loss:.3f} "
                f"(median {middle:.3f}; {each})  lr {lr:.3g}  {rate:.1f} img/s  {memory_gib:.1f} GiB  "
                f"{clock(left_s)} left"
            )
        if epoch != self.slow_epoch and (slow := slowest(alone_s, step_s)) is not None:
            self.slow_epoch = epoch  # once an epoch is enough
            self.say(
                f"warning: rank {slow} is slow: it works {alone_s[slow]:.2g} s of each step before it meets the "
                f"others, which take {median(alone_s):.2g} s. Look at its host, its data and its accelerator."
            )
        if not math.isfinite(loss):
            bad = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
            raise Diverged(
                f"The loss is {losses[int(bad[0])]} at step {step} of epoch {epoch} (learning rate {lr:.3g}), "
                f"on rank {', '.join(bad)}. "
                "Lower --base-lr, lengthen --warmup-steps, or look at the data that was read last."
            )

    def pause(self) -> None:
        """Leave what comes now, such as an evaluation, out of the throughput."""
        self.pause_s = time.monotonic()

    def resume(self) -> None:
        """Go on counting."""
        paused_s = time.monotonic() - self.pause_s
        self.mark_s += paused_s
        self.start_s += paused_s

    def evaluated(self, epoch: int, metrics: Mapping[str, float], targets: Mapping[str, float]) -> None:
        """Show the figures of an evaluation, and how far they are from the targets; epoch 0 is before training."""
        self.last_evaluation = {"epoch": epoch, "metrics": dict(metrics)}
        seconds = time.monotonic() - self.pause_s
        self.totals.eval_s += seconds
        self.write("evaluation", epoch=epoch, seconds=round(seconds, 3), metrics=dict(metrics))
        self.say(f"evaluation after epoch {epoch}" if epoch else "evaluation of the weights as they were loaded")
        for row in range(0, len(metrics), 6):
            self.say("  " + "  ".join(f"{k:>5} {v:6.4f}" for k, v in list(metrics.items())[row : row + 6]))
        for name, target in targets.items():
            gap = metrics[name] - target
            self.say(
                f"  {name} {metrics[name]:.4f}, {abs(gap):.4f} {'above' if gap >= 0 else 'below'} the target {target}"
            )

    def say(self, text: str) -> None:
        """Print a line, on the first rank, above the bar if there is one."""
        if not self.ranks.is_first:
            return
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        """Take the bar off its line, so that another may be printed there; it comes back with the next step."""
        if self.bar is not None:
            self.bar.clear()

    def write(self, event: str, **values: object) -> None:
        """Append an event to metrics.jsonl, as docs/METRICS_JSONL.md describes them."""
        if self.board is not None:
            self.board.add(event, values)
        if self.file is not None:
            line = {"event": event, "time_s": round(time.monotonic() - self.clock_s, 3), **values}
            try:
                self.file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk costs the figures, not the run
                self.file = None
                self.say(f"warning: metrics.jsonl ends here: {error.strerror}")

    def position(self) -> int:
        """How long metrics.jsonl is now, in bytes."""
        return os.fstat(self.file.fileno()).st_size if self.file is not None else 0

    def close(self) -> None:
        """Take the bar away and close the file."""
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


@dataclass
class Totals:
    """What was trained, and how long it took: train_s without evaluations, eval_s those alone."""

    steps: int = 0
    images: int = 0
    loss_sum: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0

    def add(self, steps: int, images: int, loss_sum: float) -> None:
        """Count some steps; loss_sum: the sum of their losses."""
        self.steps += steps
        self.images += images
        self.loss_sum += loss_sum


def slowest(alone_s: list[float], step_s: float) -> int | None:
    """The rank that keeps the others waiting for a tenth of the step or more and works half as long again as they."""
    if len(alone_s) == 1:
        return None
    rank = max(range(len(alone_s)), key=alone_s.__getitem__)
    usual_s = median(alone_s[:rank] + alone_s[rank + 1 :])
    return rank if alone_s[rank] > max(1.5 * usual_s, usual_s + 0.1 * step_s) else None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
