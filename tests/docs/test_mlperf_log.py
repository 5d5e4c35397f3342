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
        path for room in ("ssd", "maskrcnn", "retinanet", "detection", "mlperf") for path in (ROOT / room).rglob("*.py")
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


def rulesets(word: str) -> tuple[str, ...]:
    """Rulesets that a word of the page means: one, a range, or all others; none for another word."""
    if word.startswith("not "):
        return tuple(ruleset for ruleset in RULESETS if ruleset != word[4:])
    first, _, last = word.partition("-")
    if first not in RULESETS:
        return ()
    return RULESETS[RULESETS.index(first) : RULESETS.index(last or first) + 1]


def test_page_names_each_benchmark_and_its_rulesets():
    page = (ROOT / "docs" / "MLPERF_LOG.md").read_text()
    rows = re.findall(r"^\| ([\w -]+) \| `(\w+)` \| ([\d., ]+) \|$", page, re.MULTILINE)
    listed = {(title, ruleset): name for title, name, versions in rows for ruleset in versions.split(", ")}
    assert listed == {
        (rules.title, ruleset): name for rules in BENCHMARKS.values() for ruleset, name in rules.names.items()
    }


@pytest.mark.parametrize("key", sorted(documented()))
def test_a_key_is_asked_for_where_the_page_says(key):
    _, cell = documented()[key]
    words = set(cell.split(", "))
    versions = {ruleset for word in words for ruleset in rulesets(word)}
    words = {word for word in words if not rulesets(word)}
    assert words <= {"all", "-", *BENCHMARKS, *DIVISIONS}

    def named(choices):
        return words.intersection(choices) or set(choices)

    said = {
        (benchmark, ruleset, division)
        for benchmark in named(BENCHMARKS)
        for ruleset in BENCHMARKS[benchmark].names
        for division in named(DIVISIONS)
        if ruleset in (versions or RULESETS)
    }
    wanted = {
        (benchmark, ruleset, division)
        for benchmark, rules in BENCHMARKS.items()
        for ruleset, name in rules.names.items()
        for division in DIVISIONS
        for file in ("common", f"{division}_common", f"{division}_{name}")
        for check in checker_yaml(f"training_{ruleset}/{file}.yaml")
        if check.get("KEY", {}).get("NAME") == key and "REQ" in check["KEY"]
    }
    assert wanted == (set() if cell == "-" else said)


def test_recorded_runs_have_no_key_that_the_page_lacks():
    logs = sorted((ROOT / "perf" / "results").glob("*/result_*.txt"))
    assert logs
    assert {event.key for path in logs for event in read(path)} <= documented().keys()
