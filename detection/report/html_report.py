"""A report of one run or several, as one HTML file that needs no network.

    python -m detection.report.html_report RUN... [--against LOG...] [--out FILE] [--png DIR]

RUN is a run's folder, that of a series of runs (NEXP), an MLPerf log, or a folder of logs; LOG the same, drawn for
comparison. What a run did not leave is left out or said. Exit status: 0, or 2 where a run cannot be read or the report
not be written.
"""

import argparse
import base64
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detection.report.run_record import RunRecord, number, read_runs, told_apart
from mlperf import check, rules

CLASSES_SHOWN = 15
PICTURE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}

# What run_start of metrics.jsonl says of machine and versions, and what is said elsewhere in the report.
FACTS = ("start", "network", "device", "ranks", "precision", "torch", "seed", "global_batch_size", "resumed_from")
SAID_ELSEWHERE = ("note", "ap_by_epoch", "minutes_by_epoch", "init_s", "run_s", "status", "epoch_s", "metrics")


def make(records: Sequence[RunRecord], against: Sequence[RunRecord] = (), ruleset: str = "", png: str = "") -> str:
    """The report as HTML. ruleset: to check bare logs by; logs that name theirs are checked by that.

    png: a folder that gets the figures as pictures, too.
    """
    import jinja2  # with matplotlib half a second, which whoever only asks for --help need not wait for
    from markupsafe import Markup

    from detection.report import plots

    together = told_apart([*records, *against])
    records, against = together[: len(records)], together[len(records) :]
    points = reference_points(records)
    drawn = plots.draw(records, against, points)
    if png:
        Path(png).mkdir(parents=True, exist_ok=True)
        for plot in drawn:
            plot.write_png(Path(png))
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return pages.get_template("report.html").render(
        title=title(records),
        palette=plots.PALETTE,
        runs=[head(record, verdict(record, ruleset)) for record in records],
        plots=[{"name": p.name, "title": p.title, "alt": p.alt, "svg": Markup(p.svg())} for p in drawn],
        judged=plots.judged(records),
        points=points,
        figures=figures(together),
        classes=classes(records),
        overview=overview(together),
        times=times(together),
        phases=phases(records),
        pictures=[{"name": record.name, "pictures": pictures} for record in records if (pictures := embedded(record))],
        settings=settings(records),
        recipe=recipe(together),
        machine=machine(records),
        sources=", ".join(record.name for record in together),
    )


def title(records: Sequence[RunRecord]) -> str:
    """The heading: what was trained, and on what."""
    record = records[0]
    network = record.facts.get("network") or record.config.get("network") or record.benchmark or "a detector"
    if len(records) > 1:
        return f"{len(records)} runs: {network}"
    done = {"train": "trained", "evaluate": "evaluated"}.get(record.mode, record.mode)
    return f"{network}, {done}{f' on {record.system}' if record.system else ''}"


def verdict(record: RunRecord, ruleset: str) -> check.Verdict | None:
    """What the official checker says of a run's log; None where there is no log, or no ruleset is named."""
    ruleset = str(record.config.get("ruleset") or ruleset)
    return check.check(record.log, ruleset) if record.log and ruleset in rules.RULESETS else None


def head(record: RunRecord, checked: check.Verdict | None) -> dict[str, Any]:
    """What stands at the top of the report about one run."""
    judged = {name: (value, record.targets.get(name)) for name, value in record.figures.items()}
    words, tone = ended(record)
    rows = []
    if math.isfinite(record.run_s):
        rows.append(("time to target" if tone == "good" else "time", duration(record.run_s)))
    rows.append(("epochs", f"{record.epoch}"))
    for name in record.judged_by:
        if name in judged:
            value, target = judged[name]
            rows.append((name, f"{value:.4f}" + (f", target {target:g}" if target is not None else "")))
    rows.append(("system", record.system or "not recorded"))
    if device := record.facts.get("device"):
        rows.append(("device", f"{record.facts.get('ranks', 1)} × {device}"))
    rows.append(("MLPerf compliance", compliance(record, checked)))
    return {
        "name": record.name,
        "verdict": words,
        "tone": tone,
        "head": rows,
        "compliance_messages": checked.messages if checked else [],
        "warnings": record.warnings,
    }


