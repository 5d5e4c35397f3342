"""Start the ranks of a run: torchrun, but with the run's own exit status and one line for the cause.

`python -m detection.runtime.launch --nnodes N --nproc-per-node P [torchrun's flags] -m MODULE ...`

torchrun itself exits with 1 whatever happened, after a page about it. Exit status here: 0; that of the rank
that failed first; 128 + n where signal n ended it or the launcher. The ranks themselves say why it is 2 or 3.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

SPOKEN = (2, 3)  # bad input, epochs used up: the ranks end by themselves and say why


class Agent(LocalElasticAgent):
    """Starts ranks again that died, but not those that have said why they ended: they would end so again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in SPOKEN for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


launcher.LocalElasticAgent = Agent  # type: ignore  # the launcher has no parameter for it


def main(argv: Sequence[str]) -> int:
    """Run the ranks to their end and return the exit status; a wrong flag exits from torchrun's parser."""
    args = parse_args(list(argv))
    alone = args.nnodes == "1" and not args.rdzv_endpoint and args.master_port is None
    if alone:
        # A free port, so that runs do not collide; the loopback, since not every host resolves its own name.
        args.standalone = True
        args.local_addr = args.local_addr or "localhost"
    logging.disable(logging.ERROR)  # torchrun's account of a failure, in this process alone
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = _first(error.failures)
        if failure.exitcode not in SPOKEN:
            print(f"error: rank {rank} ended with {_cause(failure.exitcode)}", file=sys.stderr)
        return _status(failure.exitcode)
    except SignalException as error:
        print(f"error: stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        where = "" if alone else f" with --master-addr {args.master_addr} --master-port {args.master_port}"
        print(f"error: the ranks could not be started{where}: {error}", file=sys.stderr)
        return 1
    return 0


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Pick the cause among the failures, which hold the ranks that were ended after it as well.

    Times are whole seconds. Within one, a rank that lost its peer in a collective ends with 1: any other
    status is nearer to the cause.
    """
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    return min(
        failures.items(),
        key=lambda item: (item[1].exitcode in ended, item[1].timestamp, item[1].exitcode == 1),
    )


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _status(exitcode: int) -> int:
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
