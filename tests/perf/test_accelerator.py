"""Sessions on a new accelerator: their record, their deadlines, and the settings of their commands."""

import json
import time

import pytest

from perf.accelerator.__main__ import main
from perf.accelerator.session import Measurement, MeasurementError, Session, Stage
from perf.accelerator.stages import MASK_RCNN, SSD, STAGES, time_steps
from perf.accelerator.step_profile import summarize_kernels
from perf.systems import COMMANDS, exported_settings

SUMMARY = {
    "precision": "bf16",
    "init_s": 1.0,
    "peak_memory_gib": 2.0,
    "results": [
        {"input": "real", "images_per_s": {"median": 90.0}, "time_fraction": {"data": 0.1}},
        {"input": "synthetic", "images_per_s": {"median": 100.0}, "time_fraction": {"data": 0.0}},
    ],
}


@pytest.fixture
def session(tmp_path):
    session = Session(tmp_path, "cpu", rehearse=False, minutes=1)
    session.deadline_s = time.monotonic() + 60
    return session


def recorded(session):
    """Return the results on disk."""
    return json.loads(session.summary_file.read_text())["stages"]["first"]["results"]


def test_record_on_disk_is_complete_after_each_measurement_and_failures_do_not_end_it(session):
    def fail(_):
        assert recorded(session)["good"]["status"] == "ok"  # as after SIGKILL
        raise ZeroDivisionError("of zero")

    def reject(session):
        session.python("reject", "-c", "import sys; sys.exit('error: no such device' and 2)")

    measurements = [
        Measurement("good", lambda _: {"img_per_s": 3.5, "status": "of a run"}),
        Measurement("bad", fail),
        Measurement("rejected", reject),
        Measurement("last", lambda _: {}),
    ]
    session.run_stage(Stage("first", "a stage", 10, measurements), 60)
    results = recorded(session)
    assert [result["status"] for result in results.values()] == ["ok", "failed", "rejected", "ok"]
    assert results["good"]["img_per_s"] == 3.5
    assert results["bad"]["reason"] == "ZeroDivisionError: of zero"
    assert not session.all_succeeded


def test_command_is_stopped_at_its_deadline(session):
    session.deadline_s = time.monotonic() + 0.5
    start_s = time.monotonic()
    with pytest.raises(MeasurementError, match="stopped") as error:
        session.python("slow", "-c", "import time; time.sleep(600)")
    assert error.value.status == "out of time"
    assert time.monotonic() - start_s < 60


def test_measurement_that_takes_all_of_its_time_leaves_some_for_the_next(session):
    limits_s = []
    measurements = [Measurement(str(i), lambda s: limits_s.append(s.remaining_s) or {}) for i in range(3)]
    session.run_stage(Stage("first", "a stage", 10, measurements), 600)
    assert limits_s == pytest.approx([300, 400, 600], abs=20)


def test_stage_without_time_is_recorded(session):
    session.run_stage(Stage("first", "a stage", 10, [Measurement("late", lambda _: {})]), 0)
    assert recorded(session)["late"]["status"] == "out of time"


def test_unexpected_exit_status_reports_the_error_of_the_command(session):
    script = "print('RuntimeError: kernel failed'); raise SystemExit(1)"
    with pytest.raises(MeasurementError, match="exit status 1: RuntimeError: kernel failed"):
        session.python("failing", "-c", script)
    assert session.python("expected", "-c", script, statuses=(0, 1)).startswith("RuntimeError")


