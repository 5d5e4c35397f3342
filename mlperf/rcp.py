"""Official joint checks of the runs of one result: convergence against the reference, and unique seeds."""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlperf_logging.package_checker.seed_checker import SeedChecker

from mlperf.compliance import captured_logs
from mlperf.score import RUNS_PER_RESULT

_RULESET_WITHOUT_RCP = "0.7.0"  # it has neither check


@dataclass(frozen=True)
class JointCheck:
    """Verdict of one official checker on several runs. passed: None if the check does not apply. text: the reason."""

    check: str
    passed: bool | None
    text: str


def check(paths: Sequence[Path], ruleset: str, division: str) -> list[JointCheck]:
    """Run mlperf_logging's seed checker and RCP (reference convergence point) checker on the logs of one result."""
    if ruleset == _RULESET_WITHOUT_RCP or division != "closed":
        where = f"ruleset {ruleset}" if ruleset == _RULESET_WITHOUT_RCP else f"the {division} division"
        return [JointCheck(name, None, f"not required by {where}") for name in ("seeds", "convergence")]
    return [_check_seeds(paths, ruleset), _check_convergence(paths, ruleset)]


def _check_seeds(paths: Sequence[Path], ruleset: str) -> JointCheck:
    with captured_logs(logging.ERROR) as records, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one per rank and log that has several seeds, which is allowed
        passed = SeedChecker(ruleset).check_seeds([str(path) for path in paths])
    errors = " ".join(record.getMessage().strip() for record in records)
    return JointCheck("seeds", passed, "unique in each run" if passed else errors)


def _check_convergence(paths: Sequence[Path], ruleset: str) -> JointCheck:
    if len(paths) < RUNS_PER_RESULT:
        return JointCheck("convergence", None, f"checked from {RUNS_PER_RESULT} runs, and these are {len(paths)}")
    from mlperf_logging.rcp_checker import rcp_checker  # takes 1.5 s, with scipy.stats

    with tempfile.TemporaryDirectory() as folder, captured_logs(logging.ERROR):
        for number, path in enumerate(paths):
            (Path(folder) / f"result_{number}.txt").symlink_to(path.resolve())
        try:
            passed, text, factor = rcp_checker.check_directory(
                folder, "training", ruleset, verbose=False, bert_train_samples=False, rcp_pass="pruned_rcps"
            )
        except Exception as error:  # it parses logs without validation
            return JointCheck("convergence", False, f"the official checker crashed: {error!r}")
    if passed and factor > 1:
        text += f"; faster than the reference, so the score is multiplied by {factor:.4f}"
    return JointCheck("convergence", bool(passed), text)
