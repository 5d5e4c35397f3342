"""docs/MLPERF_LOG.md: every key that the code can log is in it, with who logs it and which rules ask for it."""

import ast
import re
from functools import cache

import pytest

from mlperf.log import read
from mlperf.rules import BENCHMARKS, DIVISIONS, RULESETS, hyperparameter_keys
from paths import ROOT
from recipes_and_checkers import checker_yaml

ROW = re.compile(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
BY_A_BENCHMARK = {key for benchmark in BENCHMARKS for key in hyperparameter_keys(benchmark)} | {
    "weights_initialization"
}


def documented() -> dict[str, tuple[str, str]]:
    """Module and rules of each key, as the page lists them."""
    rows = ROW.findall((ROOT / "docs" / "MLPERF_LOG.md").read_text())
    assert len(rows) == len({key for key, *_ in rows}), "a key is there twice"
    return {key: (module, asked) for key, module, asked in rows}


@cache
def logged() -> dict[str, set[str]]:
    """The modules that log each key, from their calls of log.start, end and event."""
    found: dict[str, set[str]] = {}
    for path in sorted(
        path for room in ("ssd", "maskrcnn", "detection", "mlperf") for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of, method = node.func.value, node.func.attr
            if getattr(of, "id", getattr(of, "attr", "")) != "log" or method not in ("start", "end", "event"):
                continue
            key = node.args[0]
            if isinstance(key, ast.Constant):
                name = str(key.value) + {"start": "_start", "end": "_stop", "event": ""}[method]
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
            else:
                assert ast.unparse(node) == "log.event(key, value)", "a key that no page can know"
    return found


def test_the_page_has_every_key_that_the_code_logs_and_no_other():
    assert {"run_stop", "seed", "weights_initialization"} <= logged().keys()
    assert documented().keys() == logged().keys() | BY_A_BENCHMARK


@pytest.mark.parametrize("key", sorted(documented()))
def test_a_key_is_logged_where_the_page_says(key):
    module, _ = documented()[key]
    if key in BY_A_BENCHMARK:
        assert module == "the benchmark"
    else:
        assert set(re.findall(r"`([\w/.]+)`", module)) == logged()[key]


@pytest.mark.parametrize("key", sorted(documented()))
def test_a_key_is_asked_for_where_the_page_says(key):
    _, cell = documented()[key]
    words = set(cell.split(", "))
    assert words <= {"all", "-", *BENCHMARKS, *RULESETS, *DIVISIONS}

    def named(choices):
        return words.intersection(choices) or set(choices)

    said = {(b, r, d) for b in named(BENCHMARKS) for r in named(RULESETS) for d in named(DIVISIONS)}
    wanted = {
        (benchmark, ruleset, division)
        for benchmark in BENCHMARKS
        for ruleset in RULESETS
        for division in DIVISIONS
        for file in ("common", f"{division}_common", f"{division}_{benchmark}")
        for check in checker_yaml(f"training_{ruleset}/{file}.yaml")
        if check.get("KEY", {}).get("NAME") == key and "REQ" in check["KEY"]
    }
    assert wanted == (set() if cell == "-" else said)


def test_recorded_runs_have_no_key_that_the_page_lacks():
    logs = sorted((ROOT / "perf" / "results").glob("*/result_*.txt"))
    assert logs
    assert {event.key for path in logs for event in read(path)} <= documented().keys()
