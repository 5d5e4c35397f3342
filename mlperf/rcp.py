"""The official checks of runs together: how fast they converge beside the reference, and that no seed is used twice."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlperf_logging.package_checker.seed_checker import SeedChecker

from mlperf.score import RUNS

_WITHOUT = "0.7.0"  # the rules of that round have neither


@dataclass(frozen=True)
class Together:
    """What one official checker says of runs together. passed: None where it does not judge them; text: why."""

    check: str
    passed: bool | None
    text: str


def check(paths: Sequence[Path], ruleset: str, division: str) -> list[Together]:
    """Run mlperf_logging's seed checker and its checker of reference convergence points on the logs of one result."""
    if ruleset == _WITHOUT or division != "closed":
        where = f"ruleset {ruleset}" if ruleset == _WITHOUT else f"the {division} division"
        return [Together(name, None, f"not asked for by {where}") for name in ("seeds", "convergence")]
    return [_check_seeds(paths, ruleset), _check_convergence(paths, ruleset)]


def _check_seeds(paths: Sequence[Path], ruleset: str) -> Together:
    with _heard() as said:
        passed = SeedChecker(ruleset).check_seeds([str(path) for path in paths])
    return Together("seeds", passed, "each run has its own" if passed else " ".join(said))


def _check_convergence(paths: Sequence[Path], ruleset: str) -> Together:
    if len(paths) < RUNS:
        return Together("convergence", None, f"judged from {RUNS} runs on, and these are {len(paths)}")
    from mlperf_logging.rcp_checker import rcp_checker  # with scipy.stats a second and a half

    with tempfile.TemporaryDirectory() as folder, _heard():
        for number, path in enumerate(paths):
            (Path(folder) / f"result_{number}.txt").symlink_to(path.resolve())
        try:
            passed, text, factor = rcp_checker.check_directory(
                folder, "training", ruleset, verbose=False, bert_train_samples=False, rcp_pass="pruned_rcps"
            )
        except Exception as error:  # it takes a log apart without a look at what is in it
            return Together("convergence", False, f"the official checker broke off: {error!r}")
    if passed and factor > 1:
        text += f"; faster than the reference, so that the score is to be multiplied by {factor:.4f}"
    return Together("convergence", bool(passed), text)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Gather what the checkers log as errors, which would else set up the root logger and be printed."""
    said: list[str] = []

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                said.append(record.getMessage().strip())

    root, handler = logging.getLogger(), Gather()
    others = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield said
    finally:
        root.handlers[:] = others
