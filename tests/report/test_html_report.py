"""The report: of real runs, of published logs, of runs that broke off, and what it looks like in a browser."""

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

from detection.report import html_report, plots
from detection.report.run_record import read_runs, told_apart
from paths import ROOT, shared

RESULTS = ROOT / "perf" / "results"
TOY, BCCD = RESULTS / "2026-11-21_toy_2core_cpu", RESULTS / "2026-11-21_bccd_2core_cpu"
SECTIONS = {"accuracy", "training", "time", "pictures", "settings", "machine"}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """What a page holds: its elements, its text, what it would load, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.ids, self.words, self.loads = [], [], set(), [], []
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
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def figures(self):
        return [values for tag, values in self.elements if tag == "figure" and values.get("role") == "img"]


def page_of(*paths, against=(), ruleset="") -> Page:
    records = [record for path in paths for record in read_runs(Path(path))]
    others = [record for path in against for record in read_runs(Path(path))]
    return Page(html_report.make(records, others, ruleset))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A run of the repository's, to be damaged."""
    return Path(shutil.copytree(TOY, tmp_path / "run"))


@pytest.fixture(scope="module")
def toy_page() -> Page:
    return page_of(TOY)


def test_a_report_says_how_the_run_ended_and_has_every_section(toy_page):
    assert toy_page.ids == SECTIONS
    for words in (
        "ssd300-r34, trained on toy",
        "Target reached",
        "time to target 93.2 s",
        "AP 0.2351, target 0.23",
        "PASS (1.1.0)",
        "AP75 0.0665",
        "87.7 s (92.6 %)",
        "72 settings",
        "torchvision",
    ):
        assert words in toy_page.text, words


def test_a_report_says_what_machine_versions_and_commit_the_run_had(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    machine = {"processors": "2 × A CPU, 64 cores each", "memory": "512 GiB", "software": "Python 3.12.1, numpy 2.4"}
    begun = json.loads(lines[0]) | {"machine": machine, "start": "2026-11-21T18:38:57.877+02:00"}
    (copy / "metrics.jsonl").write_text("\n".join([json.dumps(begun), *lines[1:]]))
    log = copy / "result_0.txt"
    event = {"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": "commit", "value": "ab" * 20}
    log.write_text(f":::MLLOG {json.dumps(event | {'metadata': {'dirty': True}})}\n" + log.read_text())
    text = page_of(copy).text
    for words in (*machine.values(), "start 2026-11-21 16:38:57 UTC", f"commit {'ab' * 20}, with changes"):
        assert words in text, words


def test_a_report_loads_nothing_and_runs_nothing(toy_page):
    assert all(url.startswith(("#", "data:")) for url in toy_page.loads), toy_page.loads
    assert not {tag for tag, _ in toy_page.elements} & {"script", "link", "iframe", "object"}
    style = html_report.make(read_runs(TOY))
    assert not re.search(r"@import|url\((?!#)", style)
    assert not [name for _, values in toy_page.elements for name in values if name.startswith("on")]


def test_what_the_figures_refer_to_within_the_page_is_there_once(toy_page):
    ids = [values["id"] for _, values in toy_page.elements if "id" in values]
    assert len(set(ids)) == len(ids)
    text = html_report.make(read_runs(TOY))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert len(referred) >= 6
    assert referred <= set(ids)


def test_every_figure_is_told_in_words_to_those_who_do_not_see_it(toy_page):
    told = [figure["aria-label"] for figure in toy_page.figures()]
    assert [words.split(".")[0] for words in told] == [
        "AP by epoch", "AP by size", "Loss by step", "Learning rate by step",
        "Throughput, images per second by step", "Time from the first event",
    ]  # fmt: skip
    assert "0.2351 after epoch 1" in told[0]
    assert "from 23.68 at step 9 to 4.586 at step 94" in told[2]
    assert "evaluation 5.2 s" in told[5]


def test_colours_are_those_of_the_page_in_both_modes(toy_page):
    text = html_report.make(read_runs(TOY))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "currentColor" in drawn
    assert "var(--series-0)" in drawn
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
    assert colours <= {"#ffffff"}, colours  # what is transparent
    for light, dark in plots.PALETTE:
        assert contrast(light, "#ffffff") >= 3
        assert contrast(dark, "#14171b") >= 3


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_runs_beside_each_other_show_what_differs_first():
    page = page_of(TOY, BCCD)
    text = page.text
    assert "2 runs: " in text
    differs = text.index("What differs")
    assert differs < text.index("batch_size 4 8", differs) < text.index("settings that are the same")
    rows = [values for tag, values in page.elements if tag == "tr" and values.get("class") == "differs"]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (TOY, BCCD)]
    keys = configs[0].keys() | configs[1].keys()
    assert len(rows) == sum(
        html_report.shown(configs[0].get(key)) != html_report.shown(configs[1].get(key)) for key in keys
    )
    (accuracy,) = (figure["aria-label"] for figure in page.figures() if figure["aria-label"].startswith("AP by epoch"))
    assert "2026-11-21_toy_2core_cpu: 0.2351" in accuracy
    assert "the target is 0.23; the target is 0.55" in accuracy


