"""The beginning and the end of every benchmark's run: ranks, folder, logs, and one message for whatever goes wrong."""

import atexit
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from detection import git_state, run_dir
from detection.checkpoint import resume
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, Topology, read_topology, to_json
from detection.data import device_cache
from detection.data.loader import WorkerLost, lost_workers_named
from detection.engine import tensorboard
from detection.engine.run_logger import Diverged, Progress
from detection.engine.state import Run
from detection.engine.tensorboard import Board
from detection.engine.train_loop import Stopped
from detection.runtime import device, numa_binding
from detection.runtime.distributed import PeerLost, Ranks, connect
from detection.runtime.signals import SIGNALS, Interrupted, Interruption, end_with_parent
from detection.runtime.watchdog import Watchdog
from mlperf.log import MlperfLog

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and what may end it."""

    ranks: Ranks
    num_nodes: int
    interruption: Interruption
    watchdog: Watchdog


def main(argv: list[str], load: Callable[[list[str]], Config], train: Callable[[Config, Process], int]) -> int:
    """Train on this rank, with settings that `load` makes of flags; returns the exit status."""
    topology = Topology()
    with Interruption() as interruption:
        try:
            config, topology = load(argv), read_topology()
            if topology.launched:
                end_with_parent()
            check_bn_group(config, topology)
            rank_device = device.choose(config.device, topology.local_rank)
            device_cache.check(config, rank_device)
            if bound := numa_binding.bind(config.numa_binding, topology, rank_device):
                print(bound, flush=True)
            with (
                Watchdog(topology.rank, config.step_timeout_s) as watchdog,
                # The watchdog speaks first: it knows where a rank hangs.
                connect(topology, rank_device, timeout_s=config.step_timeout_s + 60) as ranks,
                lost_workers_named(),
            ):
                return train(config, Process(ranks, topology.nodes, interruption, watchdog))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Stopped as stop:
            if topology.rank == 0:  # it is the same on every rank
                print(f"stopped by {stop}. What was reached is saved: --resume auto goes on.", file=sys.stderr)
            return stop.status
        except Diverged as error:
            if topology.rank == 0:  # it is the same on every rank
                print(f"error: {error}", file=sys.stderr)
            return 1
        except (PeerLost, WorkerLost) as error:
            print(f"error: rank {topology.rank}: {error}", file=sys.stderr)
            return 1
        except Interrupted as interrupted:
            return 128 + interrupted.signal_number


def check_bn_group(config: RunConfig, topology: Topology) -> None:
    """Raise InputError where the ranks do not make whole groups."""
    span = config.bn_ranks(topology.world_size)
    if topology.world_size % span:
        raise InputError(f"bn_group {span} does not divide the {topology.world_size} ranks")


@contextmanager
def opened(config: RunConfig, process: Process) -> Iterator[Run]:
    """The run's folder and logs, open; the log says whose run this is, and that it begins.

    At the end this process ends by itself, with a status of its own, whatever the launcher sends.
    """
    ranks = process.ranks
    folder = Path(ranks.broadcast(config.run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))))
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    resumed = ranks.broadcast(resume.find(config, folder) if ranks.is_first else None)
    if config.tensorboard:
        tensorboard.require()
    if ranks.is_first:
        (folder / run_dir.CONFIG).write_text(to_json(config))
    progress = Progress(
        ranks,
        folder / run_dir.METRICS,
        log_every=config.log_every,
        summary_file=summary_file(config),
        board=Board(folder / run_dir.BOARD) if config.tensorboard and ranks.is_first else None,
    )
    log_file = run_dir.log_file(folder, config.run_index)
    try:
        log = MlperfLog(
            log_file if ranks.is_first and config.mode == "train" else None,
            append=resumed is not None and resumed.continues,
            before_echo=progress.clear,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        seed = resumed.state["seed"] if resumed else ranks.broadcast(new_seed(config))
        torch.manual_seed(seed)
        run = Run(
            config, ranks, log, progress, process.interruption, process.watchdog, folder, seed=seed, resumed=resumed
        )
        if not run.continues:
            log_submission(log, config, process.num_nodes)
            log.start("init")
            log.point("seed", seed)
        yield run
    finally:
        process.interruption.ignore()
        log.close()
        progress.close()


def summary_file(config: RunConfig) -> Path | None:
    """The file of --summary-json, if one is asked for; raises InputError where it cannot be written."""
    if not config.summary_json:
        return None
    path = Path(config.summary_json)
    try:
        path.open("a").close()
    except OSError as error:
        raise InputError(f"--summary-json {path}: it cannot be written ({error.strerror})") from error
    return path


def new_seed(config: RunConfig) -> int:
    """The seed that was given, or one from the system."""
    return secrets.randbits(31) if config.seed is None else config.seed


def log_submission(log: MlperfLog, config: RunConfig, num_nodes: int) -> None:
    """Say whose run this is, and what is known before it begins."""
    log.point("submission_benchmark", config.benchmark)
    log.point("submission_org", config.org)
    log.point("submission_division", config.division)
    log.point("submission_status", config.availability)
    log.point("submission_platform", config.submission_platform(num_nodes))
    log.point("dataset", config.dataset, is_coco2017=config.dataset == "coco2017")
    log.point("cache_clear", config.page_cache_dropped)
    program = git_state.read(config.source_commit)
    log.point("commit", program.commit, dirty=program.dirty)
    log.point("config", json.loads(to_json(config)))


def end(status: int) -> NoReturn:
    """End the process with its own status, whatever the launcher sends: it ends the ranks that are left when one has.

    The interpreter is not taken apart as it would be after sys.exit: gloo's threads outlive their process group where
    something still refers to it, may then let go of a tensor, and abort the process since there is no interpreter
    left to do so (seen with torch 2.15 in one of some ten runs of four ranks).
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
