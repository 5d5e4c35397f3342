"""Command line of the report and the live view.

    python -m detection.report RUN... [--against LOG...] [--out FILE] [--png DIR]
    python -m detection.report watch [RUN] [--under results]

The first command writes an HTML report of runs. The second shows a run in progress.
"""

import sys

from mlperf import stdio


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Each command imports only its own libraries.
    if arguments[:1] == ["watch"]:
        from detection.report import watch

        return watch.main(arguments[1:])
    from detection.report import html_report

    return html_report.main(arguments)


if __name__ == "__main__":
    if sys.argv[1:2] != ["watch"]:  # which ends with its reader
        stdio.ignore_write_errors()
    sys.exit(main())
