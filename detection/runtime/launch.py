"""Launcher of a run's ranks: torchrun with the run's own exit status and a one-line cause.

`python -m detection.runtime.launch --nnodes N --nproc-per-node P [torchrun's flags] -m MODULE ...`

torchrun exits with 1 on every failure, after a page of output. Exit status here: 0, or that of the rank that failed
first, or 128 + n if signal n ended that rank or the launcher. For 2 and 3, the ranks report the reason themselves.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

from detection.config import settings
from detection.runtime import master_address, parent_process
from mlperf import stdio

if __name__ == "__main__":  # before torch, which reads some of the variables when it is imported
    stdio.ignore_write_errors()
    if script_pid := settings.prepare_launch():
        parent_process.end_with_parent(script_pid)

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

REPORTED_EXIT_CODES = (2, 3)  # invalid input, target not reached: the ranks exit and report the reason


class Agent(LocalElasticAgent):
    """Elastic agent that restarts crashed ranks, but not those that reported a reason, since they would exit again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in REPORTED_EXIT_CODES for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


launcher.LocalElasticAgent = Agent  # type: ignore  # the launcher has no parameter for it


def main(argv: Sequence[str]) -> int:
    """Run the ranks and return the exit status. On an invalid flag, torchrun's parser exits."""
    args = parse_args(list(argv))
    single_node = args.nnodes == "1" and not args.rdzv_endpoint and args.master_port is None
    if single_node:
        # Use a free port, so that runs do not collide, and loopback, since some hosts cannot resolve their own name.
        args.standalone = True
        args.local_addr = args.local_addr or "localhost"
    logging.disable(logging.ERROR)  # hide torchrun's failure report, in this process only
    try:
        if not single_node and not args.rdzv_endpoint:
            check_master(args.master_addr, args.master_port or 29500, args.node_rank)
        run(args)
    except ChildFailedError as error:
        rank, failure = _root_cause(error.failures)
        if failure.exitcode not in REPORTED_EXIT_CODES:
            print(f"error: rank {rank} {_describe_exit(failure.exitcode)}", file=sys.stderr)
        return _exit_status(failure.exitcode)
    except SignalException as error:
        print(f"error: stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        address = "" if single_node else f" with --master-addr {args.master_addr} --master-port {args.master_port}"
        print(f"error: cannot start the ranks{address}: {error}", file=sys.stderr)
        return 1
    return 0


def check_master(address: str, port: int, node_rank: int) -> None:
    """Raise InputError if node 0 does not answer. torch prints pages about it, which are dropped."""

    def connect_store() -> object:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)

    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        master_address.check(address, port, node_rank, connect_store)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _root_cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Pick the cause among the failures, which include ranks that the launcher terminated afterwards.

    Timestamps are whole seconds. Within one second, prefer any status to 1, with which a rank exits if its peer
    disconnects during a collective.
    """
    terminated = (-signal.SIGTERM, 128 + signal.SIGTERM)
    return min(
        failures.items(), key=lambda item: (item[1].exitcode in terminated, item[1].timestamp, item[1].exitcode == 1)
    )


def _describe_exit(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _exit_status(exitcode: int) -> int:
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
