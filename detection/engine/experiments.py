"""N runs of a benchmark, one after the other, in one run folder.

run_and_time.sh, run_with_docker.sh and run.sub call this module. The last two do so outside the container, where a
plain Python has to do: it needs 3.8 and no packages, and imports no torch. For the experiments from 0 on, it leaves

    FOLDER/experiment_0/  files of the run: MLPerf log, config.json, metrics.jsonl, checkpoints/
    FOLDER/result_0.txt   link to its MLPerf log
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from detection import run_lock
from detection.runtime import parent_process
from mlperf import stdio
from mlperf.errors import InputError
from mlperf.log import find_clock_error, read

if TYPE_CHECKING:
    from collections.abc import Sequence

SCRIPT = "./run_and_time.sh"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
MAX_SEED = 2**32 - 1
DUPLICATE_S = 1.0  # timeout and Slurm send some signals twice, which must not end the run before it has saved
STOP_TIMEOUT_S = 120  # for a container to save a checkpoint
OUTPUT_TIMEOUT_S = 10  # for the rest of the output, after the run has ended
# A bad configuration and a command that cannot start would fail every time. The others mean that only the run got a
# signal.
FINAL_STATUSES = (2, 125, 126, 127, 129, 130, 138, 143)


def flag_value(flag: str, words: Sequence[str]) -> str | None:
    """Return the last value that the words give a flag, or None."""
    value = None
    for i, word in enumerate(words):
        if word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        elif word == flag and i + 1 < len(words):
            value = words[i + 1]
    return value


def first_seed(num_experiments: int, seed: str, flags: Sequence[str]) -> int | None:
    """Return the seed of the first experiment, or None if the runs draw their own. The flags override `seed`.

    Raises InputError for flags that experiments cannot share.
    """
    for flag in ("--run-dir", "--log-dir", "--run-index"):
        value = flag_value(flag, flags)
        if value is not None:
            raise InputError(
                f"{flag} {value}: each experiment has its own folder and number. Name the common folder with RUN_DIR"
                " or LOGDIR"
            )
    resume = flag_value("--resume", flags)
    if num_experiments > 1 and resume not in (None, "auto", "none"):
        raise InputError(
            f"--resume {resume}: names one experiment, but NEXP={num_experiments}. Pass --resume auto, or NEXP=1"
        )
    seed = flag_value("--seed", flags) or seed
    if not re.fullmatch("[0-9]{1,10}", seed):
        return None  # the run rejects an invalid one
    if num_experiments > 1 and int(seed) + num_experiments - 1 > MAX_SEED:
        raise InputError(
            f"seed {seed}: NEXP={num_experiments} experiments use consecutive seeds, and the maximum is {MAX_SEED}"
        )
    return int(seed)


def finished_status(log: Path) -> int | None:
    """Return the exit status of the run that wrote an MLPerf log, or None if it is not finished."""
    stops = [event for event in _events(log) if event.key == "run_stop" and "epoch_num" in event.metadata]
    if not stops:
        return None
    return 0 if any(event.metadata.get("status") == "success" for event in stops) else 3


def is_resumed(log: Path) -> bool:
    """Return whether an MLPerf log belongs to a resumed run."""
    return any(event.key == "resumed" for event in _events(log))


def duration_s(log: Path) -> str:
    """Return the time by the MLPerf log, or "-". A resumed run includes its interruptions."""
    events = _events(log)
    times = {event.key: event.time_ms for event in events}
    if not {"run_start", "run_stop"} <= times.keys() or find_clock_error(events):
        return "-"
    return str((times["run_stop"] - times["run_start"] + 500) // 1000)


def num_epochs(log: Path) -> str:
    """Return the number of completed epochs, or "-" without a log."""
    return str(sum(event.key == "epoch_stop" for event in _events(log))) if log.exists() else "-"


def _events(log: Path) -> list[Any]:
    try:
        return read(log, errors=[])
    except OSError:
        return []


def new_folder(parent: Path) -> Path:
    """Return the path of a run folder that is named after the time and does not exist."""
    while True:
        folder = parent / time.strftime("%Y-%m-%d_%H-%M-%S")
        if not folder.exists():
            return folder
        time.sleep(0.1)  # another call took this second


def total_minutes(walltime: str, num_experiments: int) -> int:
    """Return the minutes of N experiments. walltime: one experiment, as [days-]hours:minutes:seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", walltime)
    if not match:
        raise InputError(
            f"WALLTIME={walltime}: it should be hours:minutes:seconds, or days-hours:minutes:seconds. Correct the"
            " config file"
        )
    days, hours, minutes, seconds = (int(text or 0) for text in match.groups())
    return num_experiments * ((days * 24 + hours) * 60 + minutes + (seconds > 0))


