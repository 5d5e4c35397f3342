"""Commands of a workload: python -m WORKLOAD COMMAND.

This module imports nothing heavy, so that the list of commands and `--help` appear at once. Each command imports
what it needs, such as the workload's modules `train` and `predict`.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mlperf.errors import InputError, report_errors

if TYPE_CHECKING:
    from argparse import Namespace

    from detection.engine.workload import Workload
    from detection.preflight.run_checks import PreflightSpec
    from detection.tuning.search import TuneTarget

HELP = {
    "train": "train until the target is reached; one process per rank (./run_and_time.sh starts them)",
    "preflight": "check settings, rules, data and run folder before the timer starts; --dry-run creates nothing",
    "inspect": "check the machines of a run on all ranks (./run_and_time.sh --preflight)",
    "tune": "search for the fastest settings on this machine (./run_and_time.sh --autotune)",
    "data": "show augmented training images with their targets, and statistics of the data: --show 16 --out data.html",
    "evaluate": "evaluate weights on the evaluation images: --weights FILE",
    "predict": "detect objects on images of your own, and draw them",
    "export": "export a trained network to ONNX or torch.export",
    "conformance": "compare every part with the numbers of the MLPerf reference",
    "summary": "list the layers of the network",
}


class Declarations(Protocol):
    """Declarations of a workload for the shared commands: its module `commands`."""

    PREFLIGHT: "PreflightSpec[Any]"

    def make_tune_target(self) -> "TuneTarget[Any]":
        """Return what the search for settings needs."""

    def make_random_workload(self, config: Any, ranks: Any) -> "Workload[Any]":
        """Assemble the workload with random weights."""


@dataclass(frozen=True)
class CommandSet:
    """Commands of a workload, whose modules implement them.

    predict_defaults: score threshold and batch size. export_interface: inputs and outputs of the exported network.
    """

    package: str
    title: str
    predict_defaults: tuple[float, int]
    export_interface: str

    def module(self, name: str) -> Any:
        """Import a module of the workload."""
        return import_module(f"{self.package}.{name}")


@report_errors
def main(argv: Sequence[str], commands: CommandSet) -> int:
    """Run a command and return its exit status: 2 if there is no such command, or for an InputError."""
    name, flags = (argv[0], list(argv[1:])) if argv else ("", [])
    if name in ("", "-h", "--help"):
        print(usage(commands))
        return 0
    if name not in HELP:
        nearest = difflib.get_close_matches(name, HELP, n=1)
        problem = "no such command" + (f". Did you mean {nearest[0]}?" if nearest else "")
        raise InputError(f"{name}: {problem} (`python -m {commands.package}` lists the commands)")
    if name in ("predict", "export", "conformance"):
        return run_tool(name, flags, commands)
    declarations: Declarations = commands.module("commands")
    if {"-h", "--help"} & set(flags):
        print(f"usage: python -m {commands.package} {name} [--help [TOPIC]] [--name value ...]\n")
        declarations.PREFLIGHT.load(flags)  # prints the settings, and exits
    if name == "evaluate":
        name, flags = "train", ["--mode", "evaluate", *flags]
    if name in ("train", "inspect"):
        run_rank(name, flags, commands, declarations)
    if name == "data":
        from detection.report import data_page

        load, samples = declarations.PREFLIGHT.load, commands.module("samples")
        return data_page.main(flags, lambda words: load(words).config, samples.open_samples)
    if name == "tune":
        from detection.tuning import search

        return search.main(flags, declarations.make_tune_target())
    from detection.preflight import run_checks

    run = run_checks.print_summary if name == "summary" else run_checks.main
    return run(flags, declarations.PREFLIGHT)


def usage(commands: CommandSet) -> str:
    """Return the list of commands."""
    package = commands.package
    lines = [f"usage: python -m {package} COMMAND [--help] ...", "", f"Commands of {commands.title}:", ""]
    lines += [f"  {name:<12} {text}" for name, text in HELP.items()]
    return "\n".join([*lines, "", f"`python -m {package} COMMAND --help` explains a command."])


def run_tool(name: str, flags: Sequence[str], commands: CommandSet) -> int:
    """Run a command that has arguments in place of settings."""
    from detection import arguments

    if name == "predict":
        parsed = arguments.parse_predict(flags, commands.package, *commands.predict_defaults)
    elif name == "export":
        parsed = arguments.parse_export(flags, commands.package, commands.export_interface)
    else:
        parsed = arguments.parse_conformance(flags, commands.package)
    module = commands.module(name)
    run: Callable[[Namespace], int] = module.SUITE.run if name == "conformance" else module.main
    return run(parsed)


def run_rank(name: str, flags: list[str], commands: CommandSet, declarations: Declarations) -> NoReturn:
    """Run this rank of a distributed command, and end its process."""
    from detection.engine.entrypoint import hard_exit

    if name == "train":
        hard_exit(commands.module("train").main(flags))
    from detection.preflight import machine_checks

    hard_exit(machine_checks.main(flags, declarations.PREFLIGHT, declarations.make_random_workload))
