"""First minutes on a new accelerator: everything that must be known of it, in the order of its importance.

    perf/accelerator.sh [MINUTES] [--out DIR] [--device auto] [--only STAGE ...] [--rehearse]

Each stage gets its part of the minutes that remain, so that time saved by one benefits the next. A measurement that
fails or runs out of time is recorded, and the next one starts. DIR/summary.json is complete after each measurement,
whatever ends the program. DIR/logs/ holds the output of each command. Needs no network, and generates its images.

--rehearse does the same with tiny batches on any machine, such as two CPU cores in half an hour. Exits with 0 if every
measurement succeeded, with 1 otherwise, or with 2 on invalid input.
"""

import argparse
import sys
import time
from pathlib import Path

from detection.config import device_names
from detection.config.settings import InputError, report_errors
from detection.runtime.parent_process import end_with_parent
from mlperf import stdio
from perf.accelerator.session import Session
from perf.accelerator.stages import STAGES

DEFAULT_MINUTES = 9.0


@report_errors
def main(argv: list[str]) -> int:
    """Run the stages and return the exit status."""
    arguments = parse(argv)
    selected = [stage for stage in STAGES if not arguments.only or stage.name in arguments.only]
    session = Session(arguments.out, arguments.device, rehearse=arguments.rehearse, minutes=arguments.minutes)
    end_s = time.monotonic() + 60 * arguments.minutes
    for index, stage in enumerate(selected):
        remaining_s = max(0.0, end_s - time.monotonic())
        limit_s = remaining_s * stage.seconds / sum(other.seconds for other in selected[index:])
        session.run_stage(stage, limit_s)
    print(f"\nwrote {session.summary_file}")
    return 0 if session.all_succeeded else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. An invalid flag ends the process with status 2; raise InputError for an unknown stage."""
    parser = argparse.ArgumentParser(
        prog="perf/accelerator.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", nargs="?", type=float, default=DEFAULT_MINUTES, help="time limit (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path("results/accelerator"), help="folder (%(default)s)")
    parser.add_argument("--device", default="auto", help=device_names.DEVICE_HELP)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"of {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny batches and data sets, on any machine")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < 24 * 60:
        raise InputError(f"MINUTES {arguments.minutes:g}: should be above 0 and below 1440.")
    if unknown := set(arguments.only or ()) - {stage.name for stage in STAGES}:
        raise InputError(f"--only {' '.join(sorted(unknown))}: no such stage. --help lists them.")
    return arguments


if __name__ == "__main__":
    stdio.ignore_write_errors()
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
