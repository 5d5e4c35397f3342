"""Tables of results: as measured, two files compared, and checked against requirements."""

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
from perf.timing import Quartiles

RESULT = TypeAdapter(Result)

# Keys and part names of records made before version 0.2.0, and their present names.
OLD_RECORD_KEYS = {"scale": "size", "limits": "rooflines", "costliest": "top_ops"}
OLD_RESULT_KEYS = {"beside": "is_baseline", "times": "speedup", "limit": "roofline", "share": "roofline_fraction"}
OLD_PARTS = {"maskrcnn_trunk": "maskrcnn_backbone", "maskrcnn_align": "maskrcnn_roi_align"}


@dataclass(frozen=True)
class Requirement:
    """Bounds for a result. name: as in `Result.requirement`. part: the one that measures it.

    on_cpu: for a CPU, otherwise for an accelerator. min, max: bounds. of_roofline: of the fraction of the machine's own
    measured peak rates, otherwise of the speedup, or of the value if the result is not a baseline.
    """

    name: str
    part: str
    on_cpu: bool
    min: float = 0.0
    max: float = float("inf")
    of_roofline: bool = False

    def value_of(self, result: Result) -> float:
        """Return the number to compare with the bounds, or nan, which is outside of them, if it was not measured."""
        if self.of_roofline:
            return math.nan if result.roofline_fraction is None else result.roofline_fraction
        return result.speedup.median if result.speedup else result.value.median

    def unit_of(self, result: Result) -> str:
        """Return the unit of that number."""
        if self.of_roofline:
            return "of the roofline"
        return "×" if result.speedup else result.unit

    def passed(self, result: Result) -> bool:
        """Return True if the result is within the bounds."""
        return self.min <= self.value_of(result) <= self.max

    def bounds(self) -> str:
        """Return the bounds as text."""
        return f"at least {self.min:g}" if self.min else f"at most {self.max:g}"


REQUIREMENTS = (
    # A speedup over float32 depends on the matrix instructions of a CPU, the fraction of its own peak rate does not.
    Requirement("training step", "step", on_cpu=True, min=0.9, of_roofline=True),
    Requirement("input of decoding", "input", on_cpu=True, min=0.5),
    Requirement("worker memory growth", "memory", on_cpu=True, max=1.05),
    Requirement("detection, trained scores", "detect", on_cpu=True, min=3.7),
    Requirement("detection, early scores", "detect", on_cpu=True, min=9),
    Requirement("metric", "metric", on_cpu=True, min=100),
    Requirement("end to end of step", "end-to-end", on_cpu=True, min=0.9),
    Requirement("maskrcnn step", "maskrcnn_step", on_cpu=True, min=1),
    Requirement("maskrcnn evaluation", "maskrcnn_evaluation", on_cpu=True, min=3),
    Requirement("retinanet step", "retinanet_step", on_cpu=True, min=2),
    Requirement("retinanet loss", "retinanet_loss", on_cpu=True, min=2),
    Requirement("retinanet loss memory", "retinanet_loss", on_cpu=True, min=3),
    Requirement("retinanet trained scores", "retinanet_decode", on_cpu=True, min=3),
    Requirement("retinanet early scores", "retinanet_decode", on_cpu=True, min=3),
    Requirement("retinanet evaluation", "retinanet_evaluation", on_cpu=True, min=5),
    Requirement("end to end rate", "end-to-end", on_cpu=False, min=4000),
    Requirement("end to end of step", "end-to-end", on_cpu=False, min=0.97),
)


def requirements_of(on_cpu: bool) -> list[Requirement]:
    """Return the requirements for a CPU (two cores) or for an accelerator (an H200)."""
    return [requirement for requirement in REQUIREMENTS if requirement.on_cpu == on_cpu]