@pytest.mark.parametrize(
    ("mode", "expected"), [("bench-train", ["912/4", "912/8", "912/16"]), ("bench-infer", ["256", "128", "64"])]
)
def test_micro_batch_is_halved_until_it_fits_the_memory(session, monkeypatch, mode, expected):
    tried = []

    def python(name, *words, **_):
        if name == "photos":
            return
        flags = dict(zip(words[3::2], words[4::2], strict=True))
        train = f"{flags['--batch-size']}/{flags['--grad-accum-steps']}"
        tried.append(train if mode == "bench-train" else flags["--eval-batch-size"])
        (session.out / "logs" / f"{name}.txt").write_text("CUDA out of memory" if len(tried) < 3 else "")
        if len(tried) < 3:
            raise MeasurementError("failed", "exit status 1")
        (session.out / f"{name}.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(session, "python", python)
    result = time_steps(session, name="step", system=SSD, mode=mode)
    assert tried == expected
    assert result["micro_batch"] == (57 if mode == "bench-train" else 64)
    assert (result["real_img_per_s"], result["synthetic_img_per_s"]) == (90, 100)


def test_photos_are_generated_if_their_stage_did_not_run(session, monkeypatch):
    names = []

    def python(name, *words, **_):
        names.append(name)
        if name != "photos":
            (session.out / f"{name}.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(session, "python", python)
    time_steps(session, name="first", system=SSD)
    session.summary["stages"]["ssd"] = {"results": {"photos": {"status": "ok"}}}
    time_steps(session, name="second", system=SSD)
    assert names == ["photos", "first", "second"]


def test_other_failure_than_memory_is_not_repeated(session, monkeypatch):
    def python(name, *words, **_):
        (session.out / "logs" / f"{name}.txt").write_text("error: illegal instruction")
        raise MeasurementError("failed", "exit status 1")

    monkeypatch.setattr(session, "python", python)
    with pytest.raises(MeasurementError):
        time_steps(session, name="step", system=MASK_RCNN)


@pytest.mark.parametrize("rehearse", [False, True])
def test_settings_of_every_training_command_are_valid(tmp_path, monkeypatch, rehearse):
    commands = []

    def python(session, name, *words, statuses=(0,), environ=None):
        commands.append((words, environ))
        raise MeasurementError("failed", "not run")

    monkeypatch.setattr(Session, "python", python)
    monkeypatch.setattr("perf.accelerator.stages.read_log", lambda *_: "")
    assert main(["1", "--out", str(tmp_path), "--device", "cpu", *(["--rehearse"] if rehearse else [])]) == 1
    trainings = [(words, environ) for words, environ in commands if words[1] in COMMANDS and words[2] == "train"]
    assert len(trainings) >= 12
    for words, environ in trainings:
        config = COMMANDS[words[1]].PREFLIGHT.load(list(words[3:]), environ).config
        assert config.mode.startswith("bench") or config.dataset == "toy"
        assert not config.backbone_weights
    statuses = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert list(statuses) == [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    ("argv", "message"), [(["0"], "MINUTES 0"), (["--only", "profile", "nonsense"], "--only nonsense")]
)
def test_invalid_flags_are_rejected(argv, message, capsys, tmp_path):
    assert main([*argv, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_kernels_are_summarized_with_the_gaps_between_them():
    def event(name, category, start, duration):
        return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration}

    events = [
        event("cudaLaunchKernel", "cuda_runtime", 0, 5),
        event("cudaLaunchKernelExC", "cuda_runtime", 6, 5),
        event("conv", "kernel", 1000, 3000),
        event("overlapping", "kernel", 2000, 3000),
        event("relu", "kernel", 9000, 1000),
        event("aten::conv2d", "cpu_op", 0, 100_000),
        {"ph": "i", "name": "marker"},
    ]
    assert summarize_kernels(events) == {
        "launches": 2,
        "kernels": 3,
        "busy_ms": 5.0,
        "idle_ms": 4.0,
        "longest_gap_ms": 4.0,
    }
    assert summarize_kernels(events[5:])["busy_ms"] == 100
    assert summarize_kernels([])["kernels"] == 0


def test_settings_of_a_system_are_those_of_its_workload():
    assert exported_settings(MASK_RCNN)["MASKRCNN_BATCH_SIZE"] == "64"
    assert all(name.startswith("SSD_") for name in exported_settings(SSD))