def test_a_run_is_drawn_against_published_logs_and_the_reference():
    page = page_of(
        shared("logs/nf5488_pytorch/ssd/result_1.txt"),
        against=[shared("logs/dgx1_ngc20.06_pytorch/ssd")],
        ruleset="0.7.0",
    )
    assert "Target reached time to target 10 min 27 s" in page.text
    assert "PASS (0.7.0)" in page.text
    assert "No step is recorded" in page.text
    (accuracy,) = (figure["aria-label"] for figure in page.figures() if figure["aria-label"].startswith("AP by epoch"))
    assert "1xNVIDIA DGX-1 result_4: 0.2323 after epoch 50" in accuracy
    assert "the reference takes 65.1 epochs at batch 2048" in accuracy
    assert len(re.findall(r"1xNVIDIA DGX-1 result_\d Target reached 20 min", page.text)) == 5


def test_the_reference_is_not_drawn_for_other_data(toy_page):
    assert "the reference takes" not in str(toy_page.figures())


def test_an_aborted_run_with_an_empty_metrics_file_and_a_log_cut_off_in_a_line_is_reported(copy):
    (copy / "metrics.jsonl").write_text("")
    log = (copy / "result_0.txt").read_bytes()
    end = log.index(b'"block_stop"')
    (copy / "result_0.txt").write_bytes(log[:end])
    page = page_of(copy)
    assert page.ids == SECTIONS
    assert "No end is recorded" in page.text
    assert "FAIL (1.1.0)" in page.text
    assert "not an MLPerf log line" in page.text
    assert "metrics.jsonl is empty or missing" in page.text
    assert "No evaluation is recorded" in page.text