def drop_page_cache(prefix: Sequence[str]) -> bool:
    """Drop the page cache of this machine, or where a command with this prefix runs. Return whether that succeeded."""
    command = "sync && { echo 3 >/proc/sys/vm/drop_caches || sudo -n /sbin/sysctl -q vm.drop_caches=3; } 2>/dev/null"
    if subprocess.run([*prefix, "bash", "-c", command], stdin=subprocess.DEVNULL, check=False).returncode == 0:
        return True
    print(
        "could not drop the page cache: this needs root, or sudo without a password. CLEAR_CACHES=0 skips it",
        flush=True,
    )
    return False


def requeue(job: str) -> None:
    """Requeue a Slurm job. A canceled job is not in state RUNNING and is not requeued."""
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    if subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout.strip() == b"RUNNING":
        print("requeuing the job", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=False)


def copy_output(source: IO[bytes], log: Path, echo: bool) -> None:
    """Append the output of a run to its log, and print it if `echo`. What cannot be written is dropped."""
    file, has_warned = None, False
    while text := source.read(2**16):
        try:
            file = file or log.open("ab", buffering=0)
            file.write(text)
        except OSError as error:
            if not has_warned:
                print(f"warning: {log}: {error.strerror}. Output is missing from it", flush=True)
            has_warned = True
        if echo:
            sys.stdout.buffer.write(text)
            sys.stdout.flush()


class Job:
    """One running experiment: a process in its own session, so that only `stop`, `kill` and our own death end it.

    container: name of its container, which the command's first word (docker or podman) manages.
    stop_signal: number of the signal that makes it save a checkpoint and exit, or None to forward the one received.
    """

    def __init__(self, command: list[str], log: Path | None, tee: bool, container: str, stop_signal: int | None):
        self.docker, self.container, self.stop_signal = command[0], container, stop_signal
        self.is_stopping = False
        self.stopper: subprocess.Popen[bytes] | None = None
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if log else None,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=parent_process.set_death_signal,
            bufsize=0,
        )
        self.copier = threading.Thread(target=copy_output, args=(self.process.stdout, log, tee), daemon=True)
        if log:
            self.copier.start()

    def stop(self, received: int) -> None:
        """Ask the run to save a checkpoint and to exit. Further calls have no effect."""
        if self.is_stopping:
            return
        self.is_stopping = True
        if self.container:
            self.stopper = self._manage("stop", "-t", str(STOP_TIMEOUT_S))
        elif self.stop_signal:
            self._signal(self.stop_signal)
        else:
            self._signal(received)

    def kill(self, received: int) -> None:
        """End the run at once."""
        if self.container:
            self._manage("kill")
        else:
            self._signal(signal.SIGTERM if self.stop_signal else received)

    def wait(self) -> int:
        """Return the exit status, which is 128 + n after signal n."""
        while True:
            try:
                status = self.process.wait(timeout=0.2 if self.container else None)
                break
            except subprocess.TimeoutExpired:
                if self.stopper and self.stopper.poll():  # the container did not exist yet
                    self.stopper = self._manage("stop", "-t", str(STOP_TIMEOUT_S))
        if self.process.stdout:
            self.copier.join(OUTPUT_TIMEOUT_S)  # a process that it left behind may keep the pipe open
        if self.container:
            self._manage("rm", "--force").wait()
        return status if status >= 0 else 128 - status

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self.stop_signal:  # srun, which forwards it
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)

    def _manage(self, verb: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.docker, verb, *options, self.container],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


