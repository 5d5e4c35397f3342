"""Entry point of every run: process group, run folder, logs, modes, and one message per error."""

import atexit
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from detection import git_state, run_dir, run_lock
from detection.checkpoint import resume
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, RankInfo, flag_fields, read_rank_info, to_json
from detection.data import device_cache
from detection.data.loader import DataWorkerDied, translate_worker_errors
from detection.engine import throughput, trackers, train_loop
from detection.engine.evaluation import evaluate_only
from detection.engine.run_logger import NonFiniteLossError, RunLogger
from detection.engine.state import RunContext
from detection.engine.workload import TrainingStopped, TrainResult, Workload
from detection.runtime import device, numa_binding, parent_process
from detection.runtime.distributed import DistContext, PeerDisconnected, init_process_group
from detection.runtime.signals import SIGNALS, RunInterrupted, SignalHandler
from detection.runtime.watchdog import Watchdog
from mlperf import stdio
from mlperf.log import MlperfLog
from mlperf.rules import mlperf_name

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class ProcessContext:
    """Process group of this rank, its signal handler and its watchdog. flags: settings that flags set."""

    ranks: DistContext
    num_nodes: int
    signals: SignalHandler
    watchdog: Watchdog
    flags: Sequence[str] = ()


def main(argv: list[str], load: Callable[[list[str]], Config], train: Callable[[Config, ProcessContext], int]) -> int:
    """Run `train` on this rank with the settings that `load` reads from the flags. Return the exit status."""
    stdio.ignore_write_errors()
    rank_info = RankInfo()
    with SignalHandler() as signals:
        try:
            config, rank_info = load(argv), read_rank_info()
            if rank_info.has_launcher:
                parent_process.end_with_parent(rank_info.launcher_pid)
            config.check_world_size(rank_info.world_size)
            rank_device = device.select_device(config.device, rank_info.local_rank)
            device_cache.validate(config, rank_device)
            if binding := numa_binding.bind(config.numa_binding, rank_info, rank_device):
                print(binding, flush=True)
            with (
                Watchdog(rank_info.rank, config.step_timeout_s) as watchdog,
                # Times out after the watchdog, which reports where a rank hangs.
                init_process_group(rank_info, rank_device, timeout_s=config.step_timeout_s + 60) as ranks,
                translate_worker_errors(),
            ):
                process = ProcessContext(ranks, rank_info.num_nodes, signals, watchdog, flag_fields(argv))
                return train(config, process)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except TrainingStopped as stopped:
            if rank_info.rank == 0:  # same on every rank
                stream = sys.stderr if stopped.status else sys.stdout
                print(f"stopped by {stopped}. Progress is saved. Resume with --resume auto.", file=stream)
            return stopped.status
        except NonFiniteLossError as error:
            if rank_info.rank == 0:  # same on every rank
                print(f"error: {error}", file=sys.stderr)
            return 1
        except (PeerDisconnected, DataWorkerDied) as error:
            print(f"error: rank {rank_info.rank}: {error}", file=sys.stderr)
            return 1
        except RunInterrupted as interrupted:
            return 128 + interrupted.signal_number


@contextmanager
def open_run(config: RunConfig, process: ProcessContext) -> Iterator[RunContext]:
    """Lock the run folder, open the logs, and log the submission and init_start.

    On exit, ignore a further signal, so that this process ends with its own exit status.
    """
    ranks = process.ranks
    folder = Path(ranks.broadcast(config.run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))))
    with run_lock.hold(folder) if ranks.is_main else nullcontext(), open_logs(config, process, folder) as run:
        yield run


@contextmanager
def open_logs(config: RunConfig, process: ProcessContext, folder: Path) -> Iterator[RunContext]:
    """Open the logs in the run folder, after truncating them to the checkpoint that the run resumes from."""
    ranks, process.watchdog.folder = process.ranks, folder
    resume_point = ranks.broadcast(resume.find_resume_point(config, folder) if ranks.is_main else None)
    trackers.require_packages(config)
    if ranks.is_main:
        try:
            (folder / run_dir.CONFIG).write_text(to_json(config))
        except OSError as error:
            raise InputError(f"run folder {folder}: cannot be written ({error.strerror}). Free some space.") from error
    logger = RunLogger(
        ranks,
        folder / run_dir.METRICS,
        log_every=config.log_every,
        summary_file=open_summary_file(config),
        trackers=trackers.open_trackers(config, folder) if ranks.is_main else None,
    )
    log_file = run_dir.log_path(folder, config.run_index)
    try:
        log = MlperfLog(
            log_file if ranks.is_main and config.mode == "train" else None,
            append=resume_point is not None and resume_point.appends_to_log,
            echo=logger.print if config.echo_log else None,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        seed = resume_point.state["seed"] if resume_point else ranks.broadcast(resolve_seed(config))
        torch.manual_seed(seed)
        run = RunContext(
            config,
            ranks,
            log,
            logger,
            process.signals,
            process.watchdog,
            folder,
            seed=seed,
            resume_point=resume_point,
            flags=process.flags,
        )
        if not run.appends_to_log:
            log_submission(log, config, process.num_nodes)
            log.start("init")
            log.event("seed", seed)
        yield run
    finally:
        process.signals.finish()
        log.close()
        logger.close()


def run_mode(workload: Workload[Any], run: RunContext, log_hyperparameters: Callable[[], None]) -> TrainResult | None:
    """Run the mode of the settings. Return the result, or None for a throughput measurement.

    log_hyperparameters: logs the hyperparameters of a new training run to the MLPerf log.
    """
    match run.config.mode:
        case "train":
            if not run.appends_to_log:
                log_hyperparameters()
            return train_loop.train_to_target(workload, run)
        case "evaluate":
            return evaluate_only(workload, run)
        case "bench-train":
            throughput.benchmark_training(workload, run)
        case "bench-infer":
            throughput.benchmark_inference(workload, run)
    return None


def open_summary_file(config: RunConfig) -> Path | None:
    """Return the file of --summary-json, if any. Raise InputError if it is not writable."""
    if not config.summary_json:
        return None
    path = Path(config.summary_json)
    try:
        path.open("a").close()
    except OSError as error:
        raise InputError(f"--summary-json {path}: cannot be written ({error.strerror}). Pass another file.") from error
    return path


def resolve_seed(config: RunConfig) -> int:
    """Return the seed of the settings, or a random one."""
    return secrets.randbits(31) if config.seed is None else config.seed


def log_submission(log: MlperfLog, config: RunConfig, num_nodes: int) -> None:
    """Log the submitter, the data set, the source commit and the settings."""
    log.event("submission_benchmark", mlperf_name(config.benchmark, config.ruleset))
    log.event("submission_org", config.org)
    log.event("submission_division", config.division)
    log.event("submission_status", config.availability)
    log.event("submission_platform", config.submission_platform(num_nodes))
    log.event("dataset", config.dataset, is_coco2017=config.dataset == "coco2017")
    log.event("cache_clear", config.page_cache_dropped)
    source = git_state.read(config.source_commit)
    log.event("commit", source.commit, dirty=source.dirty)
    log.event("config", json.loads(to_json(config)))


def hard_exit(status: int) -> NoReturn:
    """Exit with this status, ignoring the signals that the launcher sends when another rank has exited.

    Skip the interpreter's shutdown. Threads of gloo outlive a process group that is still referenced. If one releases a
    tensor after the shutdown, it aborts the process (seen with torch 2.15 in about one of ten runs of four ranks).
    """
    for signal_number in SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