def test_a_stopped_run_says_by_what(copy):
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"converged": False, "stopped_by": "Diverged"}
    lines[3]["loss"] = float("nan")
    (copy / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"event": "st')
    text = (copy / "result_0.txt").read_text()
    (copy / "result_0.txt").write_text(text.replace('"status": "success"', '"status": "aborted"'))
    page = page_of(copy)
    assert "Aborted" in page.text
    assert "it was stopped before its end: Diverged" in page.text
    assert "the loss is nan at step 29" in page.text
    assert "metrics.jsonl, line 15: no event; it may be cut off" in page.text


def test_figures_that_are_zero_absent_or_no_number_are_drawn(copy):
    text = (copy / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if line["event"] == "evaluation":
            line["metrics"] |= {"AP": 0.0, "APs": -1.0, "APm": float("nan")}
        elif line["event"] == "step":
            line |= {"loss": float("inf"), "lr": "much", "images_per_s": None}
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = page_of(copy)
    assert "AP 0.0000, target 0.23" in page.text
    assert "APs –" in page.text
    assert "No step is recorded" in page.text


def test_a_run_with_masks_is_judged_by_both_figures(copy):
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "targets" in line:
            line["targets"] = {"AP": 0.377, "mask_AP": 0.339}
        if line["event"] == "evaluation":
            line["metrics"]["mask_AP"] = 0.125
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = page_of(copy)
    assert "mask_AP 0.1250, target 0.339" in page.text
    assert [f["aria-label"][:17] for f in page.figures()][:2] == ["AP by epoch. run:", "mask_AP by epoch."]


def test_the_folder_of_a_series_is_its_runs_with_all_that_they_left(tmp_path):
    for number in (10, 9, 0):
        shutil.copytree(TOY, tmp_path / f"experiment_{number}")
        (tmp_path / f"result_{number}.txt").symlink_to(f"experiment_{number}/result_0.txt")
    records = read_runs(tmp_path)
    assert [record.name for record in records] == ["experiment_0", "experiment_9", "experiment_10"]
    assert all(record.of("step") and record.config for record in records)


def test_a_log_alone_with_several_figures_names_them_as_the_event_log_does(copy, tmp_path):
    text = (copy / "result_0.txt").read_text()
    log = tmp_path / "result_3.txt"
    log.write_text(text.replace('"value": 0.23510654349837345', '"value": {"BBOX": 0.38, "SEGM": 0.341}'))
    (record,) = read_runs(log)
    assert record.accuracies == {"AP": [(1, 0.38)], "mask_AP": [(1, 0.341)]}


def test_what_a_log_says_is_text_and_never_markup(copy):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>$x_1$"
    for name in ("metrics.jsonl", "config.json", "result_0.txt", "summary.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"toy"', json.dumps(evil)).replace("torchvision", evil))
    (copy / "classes.json").write_text(json.dumps([{"name": evil, "AP": 0.5, "objects": 3}]))
    (copy / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "pictures" / "a.jpg")
    (copy / "pictures.json").write_text(json.dumps([{"file": "../pictures/a.jpg", "caption": evil}]))
    page = page_of(copy)
    assert "script" not in {tag for tag, _ in page.elements}
    assert [v["alt"] for t, v in page.elements if t == "img"] == [evil]
    assert all(url.startswith(("#", "data:")) for url in page.loads)
    assert evil in page.text


def test_pictures_outside_of_the_run_are_not_embedded(copy):
    (copy / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(copy.parent / "secret.jpg")
    (copy / "pictures.json").write_text(json.dumps([{"file": "../../secret.jpg", "caption": "c"}]))
    assert "img" not in {tag for tag, _ in page_of(copy).elements}


def test_classes_are_listed_by_how_many_objects_they_have(copy):
    rows = [{"name": f"class {n}", "AP": n / 40 if n else None, "objects": n} for n in range(20)]
    (copy / "classes.json").write_text(json.dumps(rows))
    text = page_of(copy).text
    assert "class 19 19 0.475 class 18 18 0.450" in text
    assert text.index("class 5") < text.index("5 more classes") < text.index("class 4 4")
    assert "class 0 0 –" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [Path(shutil.copytree(TOY, tmp_path / parent / "run")) for parent in ("a", "b")]
    names = [r.name for r in told_apart(record for folder in (*folders, folders[1]) for record in read_runs(folder))]
    assert names == ["a/run", "b/run (1)", "b/run (2)"]


def test_the_command_writes_the_report_beside_the_run_and_the_figures_as_pictures(copy, tmp_path, capsys):
    assert html_report.main([str(copy), "--png", str(tmp_path / "png")]) == 0
    assert capsys.readouterr().out == f"report: {copy}/report.html\n"
    assert Page((copy / "report.html").read_text()).ids == SECTIONS
    assert {path.stem for path in (tmp_path / "png").iterdir()} == {
        "AP", "AP_by_size", "loss", "learning_rate", "throughput", "time_line",
    }  # fmt: skip
    with Image.open(tmp_path / "png" / "loss.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 20


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path, capsys):
    (tmp_path / "result_0.txt").write_text("no line of a log\n")
    for path, words in (
        (tmp_path / "absent", "is not there"),
        (tmp_path / "result_0.txt", "holds no line of an MLPerf log"),
        (ROOT / "tests", "holds neither metrics.jsonl nor result_*.txt"),
    ):
        assert html_report.main([str(path), "--out", str(tmp_path / "out.html")]) == 2
        assert words in capsys.readouterr().err
    assert html_report.main([str(TOY), "--out", str(tmp_path / "result_0.txt" / "out.html")]) == 2
    assert "name files that can be read and written" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def commands() -> list[str]:
    """Those of the document about the report."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "REPORT.md").read_text(), flags=re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_document_runs(command, tmp_path):
    (tmp_path / "perf").symlink_to(ROOT / "perf")
    command = command.replace(".venv/bin/python", sys.executable)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    if "--out" in command:
        out = command.split("--out ")[1].split()[0]
        assert done.stdout == f"report: {out}\n"
        assert Page((tmp_path / out).read_text()).ids == SECTIONS
    if "--png" in command:
        assert len(list((tmp_path / "figures").glob("*.png"))) == 6


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_browser_shows_it_without_sideways_scrolling_on_a_phone(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "report.html"
    file.write_text(html_report.make(read_runs(TOY) + read_runs(BCCD)))
    # In a frame of a phone's width: a headless window may not be made as narrow.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe src="report.html" style="width:400px;height:900px;border:0"></iframe>'
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        " const wide = [...page.querySelectorAll('figure svg, img, .card, .scroll, p')]"
        ".filter(e => e.getBoundingClientRect().right > 400).length;"
        " document.title = [page.documentElement.scrollWidth, wide,"
        " page.querySelectorAll('figure svg').length, page.querySelector('figure svg').clientWidth].join(' '); }"
        "</script>"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--window-size=900,1000"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=90)
    found = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout + done.stderr
    width, too_wide, count, drawn = map(int, found.groups())
    assert width <= 400
    assert too_wide == 0
    assert count == 6
    assert drawn > 340