class Series:
    """Experiments of one call."""

    def __init__(self, args: argparse.Namespace, seed: int | None, start: list[str], flags: list[str]):
        self.args, self.seed, self.start, self.flags = args, seed, start, flags
        self.num_experiments: int = args.nexp
        self.received = 0  # number of the first signal
        self.received_s = 0.0
        self.job: Job | None = None
        self.folder = args.folder or self._choose_folder()

    def log(self, number: int, folder: Path | None = None) -> Path:
        """Return the path of an experiment's MLPerf log."""
        return (folder or self.folder) / f"experiment_{number}" / f"result_{number}.txt"

    def unfinished(self, folder: Path) -> bool:
        """Return whether a run folder lacks the result of an experiment."""
        return any(finished_status(self.log(number, folder)) is None for number in range(self.num_experiments))

    def _choose_folder(self) -> Path:
        if self.args.nodes > 1:
            raise InputError(
                f"NEXP={self.num_experiments} on DGXNNODES={self.args.nodes} nodes: set the same RUN_DIR on all of"
                " them, on a shared disk"
            )
        if flag_value("--resume", self.flags) == "auto":
            folders = sorted(path.parent for path in self.args.parent.glob("*/experiment_0"))
            for folder in reversed(folders):
                if self.unfinished(folder):
                    return folder
        return new_folder(self.args.parent)

    def extra_flags(self, number: int) -> list[str]:
        """Return the flags that only this experiment gets, after the common ones."""
        extra = [] if self.seed is None else ["--seed", str(self.seed + number)]
        summary = flag_value("--summary-json", self.flags)
        if summary and self.num_experiments > 1:
            extra += ["--summary-json", f"{re.sub('[.]json$', '', summary)}_{number}.json"]
        if self.log(number).parent.is_dir():
            extra += ["--resume", "auto"]
        return extra

    def command(self, number: int, *, page_cache_dropped: bool | None = None) -> list[str]:
        """Return the command of an experiment, with its variables."""
        folder = (self.args.folder_in_job or self.folder) / f"experiment_{number}"
        variables = {"NEXP": 1, "RUN_INDEX": number, "RUN_DIR": folder}
        if page_cache_dropped is not None:
            variables["PAGE_CACHE_DROPPED"] = int(page_cache_dropped)
        words = [f"{name}={value}" for name, value in variables.items()]
        if self.args.container:
            words = [option for word in words for option in ("--env", word)]
            docker, run = self.start[:2]
            start = [docker, run, "--name", self.container(number), *words, *self.start[2:]]
        else:
            start = ["env", *words, *self.start]
        return [*start, SCRIPT, *self.flags, *self.extra_flags(number)]

    def container(self, number: int) -> str:
        """Return the name of an experiment's container, or "" without one."""
        name = re.sub(r"[^\w.-]", "_", self.args.container, flags=re.ASCII)
        return name and f"{name}_{number + 1}_{os.getpid()}"

    def on_signal(self, number: int, _: object) -> None:
        """Stop the experiment on a first signal, and kill it if the signal is repeated."""
        if not self.received:
            self.received, self.received_s = number, time.monotonic()
            print(f"{signal.Signals(number).name}: stopping the run, no other experiment starts", flush=True)
            if self.job:
                self.job.stop(number)
        elif self.job and number == self.received and time.monotonic() - self.received_s > DUPLICATE_S:
            self.job.kill(number)

    def run(self) -> int:
        """Run the unfinished experiments and print the summary. Return the status of the first one that failed."""
        # Check all of them first: nodes that start together must agree, and an experiment starts only on all nodes.
        for number in range(self.num_experiments):
            link = self.folder / f"result_{number}.txt"
            if link.exists() and not link.is_symlink():
                raise InputError(
                    f"{self.folder} contains the log of a single run, {link.name}. Name another folder for"
                    f" NEXP={self.num_experiments} experiments"
                )
        finished = [finished_status(self.log(number)) for number in range(self.num_experiments)]
        for number in SIGNALS:
            signal.signal(number, self.on_signal)
        statuses = []
        for number, status in enumerate(finished):
            title = f"experiment {number + 1} of {self.num_experiments}"
            if status is not None:
                print(f"{title} is already finished, with status {status}", flush=True)
            else:
                print(f"{title}, in {self.log(number).parent}", flush=True)
                status = self.run_experiment(number)
                print(f"{title} finished with status {status}", flush=True)
            statuses.append(status)
            if self.log(number).exists():
                with suppress(OSError):  # it exists, from an earlier call or another node, or the disk is full
                    (self.folder / f"result_{number}.txt").symlink_to(self.log(number).relative_to(self.folder))
            if self.received or (finished[number] is None and status in FINAL_STATUSES):
                break
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # no job is left to stop
        self.print_summary(statuses)
        status = next((status for status in statuses if status), 0)
        if self.args.requeue and self.received:
            requeue(self.args.requeue)
        if self.args.hint and (self.received or status not in (0, 3)):
            name, _, value = self.args.hint.partition("=")
            hint = f"{name}={shlex.quote(value or str(self.folder))} NEXP={self.num_experiments}"
            print(f"To continue: {hint} and the same command")
        return status

    def run_experiment(self, number: int) -> int:
        """Run one experiment and return its exit status."""
        args = self.args
        log = Path(f"{args.log}_{number + 1}.log") if args.log else None
        if log and args.fresh_logs:
            with suppress(OSError):
                log.write_bytes(b"")
        dropped = args.page_cache == "drop" and drop_page_cache(shlex.split(args.per_node))
        if self.received:
            return 128 + self.received
        command = self.command(number, page_cache_dropped=dropped if args.page_cache else None)
        self.job = Job(command, log, args.tee, self.container(number), args.stop_signal)
        if self.received:  # a signal arrived before the line above ended
            self.job.stop(self.received)
        status = self.job.wait()
        self.job = None
        if args.stop_signal and status == 128 + signal.SIGTERM and not self.received:
            self.received = signal.SIGTERM  # only the nodes got the signal
        return status

    def print_summary(self, statuses: list[int]) -> None:
        """Print one line per experiment. Experiments that did not start have no status."""
        row = "{:<12} {:>6} {:>8} {:>6}  {}".format
        print(row("experiment", "status", "seconds", "epochs", "log"))
        for number in range(self.num_experiments):
            log = self.log(number)
            status = str(statuses[number]) if number < len(statuses) else "-"
            path = self.folder / f"result_{number}.txt" if log.exists() else "-"
            print(row(f"{number + 1} of {self.num_experiments}", status, duration_s(log), num_epochs(log), str(path)))


