"""Requirements of a ruleset on a log, read from the yaml files of mlperf_logging's compliance checker.

A benchmark has a file per ruleset and division. `name` is MLPerf's name of the benchmark in that ruleset. The checker
is imported inside functions, since `--help` must appear at once.
"""

import ast
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RULESETS = ("0.7.0", "1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0", "4.1.0", "5.0.0", "5.1.0")
"""Rulesets with a detection benchmark, oldest first."""

_MINIMUM = re.compile(r"v\['value'\](?:\['(\w+)'\])? >= ([\d.]+)")


@cache
def key_records(ruleset: str, division: str, name: str) -> Mapping[str, Mapping[str, Any]]:
    """Return what a division of a ruleset requires of each key, hyperparameters and eval_accuracy."""
    records = (record["KEY"] for path in _paths(ruleset, division, name) for record in _read(path) if "KEY" in record)
    others = ("submission_benchmark", "weights_initialization")
    return {record["NAME"]: record for record in records if record["NAME"] not in others}


def keys_logged_once(ruleset: str, name: str) -> list[str]:
    """Return the hyperparameters that the closed division requires exactly once."""
    records = key_records(ruleset, "closed", name)
    return [key for key, record in records.items() if record.get("REQ") == "EXACTLY_ONE"]


def describe(record: Mapping[str, Any]) -> str:
    """Return the allowed values of a key as the checker tests them."""
    tests = record.get("ATLEAST_ONE_CHECK") or record.get("CHECK") or "any value"
    text = " and ".join(test.strip() for test in ([tests] if isinstance(tests, str) else tests))
    return re.sub(r"s\['(\w+)'\]", r"\1", text.replace("v['value']", "value"))


def failing_keys(ruleset: str, division: str, name: str, values: Mapping[str, object]) -> set[str]:
    """Run the official checker on the keys of a log and return those whose value is missing or not allowed.

    values: in the order of the log, since some rules depend on an earlier value. None is a missing value.
    """
    from mlperf_logging.compliance_checker import mlp_compliance

    lines = [
        SimpleNamespace(
            key=key, value={"value": value, "metadata": {"epoch_num": 1}}, full_string="", timestamp=0.0, lineno=0
        )
        for key, value in values.items()
        if value is not None
    ]
    checker = mlp_compliance.make_checker("training", ruleset, quiet=True, werror=False)
    for path in _paths(ruleset, division, name):
        checker.configured_checks(lines, path)
    no_value_passed = {key for key in values if any(f"Failed checks for {key} " in m for m in checker.not_overwritable)}
    return no_value_passed | (checker.overwritable.keys() & values.keys())


def minimum_accuracy(ruleset: str, name: str) -> dict[str, float]:
    """Return the accuracy that ends a closed run, by its key in the value of eval_accuracy ("" for a number)."""
    test = key_records(ruleset, "closed", name)["eval_accuracy"]["ATLEAST_ONE_CHECK"]
    return {key: float(minimum) for key, minimum in _MINIMUM.findall(test)}


def tensor_names(ruleset: str, name: str) -> list[str]:
    """Return the names in weights_initialization, in the order of the network. Empty if the ruleset requires none."""
    for record in _read(_paths(ruleset, "closed", name)[1]):
        if test := record.get("END", {}).get("CHECK"):
            return list(ast.literal_eval(test[test.rindex("[") : test.rindex("]") + 1]))
    return []


def _paths(ruleset: str, division: str, name: str) -> tuple[Path, Path]:
    """Return the files of a division and of a benchmark in it."""
    folder = package_dir() / "compliance_checker" / f"training_{ruleset}"
    return folder / f"{division}_common.yaml", folder / f"{division}_{name}.yaml"


def package_dir() -> Path:
    """Return the folder of the installed package mlperf_logging."""
    spec = find_spec("mlperf_logging")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def _read(path: Path) -> list[dict[str, Any]]:
    import yaml

    # The checker also reads every value as text. libyaml's parser is 20 times as fast.
    records: list[dict[str, Any]] = yaml.load(path.read_text(), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    return records
