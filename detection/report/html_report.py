"""Report on one or several runs as a single HTML file without external resources.

    python -m detection.report RUN... [--against LOG...] [--out FILE] [--png DIR]

RUN is a run folder, the folder of a series (NEXP), an MLPerf log, or a folder of logs. LOG is the same, plotted for
comparison. The report omits or notes what a run did not record. Exit status: 0, or 2 if a run cannot be read or the
report cannot be written.
"""

import argparse
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.atomic_file import atomic_write
from detection.report import charts, headline, series, tables
from detection.report.run_record import RunRecord, disambiguate_names, read_runs
from mlperf import compliance, rules
from mlperf.errors import report_errors
from mlperf.reference_points import ReferencePoint

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


def make_report(
    records: Sequence[RunRecord],
    against: Sequence[RunRecord] = (),
    ruleset: str = "",
    png: str = "",
    *,
    live: bool = False,
) -> str:
    """Return the report as HTML.

    ruleset: used to check logs that name none. png: folder to write the charts to as PNG files, if set. live: the run
    may be in progress, and its page reloads itself.
    """
    all_records = disambiguate_names([*records, *against])
    records, against = all_records[: len(records)], all_records[len(records) :]
    points = reference_points(records, ruleset)
    all_charts = charts.make_charts(records, against, points)
    precision_recall, class_curves = charts.precision_recall_chart(records)
    if precision_recall:
        all_charts.append(precision_recall)
    if png:
        from detection.report.png import write_png

        Path(png).mkdir(parents=True, exist_ok=True)
        for chart in all_charts:
            write_png(chart, Path(png))
    verdicts = {r.name: None if live and not r.status else check_compliance(r, ruleset) for r in all_records}
    results = series.group_series(records, verdicts)
    single = len(records) == 1
    data = {
        "charts": [chart.to_json() for chart in all_charts],
        "curves": class_curves,
        "confusions": [{"name": r.name, **r.confusion} for r in records if r.confusion],
    }
    return render_page(
        "report.html",
        data,
        title=headline.title(records),
        live=live,
        head=headline.run_headline(records[0], verdicts[records[0].name], live=live)
        if single
        else headline.series_headline(records, results),
        run_rows=headline.run_rows(all_records, verdicts, len(records)) if len(all_records) > 1 else [],
        comparison=series.comparison(results + series.group_series(against, verdicts)),
        charts={chart.name: chart for chart in all_charts},
        target_metrics=charts.target_metrics(records),
        points=points,
        metric_groups=tables.metric_groups(records[0]) if single else [],
        metrics=tables.metric_table(all_records),
        classes=tables.class_table(records),
        confusion_names=[record.name for record in records if record.confusion],
        times=tables.time_table(all_records),
        phases=tables.phase_table(records),
        images=[{"name": record.name, "images": images} for record in records if (images := inline_images(record))],
        settings=tables.settings_table(records),
        hyperparameters=tables.hyperparameter_table(all_records),
        machine=tables.machine_table(records),
        sources=", ".join(record.name for record in all_records),
    )


def render_page(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """Return a page with its style sheet and script. data: what the script draws."""
    import jinja2  # 0.1 s, which --help does not need
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        palette=charts.PALETTE,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(to_inline_json(data)),
        **values,
    )


def to_inline_json(value: Any) -> str:
    """Return JSON that a script element can hold: it contains no markup."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def check_compliance(record: RunRecord, ruleset: str) -> compliance.Verdict | None:
    """Run the official checker on a run's log. Return None if there is no log or no known ruleset."""
    ruleset = str(record.config.get("ruleset") or ruleset)
    return compliance.check(record.log, ruleset) if record.log and ruleset in rules.RULESETS else None


def reference_points(records: Sequence[RunRecord], ruleset: str) -> list[ReferencePoint]:
    """Return the reference convergence points of runs on the benchmark's own data set.

    ruleset: of logs that name none.
    """
    points: list[ReferencePoint] = []
    for record in records:
        benchmark = rules.BENCHMARKS.get(record.benchmark)
        dataset = record.log_value("dataset") or record.config.get("dataset")
        if benchmark and dataset in (None, benchmark.dataset):
            version = record.config.get("ruleset") or ruleset or rules.newest_ruleset(record.benchmark)
            found = rules.nearest_reference_points(record.benchmark, version) if version in benchmark.names else ()
            points += [point for point in found if point not in points]
    return points


def inline_images(record: RunRecord) -> list[dict[str, Any]]:
    """Return a run's images with their file as a data URI, without unreadable ones."""
    images = []
    for image in record.images:
        file = image["file"]
        if (media_type := IMAGE_TYPES.get(file.suffix.lower())) and file.is_file():
            content = base64.b64encode(file.read_bytes()).decode()
            defaults: dict[str, Any] = {
                "group": "",
                "caption": "",
                "width": 0,
                "height": 0,
                "objects": [],
                "detections": [],
            }
            images.append(defaults | image | {"uri": f"data:{media_type};base64,{content}"})
    return images


@report_errors
def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line requests, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.report",
        description="Report on runs as one HTML file. `python -m detection.report watch` shows a run in progress.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or MLPerf log")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="LOG", help="logs to compare with")
    parser.add_argument(
        "--out", type=Path, help="default: report.html in the run folder, or here for several runs or a log"
    )
    parser.add_argument("--png", default="", metavar="DIR", help="also write the plots to this folder as PNG files")
    parser.add_argument("--ruleset", default="", choices=rules.RULESETS, help="ruleset for logs that name none")
    options = parser.parse_args(arguments)
    records = [record for path in options.runs for record in read_runs(path)]
    against = [record for path in options.against for record in read_runs(path)]
    folder = options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else Path()
    out = options.out or folder / "report.html"
    text = make_report(records, against, options.ruleset, options.png)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"report: {out}")
    return 0