def ended(record: RunRecord) -> tuple[str, str]:
    """How a run ended, and whether that is "good", "bad" or neither."""
    if record.mode.startswith("benchmark"):
        return "A benchmark: nothing was trained to a target", ""
    if record.mode != "train":
        return "Evaluated", ""
    if record.status == "success":
        return "Target reached", "good"
    if record.status:
        stopped = record.outcome.get("stopped_by") or not record.figures
        return "Aborted" if stopped else "Target not reached", "bad"
    return "No end is recorded: the run goes on still, or was killed", "bad"


def compliance(record: RunRecord, checked: check.Verdict | None) -> str:
    """The checker's verdict in a word, or why there is none."""
    if checked is not None:
        return f"{'PASS' if checked.passed else 'FAIL'} ({checked.ruleset})"
    return "not checked: name a --ruleset" if record.log else "no log"


def reference_points(records: Sequence[RunRecord]) -> list[rules.ReferencePoint]:
    """How fast the reference converges, for runs that keep to its data and target; else nothing."""
    found: list[rules.ReferencePoint] = []
    for record in records:
        known = rules.BENCHMARKS.get(record.benchmark)
        ruleset = str(record.config.get("ruleset") or rules.RULESETS[-1])
        dataset = record.value("dataset") or record.config.get("dataset") or "coco2017"
        if known and dataset == "coco2017":
            found += [point for point in known.reference_points if ruleset in point.rulesets and point not in found]
    return found