def parse_nexp(text: str) -> int:
    """Return the number of experiments, or raise InputError."""
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise InputError(f"NEXP={text} is not a valid number of experiments. Use 1 to 9999")
    return int(text)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        usage="python -m detection.engine.experiments [options] -- [START ...] ./run_and_time.sh [FLAG ...]",
        description="Run experiments one after the other. START is docker run, srun, or empty.",
    )
    add = parser.add_argument
    add("--is-resumed", type=Path, metavar="LOG", help="only exit with 0 if the log belongs to a resumed run, else 1")
    add("--nexp", default="1", metavar="N", help="number of experiments (1)")
    add("--seed", default="", help="seed of the first one, unless a flag gives it")
    add("--nodes", type=int, default=1, help="nodes of a run (1)")
    add("--node-rank", type=int, default=0, help="number of this node (0)")
    add("--submit", metavar="WALLTIME", help="submit run.sub to Slurm with N times this time, and run nothing here")
    add("--folder", type=Path, help="run folder of all experiments")
    add("--parent", type=Path, help="parent of a new run folder, or of the one that --resume auto continues")
    add("--folder-in-job", type=Path, help="run folder as the experiments see it")
    add("--dry-run", action="store_true", help="print the folder, and make the dry run of the first experiment")
    add(
        "--page-cache",
        choices=("drop", "keep"),
        help="drop the page cache before each experiment, or tell it of neither",
    )
    add("--per-node", default="", metavar="COMMAND", help="prefix of a command that runs on each node")
    add("--log", metavar="PREFIX", help="write the output of experiment i to PREFIX_i.log")
    add("--fresh-logs", action="store_true", help="truncate these logs instead of appending to them")
    add("--tee", action="store_true", help="also print the output")
    add("--container", default="", metavar="NAME", help="START is docker or podman run; names of containers begin so")
    add("--stop-signal", type=lambda name: signal.Signals[name], help="signal that makes START stop the run")
    add("--requeue", metavar="JOB", help="requeue this Slurm job after a signal")
    add("--hint", metavar="NAME[=VALUE]", help="variable that continues the series; without a value, the folder")
    return parser.parse_args(words)


def main(argv: Sequence[str]) -> int:
    """Run the experiments and return the status of the first one that failed."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    args, rest = parse(words[:end]), words[end + 1 :]
    if args.is_resumed:
        return 0 if is_resumed(args.is_resumed) else 1
    start = rest[: rest.index(SCRIPT)] if SCRIPT in rest else []
    flags = rest[rest.index(SCRIPT) + 1 :] if SCRIPT in rest else rest
    try:
        args.nexp = parse_nexp(args.nexp)
        seed = first_seed(args.nexp, args.seed, flags)
        if args.submit is not None:
            minutes = total_minutes(args.submit, args.nexp)
            if not shutil.which("sbatch"):
                raise InputError("sbatch is not on PATH. Without Slurm, start ./run_and_time.sh on every node")
        if seed is not None and args.nexp > 1:
            print(f"Seeds: {seed} to {seed + args.nexp - 1}, one per experiment", flush=True)
        if args.submit is not None:
            os.execvp("sbatch", ["sbatch", f"--nodes={args.nodes}", f"--time={minutes}", "run.sub", *flags])
        series = Series(args, seed, start, flags)
        if args.dry_run:
            print(f"run folder of the NEXP={args.nexp} experiments: {series.folder}", flush=True)
            command = [*series.command(0), "--dry-run"]
            os.execvp(command[0], command)
        with run_lock.hold(series.folder) if args.node_rank == 0 else nullcontext():
            return series.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