def format_results(results: Iterable[Result]) -> str:
    """Return all results as a table, baselines indented, with roofline fraction or speedup."""
    rows = [("part", "variant", "median", "quartiles", "range", "n", "of roofline", "speedup")]
    part = ""
    for result in results:
        value, speedup = result.value, result.speedup
        rows.append(
            (
                "" if result.part == part else result.part,
                ("  " if result.is_baseline else "") + result.variant,
                f"{format_number(value.median)} {result.unit}",
                f"{format_number(value.q1)} to {format_number(value.q3)}",
                f"{format_number(value.min)} to {format_number(value.max)}",
                str(value.n),
                "" if result.roofline_fraction is None else f"{100 * result.roofline_fraction:.1f}%",
                format_ratio(speedup) if speedup else "",
            )
        )
        part = result.part
    return align(rows)


def format_ratio(ratio: Quartiles) -> str:
    """Return median and quartiles of a ratio as text."""
    return f"{format_number(ratio.median)} × ({format_number(ratio.q1)} to {format_number(ratio.q3)})"


def format_operations(operations: Iterable[Operation]) -> str:
    """Return the top operations of a trace as a table."""
    rows = [("operation", "calls", "ms", "fraction")]
    rows += [(o.name[:80], str(o.calls), format_number(o.ms), f"{100 * o.time_fraction:.1f}%") for o in operations]
    return align(rows)


def compare(first: Sequence[Result], second: Sequence[Result]) -> str:
    """Return the results that both files have as a table: medians, and how much better the second is."""
    second_values = {(r.part, r.variant, r.unit): r.value for r in second}
    rows: list[Sequence[str]] = [("part", "variant", "first", "second", "second is")]
    for result in first:
        other = second_values.get((result.part, result.variant, result.unit))
        if other is None:
            continue
        ratio = other.median / result.value.median
        improvement = ratio if result.unit.endswith("/s") else 1 / ratio
        medians = [f"{format_number(v.median)} {result.unit}" for v in (result.value, other)]
        rows.append((result.part, result.variant, *medians, f"{improvement:.2f} ×"))
    return align(rows)


def check(results: Sequence[Result], on_cpu: bool) -> tuple[str, bool]:
    """Return a table of requirements and measurements, and True if all pass. A missing measurement fails."""
    rows = [("requirement", "measured", "required", "")]
    all_passed = True
    for requirement in requirements_of(on_cpu):
        answers = [result for result in results if result.requirement == requirement.name]
        for result in answers:
            passed = requirement.passed(result)
            all_passed &= passed
            measured = f"{format_number(requirement.value_of(result))} {requirement.unit_of(result)}"
            verdict = "ok" if passed else "FAILED"
            rows.append((f"{requirement.name}: {result.variant}", measured, requirement.bounds(), verdict))
        if not answers:
            all_passed = False
            rows.append((requirement.name, "not measured", requirement.bounds(), "FAILED"))
    return align(rows), all_passed


def read(path: Path) -> dict[str, Any]:
    """Read a file of results, also one with old keys, with `results` as Result. Raise InputError if it is invalid."""
    try:
        content = rename_keys(json.loads(path.read_text()), OLD_RECORD_KEYS)
        rows = [rename_keys(row, OLD_RESULT_KEYS) for row in content["results"]]
        content["results"] = [
            RESULT.validate_python(row | {"part": OLD_PARTS.get(row["part"], row["part"])}) for row in rows
        ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error.error_count()} errors" if isinstance(error, ValidationError) else str(error)
        raise InputError(f"{path}: not a file of results ({reason}). Name a file that perf.run wrote.") from error
    return content


def rename_keys(record: dict[str, Any], new_names: dict[str, str]) -> dict[str, Any]:
    """Return a record with the keys in `new_names` renamed."""
    return {new_names.get(key, key): value for key, value in record.items()}


def caption(record: dict[str, Any]) -> str:
    """Return number of samples, date, machine, commit and load of a record."""
    host, load = record["machine"], record["load"]
    return (
        f"n = {record['n']}, {record['date']}, {host['hardware']}, {host['processor']}, "
        f"torch {host['versions']['torch']}, commit {host['commit']}, load {load['load_1min']}"
        f"{'' if load['is_idle'] else ', other processes busy'}"
    )


def format_number(number: float) -> str:
    """Return a number with three significant digits and no exponent."""
    if number == 0 or math.isnan(number):
        return f"{number:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