def figures(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The table of all figures of the last evaluations, or nothing."""
    having = [record for record in records if record.figures]
    names = list(dict.fromkeys(name for record in having for name in record.figures))
    return (
        {
            "names": [record.name for record in having],
            "rows": [[name, *(figure(record.figures.get(name)) for record in having)] for name in names],
        }
        if having
        else {}
    )


def figure(value: float | None) -> str:
    """A figure of COCO's, which is -1 where there is nothing to find."""
    return "" if value is None else "–" if value < 0 else f"{value:.4f}"


def classes(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The table of AP by class, the most frequent first, or nothing."""
    having = [record for record in records if record.classes]
    if not having:
        return {}
    by_run = [{str(row.get("name")): row for row in record.classes} for record in having]
    objects: dict[str, float] = {}
    for rows in by_run:
        for name, row in rows.items():
            objects.setdefault(name, number(row.get("objects")))
    table = []
    for name in sorted(objects, key=lambda name: -objects[name] if objects[name] == objects[name] else 0):
        values = [number(rows.get(name, {}).get("AP")) for rows in by_run]
        cells = [
            {"text": "–" if math.isnan(v) else f"{v:.3f}", "percent": round(100 * max(0.0, min(1.0, v)), 1)}
            if math.isfinite(v)
            else {"text": "–", "percent": 0}
            for v in values
        ]
        table.append({"name": name, "objects": f"{objects[name]:.0f}", "cells": cells})
    parts = [table[:CLASSES_SHOWN], table[CLASSES_SHOWN:]]
    return {"names": [record.name for record in having], "parts": [part for part in parts if part]}


def overview(records: Sequence[RunRecord]) -> list[list[str]]:
    """A row for each run: name, end, time, epochs, AP, images a step, system."""
    return [
        [
            record.name,
            ended(record)[0],
            duration(record.run_s) if math.isfinite(record.run_s) else "–",
            str(record.epoch),
            figure(record.figures.get("AP")),
            shown(record.facts.get("global_batch_size") or record.value("global_batch_size")),
            record.system,
        ]
        for record in records
    ]


def times(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The table of where the time of each run went, by kind of work."""
    spent_s = {record.name: spent for record in records if sum((spent := record.times_s()).values()) > 0}
    kinds = list(dict.fromkeys(kind for spent in spent_s.values() for kind in spent))
    rows = []
    for name, spent in spent_s.items():
        whole_s = sum(spent.values())
        cells = [f"{duration(spent[kind])} ({percent(spent[kind] / whole_s)})" for kind in kinds]
        rows.append([name, duration(whole_s), *cells])
    return {"kinds": kinds, "rows": rows}


def phases(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The table of where the time of a step went, of runs that measured it."""
    results = [
        (record.name, result)
        for record in records
        for result in record.outcome.get("results") or []
        if isinstance(result, dict) and isinstance(result.get("share"), dict)
    ]
    names = list(dict.fromkeys(str(name) for _, result in results for name in result["share"]))
    rows = [
        [run, shown(result.get("input")), *(percent(number(result["share"].get(name))) for name in names)]
        for run, result in results
    ]
    return {"names": names, "rows": rows}


def embedded(record: RunRecord) -> list[dict[str, str]]:
    """The pictures of a run with their captions, as data URIs; those that cannot be read are left out."""
    found = []
    for picture in record.pictures:
        file = picture["file"]
        if (kind := PICTURE_TYPES.get(file.suffix.lower())) and file.is_file():
            content = base64.b64encode(file.read_bytes()).decode()
            found.append({"uri": f"data:{kind};base64,{content}", "caption": str(picture.get("caption", ""))})
    return found


def settings(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The configurations beside each other: what differs, and what is the same."""
    having = [record for record in records if record.config]
    differing, same = [], []
    for key in dict.fromkeys(key for record in having for key in record.config):
        values = [shown(record.config.get(key)) for record in having]
        if len(set(values)) > 1:
            differing.append([key, *values])
        else:
            same.append([key, values[0]])
    return {"names": [record.name for record in having], "differing": differing, "same": same}


def recipe(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the MLPerf logs say of the hyperparameters."""
    having = [record for record in records if record.events]
    known = [rules.hyperparameter_keys(r.benchmark) for r in having if r.benchmark in rules.BENCHMARKS]
    rows = [
        [key, *("" if record.value(key) is None else shown(record.value(key)) for record in having)]
        for key in dict.fromkeys(key for keys in known for key in keys)
        if any(record.value(key) is not None for record in having)
    ]
    return {"names": [record.name for record in having], "rows": rows}


def machine(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the runs say of their machine and of versions."""
    told = [machine_of(record) for record in records]
    keys = dict.fromkeys(key for facts in told for key in facts)
    return {
        "names": [record.name for record in records],
        "rows": [[key, *(facts.get(key, "") for facts in told)] for key in keys],
    }


def machine_of(record: RunRecord) -> dict[str, str]:
    """Name to value of one run's machine."""
    facts = {name: record.facts.get(name) for name in FACTS if record.facts.get(name) is not None}
    if isinstance(start := facts.get("start"), str):
        facts["start"] = instant(start)
    if isinstance(of_machine := record.facts.get("machine"), Mapping):
        facts |= of_machine
    if not facts:
        platform = record.value("submission_platform")
        facts = {"platform": platform} if platform else {}
    for name, value in record.summary.items():
        if isinstance(value, Mapping) and name == "versions":
            facts |= value
        elif name not in SAID_ELSEWHERE and not isinstance(value, Mapping | list) and value not in ("", None):
            facts[name] = value
    for logged in record.points("commit")[-1:]:
        facts["commit"] = f"{logged.value}{', with changes' if logged.metadata.get('dirty') else ''}"
    return {str(name): shown(value) for name, value in facts.items()}


def instant(text: str) -> str:
    """A date and time of metrics.jsonl to the second, in UTC."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return text


def shown(value: Any) -> str:
    """A value of a setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "–" if value is None or value == "" else str(value)


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.report.html_report", description="Report on runs, as one HTML file."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or an MLPerf log")
    parser.add_argument(
        "--against", nargs="+", type=Path, default=[], metavar="LOG", help="logs to draw for comparison"
    )
    parser.add_argument("--out", type=Path, help="default: report.html in the run's folder; of several, in this one")
    parser.add_argument("--png", default="", metavar="DIR", help="also write the figures as pictures to this folder")
    parser.add_argument("--ruleset", default="", choices=rules.RULESETS, help="checks bare logs by it")
    options = parser.parse_args(arguments)
    try:
        records = [record for path in options.runs for record in read_runs(path)]
        against = [record for path in options.against for record in read_runs(path)]
        single = options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else Path()
        out = options.out or single / "report.html"
        text = make(records, against, options.ruleset, options.png)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; name files that can be read and written.", file=sys.stderr)
        return 2
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
