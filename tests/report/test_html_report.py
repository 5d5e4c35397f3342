"""Report on real runs, published logs and incomplete runs, and its layout in a browser."""

import base64
import errno
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import processes
from detection.report import __main__ as command_line
from detection.report import charts, html_report, png
from detection.report.formatting import format_value
from detection.report.run_record import disambiguate_names, read_runs
from paths import ROOT, shared
from synthetic_log import write_run

RESULTS = ROOT / "perf" / "results"
TOY, BCCD = RESULTS / "2026-11-21_toy_2core_cpu", RESULTS / "2026-11-21_bccd_2core_cpu"
SECTIONS = {"accuracy", "training", "time", "settings", "machine"}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Parsed page: its elements, text and external references. Every element must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.ids, self.words, self.loads, self.scripts = [], [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.elements.append((tag, values))
        if "id" in values and tag == "section":
            self.ids.add(values["id"])
        self.loads += [values[name] for name in ("src", "href", "xlink:href", "srcset") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def charts(self):
        """Return the descriptions of the charts."""
        return [values["aria-label"] for _, values in self.elements if values.get("class") == "plot"]

    @property
    def data(self):
        """The JSON that the script draws."""
        return json.loads(self.scripts[0])


def make_page(*paths, against=(), ruleset="") -> Page:
    records = [record for path in paths for record in read_runs(Path(path))]
    against_records = [record for path in against for record in read_runs(Path(path))]
    return Page(html_report.make_report(records, against_records, ruleset))


@pytest.fixture
def run_copy(tmp_path) -> Path:
    """Copy of a recorded run, for tests that damage it."""
    return Path(shutil.copytree(TOY, tmp_path / "run"))


@pytest.fixture(scope="module")
def toy_page() -> Page:
    return make_page(TOY)


def test_report_shows_the_result_and_every_section(toy_page):
    assert toy_page.ids == SECTIONS
    links = [values["href"] for tag, values in toy_page.elements if tag == "a"]
    assert links == ["#main", "#accuracy", "#training", "#time", "#settings", "#machine"]
    for words in (
        "ssd300-r34, trained on toy",
        "Target reached",
        "AP 0.2351 target 0.23",
        "time to target 93.2 s",
        "images per second 4.33",
        "hardware 1 × cpu, 2 threads toy",
        "date 2026-11-21 12:49:23 UTC",
        "MLPerf compliance PASS ruleset 1.1.0",
        "0.0665 AP at IoU 0.75",
        "87.7 s (92.6%)",
        "72 settings",
        "torchvision",
    ):
        assert words in toy_page.text, words


def test_headline_comes_before_everything_else(toy_page):
    text = toy_page.text
    assert text.index("Target reached") < text.index("AP 0.2351") < text.index("time to target") < text.index("Boxes")


def test_report_shows_machine_versions_and_commit(run_copy):
    lines = (run_copy / "metrics.jsonl").read_text().splitlines()
    machine = {"processors": "2 × A CPU, 64 cores each", "memory": "512 GiB", "software": "Python 3.12.1, numpy 2.4"}
    run_start = json.loads(lines[0]) | {"machine": machine, "start": "2026-11-21T18:38:57.877+02:00"}
    (run_copy / "metrics.jsonl").write_text("\n".join([json.dumps(run_start), *lines[1:]]))
    log = run_copy / "result_0.txt"
    event = {"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": "commit", "value": "ab" * 20}
    log.write_text(f":::MLLOG {json.dumps(event | {'metadata': {'dirty': True}})}\n" + log.read_text())
    text = make_page(run_copy).text
    for words in (*machine.values(), "start 2026-11-21 16:38:57 UTC", f"commit {'ab' * 20}, with changes"):
        assert words in text, words


def test_report_has_no_external_resources_and_only_its_own_script(toy_page):
    assert all(url.startswith(("#", "data:")) for url in toy_page.loads), toy_page.loads
    assert not {tag for tag, _ in toy_page.elements} & {"link", "iframe", "object"}
    assert [values for tag, values in toy_page.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    (policy,) = (v["content"] for t, v in toy_page.elements if v.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(toy_page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy  # a browser runs nothing else
    text = html_report.make_report(read_runs(TOY))
    assert not re.search(r"@import|url\(|https?://(?!www.w3.org/2000/svg)", text)
    assert not [name for _, values in toy_page.elements for name in values if name.startswith("on")]


def test_references_within_the_page_resolve_to_unique_ids(toy_page):
    ids = [values["id"] for _, values in toy_page.elements if "id" in values]
    assert len(set(ids)) == len(ids)
    references = {values["href"][1:] for tag, values in toy_page.elements if tag == "a"}
    assert len(references) >= 6
    assert references <= set(ids)


def test_every_chart_has_a_description_and_data(toy_page):
    labels = toy_page.charts()
    assert [label.split(".")[0] for label in labels] == [
        "AP by epoch", "Loss by step", "Learning rate by step", "Throughput, images per second by step",
    ]  # fmt: skip
    assert "0.2351 after epoch 1" in labels[0]
    assert "from 23.68 at step 9 to 4.586 at step 94" in labels[1]
    names = [values["data-chart"] for _, values in toy_page.elements if "data-chart" in values]
    charts_by_name = {chart["name"]: chart for chart in toy_page.data["charts"]}
    assert names == list(charts_by_name) == ["AP", "loss", "learning_rate", "throughput"]
    (loss,) = charts_by_name["loss"]["lines"]
    assert (loss["x"][0], loss["y"][0], loss["x"][-1], loss["y"][-1]) == (9, 23.679, 94, 4.5857)
    assert charts_by_name["AP"]["levels"] == [[0.23, "target 0.23"]]


def test_timeline_shows_each_epoch_and_evaluation(toy_page):
    labels = [v["aria-label"] for _, v in toy_page.elements if v.get("class") == "timeline"]
    assert labels == [f"{TOY.name}: init 1.5 s, training 87.7 s, evaluation 5.2 s, other 0.3 s"]
    spans = [v["title"] for tag, v in toy_page.elements if tag == "span" and "title" in v]
    assert spans == ["init: 1.5 s", "epoch 1: 87.7 s", "evaluation 1: 5.2 s"]


def test_colors_have_contrast_in_both_modes():
    for light, dark in charts.PALETTE:
        assert contrast(light, "#f6f7f9") >= 3
        assert contrast(dark, "#1d2127") >= 3


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colors as defined by WCAG 2."""

    def luminance(color):
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_report_on_two_runs_shows_differing_settings_first():
    page = make_page(TOY, BCCD)
    text = page.text
    assert "2 runs: " in text
    start = text.index("Settings that differ")
    assert start < text.index("batch_size 4 8", start) < text.index("equal settings")
    rows = [values for tag, values in page.elements if tag == "tr" and values.get("class") == "differs"]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (TOY, BCCD)]
    keys = configs[0].keys() | configs[1].keys()
    assert len(rows) == sum(format_value(configs[0].get(key)) != format_value(configs[1].get(key)) for key in keys)
    (accuracy,) = (label for label in page.charts() if label.startswith("AP by epoch"))
    assert "2026-11-21_toy_2core_cpu: 0.2351" in accuracy
    assert "the target is 0.23; the target is 0.55" in accuracy


def test_run_is_compared_with_published_logs_and_the_reference():
    page = make_page(
        shared("logs/nf5488_pytorch/ssd/result_1.txt"),
        against=[shared("logs/dgx1_ngc20.06_pytorch/ssd")],
        ruleset="0.7.0",
    )
    assert "time to target 10 min 27 s" in page.text
    assert "MLPerf compliance PASS ruleset 0.7.0" in page.text
    assert "training" not in page.ids
    (accuracy,) = (label for label in page.charts() if label.startswith("AP by epoch"))
    assert "1xNVIDIA DGX-1 result_4: 0.2323 after epoch 50" in accuracy
    assert "the reference takes 65.1 epochs at batch 2048" in accuracy
    assert len(re.findall(r"1xNVIDIA DGX-1 result_\d Target reached 20 min", page.text)) == 5
    # The score of the five runs is the published one: 1.98 times that of the only run here.
    assert "1xNVIDIA DGX-1 (5 runs) 20 min 41 s 1.98×" in page.text
    assert "NVIDIA DGX-1, 8×V100 20 min 41 s 1.98×" in page.text


@pytest.mark.parametrize(
    ("folder", "ruleset", "target", "reference"),
    [
        ("v3.0_dgxh100/maskrcnn", "3.0.0", "the target is 0.377", "12.8 epochs at batch 8"),
        ("v3.0_dgxh100/ssd", "3.0.0", "the target is 0.34", "7.89 epochs at batch 2048"),
        ("v4.0_h200/ssd", "4.0.0", "the target is 0.34", "8.64 epochs at batch 2560"),
        ("v5.1_gb200x8/retinanet", "5.1.0", "the target is 0.34", "8.64 epochs at batch 2560"),
    ],
)
def test_published_logs_of_later_rounds_are_drawn(folder, ruleset, target, reference):
    page = make_page(shared(f"logs/{folder}"), ruleset=ruleset)
    assert page.text.count("PASS") == (4 if "maskrcnn" in folder else 5)
    assert target in str(page.charts())
    (accuracy,) = (label for label in page.charts() if label.startswith("AP by epoch"))
    assert f"the reference takes {reference}" in accuracy


def test_run_whose_clock_was_set_back_has_no_time(tmp_path):
    page = make_page(write_run(tmp_path / "result_0.txt", minutes=-30), ruleset="1.1.0")
    assert "the clock was set back by" in page.text
    assert "FAIL ruleset 1.1.0" in page.text
    assert "time to target" not in page.text
    assert "-30" not in page.text


def test_reference_is_not_drawn_for_other_data(toy_page):
    assert "the reference takes" not in str(toy_page.charts())


def test_aborted_run_with_empty_metrics_and_truncated_log_is_reported(run_copy):
    (run_copy / "metrics.jsonl").write_text("")
    log = (run_copy / "result_0.txt").read_bytes()
    end = log.index(b'"block_stop"')
    (run_copy / "result_0.txt").write_bytes(log[:end])
    page = make_page(run_copy)
    assert page.ids == SECTIONS - {"accuracy", "training"}
    assert page.charts() == []
    assert "No end is recorded" in page.text
    assert "FAIL ruleset 1.1.0" in page.text
    assert "not an MLPerf log line" in page.text
    assert "metrics.jsonl is empty or missing" in page.text


def test_reason_of_a_stopped_run_is_shown(run_copy):
    lines = processes.metrics(run_copy)
    lines[-1] |= {"converged": False, "stopped_by": "NonFiniteLossError"}
    lines[3]["loss"] = float("nan")
    (run_copy / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"event": "st')
    text = (run_copy / "result_0.txt").read_text()
    (run_copy / "result_0.txt").write_text(text.replace('"status": "success"', '"status": "aborted"'))
    page = make_page(run_copy)
    assert "Aborted" in page.text
    assert "Stopped after step 95 of epoch 1: NonFiniteLossError" in page.text
    assert "the loss is nan at step 29" in page.text
    assert "metrics.jsonl, line 15: not an event, possibly truncated" in page.text


def test_run_stopped_after_one_step_has_no_empty_plots_and_a_reason(run_copy):
    start, step, *_, summary = processes.metrics(run_copy)
    stop = {"stopped_by": "TrainingStopped", "stop_reason": "SIGTERM after step 1", "converged": False, "metrics": {}}
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, [start, step, summary | stop])))
    log = (run_copy / "result_0.txt").read_text()
    (run_copy / "result_0.txt").write_text(log[: log.index("\n", log.index('"epoch_start"')) + 1])
    page = make_page(run_copy)
    assert "Stopped after step 10 of epoch 1: SIGTERM after step 1" in page.text
    assert page.charts() == []
    assert "accuracy" not in page.ids


@pytest.mark.filterwarnings("error")
def test_report_of_evaluated_weights_has_no_plot_by_epoch_and_no_warning(run_copy):
    (run_copy / "result_0.txt").unlink()
    events = [event | {"mode": "evaluate"} for event in processes.metrics(run_copy)]
    kept = [event | {"epoch": 0} for event in events if event["event"] in ("run_start", "evaluation", "summary")]
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    page = make_page(run_copy)
    assert "Evaluated" in page.text
    assert page.charts() == []
    assert "0.0665 AP at IoU 0.75" in page.text


def test_zero_missing_and_invalid_metrics_are_shown(run_copy):
    text = (run_copy / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if line["event"] == "evaluation":
            line["metrics"] |= {"AP": 0.0, "APs": -1.0, "APm": float("nan")}
        elif line["event"] == "step":
            line |= {"loss": float("inf"), "lr": "much", "images_per_s": None}
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = make_page(run_copy)
    assert "AP 0.0000 target 0.23" in page.text
    assert "– AP of small objects" in page.text
    assert "training" not in page.ids


def test_run_with_masks_shows_both_metrics(run_copy):
    lines = processes.metrics(run_copy)
    for line in lines:
        if "targets" in line:
            line["targets"] = {"AP": 0.377, "mask_AP": 0.339}
        if line["event"] == "evaluation":
            line["metrics"]["mask_AP"] = 0.125
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = make_page(run_copy)
    assert "mask AP 0.1250 target 0.339" in page.text
    assert [label[:17] for label in page.charts()][:2] == ["AP by epoch. run:", "mask AP by epoch."]


def test_series_folder_is_read_as_its_runs(tmp_path):
    for number in (10, 9, 0):
        shutil.copytree(TOY, tmp_path / f"experiment_{number}")
        (tmp_path / f"result_{number}.txt").symlink_to(f"experiment_{number}/result_0.txt")
    records = read_runs(tmp_path)
    assert [record.name for record in records] == ["experiment_0", "experiment_9", "experiment_10"]
    assert all(record.events_named("step") and record.config for record in records)


def test_log_with_several_metrics_names_them_like_metrics_jsonl(run_copy, tmp_path):
    text = (run_copy / "result_0.txt").read_text()
    log = tmp_path / "result_3.txt"
    log.write_text(text.replace('"value": 0.23510654349837345', '"value": {"BBOX": 0.38, "SEGM": 0.341}'))
    (record,) = read_runs(log)
    assert record.metric_history == {"AP": [(1, 0.38)], "mask_AP": [(1, 0.341)]}


def test_recorded_text_is_never_markup(run_copy):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>$x_1$"
    for name in ("metrics.jsonl", "config.json", "result_0.txt", "summary.json"):
        text = (run_copy / name).read_text()
        (run_copy / name).write_text(text.replace('"toy"', json.dumps(evil)).replace("torchvision", evil))
    (run_copy / "classes.json").write_text(json.dumps([{"name": evil, "AP": 0.5, "objects": 3}]))
    (run_copy / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run_copy / "pictures" / "a.jpg")
    picture = {"file": "../pictures/a.jpg", "caption": evil}
    shape = {"name": evil, "state": "missed", "box": [1, 2, 3, 4], "mask": "M0 0H4Z"}
    sized = picture | {"group": evil, "width": 8, "height": 8, "objects": [shape], "detections": [shape | {"score": 1}]}
    (run_copy / "pictures.json").write_text(json.dumps([picture, sized]))
    confusion = {"classes": [evil], "objects": [1], "score_bins": 20, "counts": [[1, 1, 19, 1]]}
    (run_copy / "confusion.json").write_text(json.dumps(confusion))
    page = make_page(run_copy)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 2
    assert page.data["confusions"][0]["classes"] == [evil]
    assert [v["alt"] for t, v in page.elements if t == "img"] == [evil]
    assert all(url.startswith(("#", "data:")) for url in page.loads)
    assert evil in page.text


def test_images_outside_the_run_folder_are_not_embedded(run_copy):
    (run_copy / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run_copy.parent / "secret.jpg")
    (run_copy / "pictures.json").write_text(json.dumps([{"file": "../../secret.jpg", "caption": "c"}]))
    assert "img" not in {tag for tag, _ in make_page(run_copy).elements}


def test_classes_are_sorted_by_number_of_objects(run_copy):
    rows = [{"name": f"class {n}", "AP": n / 40 if n else None, "objects": n} for n in range(20)]
    (run_copy / "classes.json").write_text(json.dumps(rows))
    text = make_page(run_copy).text
    assert "class 19 19 0.475 class 18 18 0.450" in text
    assert "class 0 0 –" in text


def test_precision_recall_and_confusion_are_drawn_from_their_files(run_copy):
    curves = [[1.0] * 51 + [0.0] * 50, [0.5] * 101]
    rows = [
        {"name": name, "AP": 0.5, "objects": 4, "precision50": curve, "precision75": curves[1]}
        for name, curve in zip("ab", curves, strict=True)
    ]
    (run_copy / "classes.json").write_text(json.dumps([*rows, {"name": "c", "AP": None, "precision50": []}]))
    confusion = {"classes": ["a"], "objects": [4], "score_bins": 20, "counts": [[1, 1, 19, 3], [0, 1, 2, 9]]}
    (run_copy / "confusion.json").write_text(json.dumps(confusion))
    page = make_page(run_copy)
    (chart,) = (chart for chart in page.data["charts"] if chart["name"] == "precision_recall")
    assert [line["name"] for line in chart["lines"]] == ["IoU 0.50", "IoU 0.75"]
    assert chart["lines"][0]["y"][:1] + chart["lines"][0]["y"][-1:] == [0.75, 0.25]
    assert page.data["curves"][0]["curves"] == {"a": curves[0], "b": curves[1]}
    assert page.data["confusions"] == [{"name": "run", **confusion}]
    assert "IoU 0.50: mean precision 0.502 over recall 0 to 1" in str(page.charts())
    assert {values["id"] for tag, values in page.elements if tag == "input"} == {"score"}


def test_images_have_their_boxes_masks_and_groups(run_copy):
    (run_copy / "pictures").mkdir()
    Image.new("RGB", (80, 60)).save(run_copy / "pictures" / "a.jpg")
    shape = {"name": "disc", "state": "missed", "box": [1, 2, 30, 4]}
    picture = {"file": "a.jpg", "group": "missed", "caption": "0 of 1", "width": 80, "height": 60, "objects": [shape]}
    picture["detections"] = [
        {"name": "square", "state": "false", "score": 0.876, "box": [5, 6, 7, 8], "mask": "M5 6H9Z"}
    ]
    (run_copy / "pictures.json").write_text(json.dumps([picture]))
    page = make_page(run_copy)
    assert page.ids == SECTIONS | {"images"}
    assert "disc (missed)" in page.text
    assert "square 0.88 (false)" in page.text
    assert [(v["x"], v["width"]) for tag, v in page.elements if tag == "rect"] == [("1", "30"), ("5", "7")]
    assert [v["d"] for tag, v in page.elements if tag == "path"] == ["M5 6H9Z"]
    assert [v["data-group"] for tag, v in page.elements if "data-group" in v] == ["missed"]


def test_loss_terms_and_memory_of_one_run_are_drawn(run_copy):
    lines = processes.metrics(run_copy)
    for line in lines:
        if line["event"] == "step":
            line |= {"losses": {"boxes": 1.0, "classes": 2.0}, "memory_gib": 3.5}
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    charts_by_name = {chart["name"]: chart for chart in make_page(run_copy).data["charts"]}
    assert [line["name"] for line in charts_by_name["losses"]["lines"]] == ["boxes", "classes"]
    assert charts_by_name["memory"]["lines"][0]["y"][0] == 3.5


def test_flags_of_a_run_are_shown_apart_from_its_other_settings(run_copy):
    lines = processes.metrics(run_copy)
    lines[0]["flags"] = ["batch_size", "seed"]
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = make_page(run_copy).text
    start = text.index("Settings given as flags")
    assert start < text.index("batch_size 4 seed – 70 other settings", start)


def test_five_runs_have_a_score_and_failed_ones_are_marked(tmp_path):
    paths = [write_run(tmp_path / f"result_{n}.txt", minutes=10 + n, seed=n) for n in range(5)]
    text = make_page(*paths, ruleset="1.1.0").text
    assert "5 of 5 runs reached the target MLPerf score 12 min 0 s" in text
    assert "mean of 5 runs without the fastest and the slowest" in text
    assert "fastest 10 min 0 s" in text
    assert "slowest 14 min 0 s" in text
    assert "standard deviation 94.9 s 13.2% of the mean" in text
    for n in range(2):
        paths[n].unlink()
        write_run(paths[n], minutes=10 + n, seed=n, status="aborted")
    text = make_page(*paths, ruleset="1.1.0").text
    assert "3 of 5 runs reached the target No MLPerf score" in text
    assert "2 of 5 runs did not reach the target or do not comply" in text


def test_page_of_80_epochs_of_coco_is_small(run_copy):
    start, *_, summary = processes.metrics(run_copy)
    metrics = processes.metrics(run_copy, "evaluation")[0]["metrics"]
    events = [start]
    for epoch in range(1, 81):
        for step in range(50):
            values = {"loss": 3.0 + 1 / (step + 1), "lr": 0.01, "images_per_s": 9818.1, "memory_gib": 30.1}
            terms = {"losses": {"boxes": 1.5, "classes": 1.5}}
            events.append(
                {"event": "step", "time_s": epoch, "step": epoch * 50 + step, "epoch": epoch, **values, **terms}
            )
        events.append({"event": "evaluation", "epoch": epoch, "seconds": 1.0, "metrics": metrics})
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*events, summary])))
    curve = [round(1 - n / 110, 3) for n in range(101)]
    rows = [
        {"name": f"class {n}", "AP": 0.2, "objects": n, "precision50": curve, "precision75": curve} for n in range(80)
    ]
    (run_copy / "classes.json").write_text(json.dumps(rows))
    counts = [[n % 81, n // 81, s, 9] for n in range(0, 6561, 3) for s in range(20)]
    confusion = {"classes": [row["name"] for row in rows], "objects": [9] * 80, "score_bins": 20, "counts": counts}
    (run_copy / "confusion.json").write_text(json.dumps(confusion))
    text = html_report.make_report(read_runs(run_copy))
    assert len(text) < 1.5e6  # without images, of which twelve have at most 2 MB
    assert len(Page(text).data["charts"][1]["lines"][0]["x"]) <= charts.MAX_POINTS


def test_runs_with_equal_names_get_unique_names(tmp_path):
    folders = [Path(shutil.copytree(TOY, tmp_path / parent / "run")) for parent in ("a", "b")]
    records = [record for folder in (*folders, folders[1]) for record in read_runs(folder)]
    names = [record.name for record in disambiguate_names(records)]
    assert names == ["a/run", "b/run (1)", "b/run (2)"]


@pytest.mark.parametrize("key", ["time_fraction", "share"])
def test_step_time_by_phase_is_shown_for_new_and_older_runs(run_copy, key):
    results = [{"input": "real", key: {"data": 0.25, "forward": 0.75}}]
    summary = {"event": "summary", "results": results}
    (run_copy / "metrics.jsonl").write_text(json.dumps(summary))
    assert "run input data forward run real 25.0% 75.0%" in make_page(run_copy).text


@pytest.mark.parametrize("key", ["run_index", "experiment"])
def test_log_of_the_run_index_is_read_for_new_and_older_runs(run_copy, key):
    (run_copy / "config.json").write_text(json.dumps({key: 3}))
    (run_copy / "result_3.txt").write_text((run_copy / "result_0.txt").read_text())
    (run_copy / "result_4.txt").write_text("")
    (record,) = read_runs(run_copy)
    assert record.log == run_copy / "result_3.txt"


def test_help_starts_without_torch_or_matplotlib_and_names_the_live_view():
    code = "import sys; from detection.report.__main__ import main\ntry: main(['--help'])\n"
    code += "finally: print(sorted({'torch', 'matplotlib', 'jinja2', 'rich'} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert "python -m detection.report watch" in " ".join(process.stdout.split())


def test_command_writes_report_into_run_folder_and_plots_as_png(run_copy, tmp_path, capsys):
    assert command_line.main([str(run_copy), "--png", str(tmp_path / "png")]) == 0
    assert capsys.readouterr().out == f"report: {run_copy}/report.html\n"
    assert Page((run_copy / "report.html").read_text()).ids == SECTIONS
    assert {path.stem for path in (tmp_path / "png").iterdir()} == {
        "AP", "loss", "learning_rate", "throughput",
    }  # fmt: skip
    with Image.open(tmp_path / "png" / "loss.png") as image:
        assert len(image.getcolors(1 << 20)) > 20


def test_full_disk_is_named_and_leaves_no_partial_file(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = [str(TOY), "--out", str(tmp_path / "out.html")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        assert command_line.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/out.html: No space left on device.")
    monkeypatch.setattr(png.Figure, "savefig", fail)
    assert command_line.main([*words, "--png", str(tmp_path / "png")]) == 2
    assert re.match(rf"error: {tmp_path}/png/\w+.png: No space left on device", capsys.readouterr().err)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_path_without_a_run_is_rejected_with_a_hint(tmp_path, capsys):
    (tmp_path / "result_0.txt").write_text("not a log\n")
    for path, words in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "result_0.txt", "contains no line of an MLPerf log"),
        (ROOT / "tests", "contains neither metrics.jsonl nor result_*.txt"),
    ):
        assert command_line.main([str(path), "--out", str(tmp_path / "out.html")]) == 2
        assert words in capsys.readouterr().err
    assert command_line.main([str(TOY), "--out", str(tmp_path / "result_0.txt" / "out.html")]) == 2
    assert "Check the path, its permissions and its disk." in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def commands() -> list[str]:
    """Return the commands of the report in docs/REPORT.md."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "REPORT.md").read_text(), flags=re.DOTALL)
    return [
        line.removeprefix("$ ")
        for block in blocks
        for line in block.splitlines()
        if "detection.report" in line and "--serve" not in line
    ]


@pytest.mark.parametrize("command", commands())
def test_documented_command_runs(command, tmp_path):
    (tmp_path / "perf").symlink_to(ROOT / "perf")
    command = command.replace(".venv/bin/python", sys.executable)
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr
    if "--out" in command:
        out = command.split("--out ")[1].split()[0]
        assert process.stdout == f"report: {out}\n"
        assert Page((tmp_path / out).read_text()).ids >= {"accuracy", "time", "settings", "machine"}
    if "--png" in command:
        assert len(list((tmp_path / "figures").glob("*.png"))) == 4


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_page_does_not_scroll_sideways_on_a_phone(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "report.html"
    file.write_text(html_report.make_report(read_runs(TOY) + read_runs(BCCD)))
    # A frame has the width of a phone, because a headless window has a larger minimum width.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe src="report.html" style="width:400px;height:900px;border:0"></iframe>'
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        " const wide = [...page.querySelectorAll('figure svg, img, .card, .scroll, p')]"
        ".filter(e => e.getBoundingClientRect().right > 400).length;"
        " document.title = [page.documentElement.scrollWidth, wide,"
        " page.querySelectorAll('.plot svg').length, page.querySelector('.plot svg').clientWidth].join(' '); }"
        "</script>"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--window-size=900,1000"]
    process = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=90)
    match = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", process.stdout)
    assert match, process.stdout + process.stderr
    page_width, num_too_wide, num_plots, plot_width = map(int, match.groups())
    assert page_width <= 400
    assert num_too_wide == 0
    assert num_plots == 4
    assert plot_width > 340
