"""Results as tables for people: as measured, two side by side, and against what is required."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from detection.config.settings import InputError
from perf.harness import Result
from perf.profiler import Operation

RESULT = TypeAdapter(Result)


@dataclass(frozen=True)
class Requirement:
    """What a result must reach. name: as in `Result.requirement`. part: that measures it.

    on_cpu: whether it is for a CPU or for an accelerator. least, most: of the ratio to the plain way, or of the
    value itself where the result is not beside another.
    """

    name: str
    part: str
    on_cpu: bool
    least: float = 0.0
    most: float = float("inf")

    def measured(self, result: Result) -> float:
        """The number that is compared."""
        return result.times.median if result.times else result.value.median

    def is_met(self, result: Result) -> bool:
        """Whether the result reaches it."""
        return self.least <= self.measured(result) <= self.most

    def bounds(self) -> str:
        """For people."""
        return f"at least {self.least:g}" if self.least else f"at most {self.most:g}"


REQUIREMENTS = (
    Requirement("input per core", "input", on_cpu=True, least=4),
    Requirement("memory of a worker", "memory", on_cpu=True, most=1.05),
    Requirement("training step", "step", on_cpu=True, least=4),
    Requirement("detection, trained scores", "detect", on_cpu=True, least=3.7),
    Requirement("detection, early scores", "detect", on_cpu=True, least=9),
    Requirement("metric", "metric", on_cpu=True, least=100),
    Requirement("end to end", "end-to-end", on_cpu=True, least=4),
    Requirement("maskrcnn step", "maskrcnn_step", on_cpu=True, least=1),
    Requirement("maskrcnn evaluation", "maskrcnn_evaluation", on_cpu=True, least=3),
    Requirement("end to end rate", "end-to-end", on_cpu=False, least=4000),
)


def required_of(on_cpu: bool) -> list[Requirement]:
    """What is required of a CPU (two cores) or of an accelerator (an H200)."""
    return [requirement for requirement in REQUIREMENTS if requirement.on_cpu == on_cpu]


def show(results: Iterable[Result]) -> str:
    """All results, those beside another indented, with the limit's share or how many times as fast ours is."""
    rows = [("part", "", "median", "quartiles", "range", "n", "of limit", "ours is")]
    part = ""
    for result in results:
        value, times = result.value, result.times
        rows.append(
            (
                "" if result.part == part else result.part,
                ("  " if result.beside else "") + result.variant,
                f"{figure(value.median)} {result.unit}",
                f"{figure(value.q1)} to {figure(value.q3)}",
                f"{figure(value.min)} to {figure(value.max)}",
                str(value.n),
                "" if result.share is None else f"{100 * result.share:.1f} %",
                f"{figure(times.median)} × ({figure(times.q1)} to {figure(times.q3)})" if times else "",
            )
        )
        part = result.part
    return align(rows)


def show_operations(operations: Iterable[Operation]) -> str:
    """The costliest operations of a trace."""
    rows = [("operation", "calls", "ms", "share")]
    rows += [(o.name[:80], str(o.calls), figure(o.ms), f"{100 * o.share:.1f} %") for o in operations]
    return align(rows)


def compare(first: Sequence[Result], second: Sequence[Result]) -> str:
    """What both have, side by side: medians, and how many times as good the second is."""
    others = {(r.part, r.variant, r.unit): r.value for r in second}
    rows: list[Sequence[str]] = [("part", "", "first", "second", "second is")]
    for result in first:
        other = others.get((result.part, result.variant, result.unit))
        if other is None:
            continue
        ratio = other.median / result.value.median
        better = ratio if result.unit.endswith("/s") else 1 / ratio
        medians = [f"{figure(v.median)} {result.unit}" for v in (result.value, other)]
        rows.append((result.part, result.variant, *medians, f"{better:.2f} ×"))
    return align(rows)


def check(results: Sequence[Result], on_cpu: bool) -> tuple[str, bool]:
    """A table of what is required and what was measured, and whether all of it is met; what is absent is not."""
    rows = [("requirement", "measured", "required", "")]
    passed = True
    for requirement in required_of(on_cpu):
        answers = [result for result in results if result.requirement == requirement.name]
        for result in answers:
            met = requirement.is_met(result)
            passed &= met
            measured = f"{figure(requirement.measured(result))} {'×' if result.times else result.unit}"
            verdict = "ok" if met else "SHORT"
            rows.append((f"{requirement.name}: {result.variant}", measured, requirement.bounds(), verdict))
        if not answers:
            passed = False
            rows.append((requirement.name, "not measured", requirement.bounds(), "SHORT"))
    return align(rows), passed


def read(path: Path) -> dict[str, Any]:
    """A file of results, with `results` as Result; InputError where it is none."""
    try:
        content = json.loads(path.read_text())
        content["results"] = [RESULT.validate_python(row) for row in content["results"]]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        why = f"{error.error_count()} mistakes" if isinstance(error, ValidationError) else str(error)
        raise InputError(f"{path}: no results of perf.run ({why}).") from error
    return dict(content)


def figure(number: float) -> str:
    """Three significant digits, without an exponent."""
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
