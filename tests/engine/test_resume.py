"""Interrupted and resumed runs lose nothing before the last checkpoint and repeat nothing."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch

import processes
from detection import run_dir
from detection.checkpoint import checkpointer
from mlperf import check
from mlperf.log import read

EACH_STEP = ("--checkpoint-every", "1 steps", "--batch-size", "5", "--log-every", "1")
LONG = ("--num-images", "120")


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    """Folder of an uninterrupted run of 15 steps and 3 evaluations."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, _, err = processes.run(folder, *EACH_STEP)
    assert status == 3, err
    return folder


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Folder of an uninterrupted run of 72 steps: enough for ten kills."""
    folder = tmp_path_factory.mktemp("long") / "run"
    status, _, err = processes.run(folder, *EACH_STEP, *LONG)
    assert status == 3, err
    return folder


def events(folder):
    return [(event.key, event.metadata.get("epoch_num")) for event in read(folder / "result_0.txt")]


def without_resumed(folder):
    return [event for event in events(folder) if event[0] != "resumed"]


def test_run_killed_ten_times_ends_with_bit_identical_weights(long_run, tmp_path):
    run = tmp_path / "run"
    rng = random.Random(11)
    kills, latest = 0, 0
    for _ in range(10):
        process = processes.start(run, *EACH_STEP, *LONG, "--step-s", "0.05", "--resume", "auto")
        # Kill it only after it has advanced, so that the run finishes in the end.
        wait_for_progress(run, latest, process)
        time.sleep(rng.uniform(0, 0.12))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        latest = latest_step(run)
    status, out, err = processes.run(run, *EACH_STEP, *LONG, "--resume", "auto")
    assert status in (2, 3), err
    assert kills == 10
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(long_run))
    assert without_resumed(run) == events(long_run), "no event is lost or repeated"
    assert processes.steps(run) == processes.steps(long_run)
    assert "resuming from" in out
    verdict = check.check(run / "result_0.txt", "1.1.0")
    assert not verdict.passed
    assert verdict.messages[0] == "the run was resumed: it is not an MLPerf result"


def latest_step(run):
    saved = run_dir.list_checkpoints(run)
    return saved[-1].step if saved else 0


def wait_for_progress(run, latest, process):
    end = time.monotonic() + 40
    while latest_step(run) <= latest and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("bind", ["off", "exclusive"])
def test_signal_to_every_process_saves_a_checkpoint(tmp_path, bind):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1", "--num-workers", "2", "--numa-binding", bind)
    process = processes.start(run, *flags, "--step-s", "0.5")
    processes.wait_for(run / "metrics.jsonl", '"step": 1')
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, including data workers
    status, _, err = processes.finish(process)
    assert status == 143, err
    assert "stopped by SIGTERM after step" in err
    assert run_dir.list_checkpoints(run)
    assert not processes.alive(process.pid)


@pytest.mark.parametrize("ranks", [0, 2])
def test_terminated_run_saves_and_resumes_to_the_same_weights(uninterrupted_run, tmp_path, ranks):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1")
    if ranks:
        processes.run(tmp_path / "two", *flags, ranks=ranks)
        uninterrupted_run = tmp_path / "two"
    process = processes.start(run, *flags, "--step-s", "0.4", ranks=ranks)
    processes.wait_for(run / "metrics.jsonl", '"step": 1')
    process.terminate()
    status, _, err = processes.finish(process)
    assert status == 143
    assert "stopped by SIGTERM after step" in err
    assert "Traceback" not in err
    saved = run_dir.list_checkpoints(run)[-1]
    assert 2 <= saved.step < 9
    assert not saved.has_score, "saved within an epoch"
    assert events(run)[-1][0] == "run_stop"
    status, _, err = processes.run(run, *flags, "--resume", "auto", ranks=ranks)
    assert status == 3, err
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))
    assert without_resumed(run) == events(uninterrupted_run)


def test_run_interrupted_in_evaluation_repeats_it(uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1")
    process = processes.start(run, *flags, "--step-s", "0.3")
    processes.wait_for(run / "result_0.txt", "eval_start")
    process.terminate()
    assert processes.finish(process)[0] == 143
    assert [(s.epoch, s.step, s.has_score) for s in run_dir.list_checkpoints(run)] == [(1, 5, False)]
    assert processes.run(run, *flags, "--resume", "auto")[0] == 3
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))
    assert without_resumed(run) == events(uninterrupted_run)


def test_run_stopped_by_max_steps_can_be_resumed(uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    for stop, step in (("3", 3), ("7", 7)):
        status, out, err = processes.run(run, "--batch-size", "5", "--max-steps", stop, "--resume", "auto")
        assert status == 0, err
        assert f"stopped by --max-steps as requested: {step} steps completed" in out
        assert read(run / "result_0.txt")[-1].metadata["status"] == "aborted"
        assert run_dir.list_checkpoints(run)[-1].step == step
    assert processes.run(run, "--batch-size", "5", "--resume", "auto")[0] == 3
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))


def test_damaged_checkpoint_is_named_and_the_previous_one_used(uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    processes.run(run, *EACH_STEP, "--max-steps", "4")
    older, newer = (saved.path for saved in run_dir.list_checkpoints(run))
    content = newer.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    for broken in (content[:-100], content[:500], b"", bytes(damaged), b"PK nonsense"):
        newer.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{newer.name}: "):
            checkpointer.load(newer, benchmark="dummy")
    status, out, _ = processes.run(run, *EACH_STEP, "--resume", "auto")
    assert status == 3
    assert f"warning: {newer}: not a valid checkpoint (" in out
    assert "Trying an older one." in out
    assert f"resuming from {older}" in out
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))


def test_foreign_checkpoints_are_rejected(uninterrupted_run, tmp_path):
    path = run_dir.list_checkpoints(uninterrupted_run)[-1].path
    with pytest.raises(ValueError, match="checkpoint of dummy, not of ssd"):
        checkpointer.load(path, benchmark="ssd")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    status, _, err = processes.run(tmp_path / "run", "--resume", str(tmp_path / "foreign.pt"))
    assert status == 2
    assert f"error: {tmp_path}/foreign.pt: not a checkpoint of this program" in err
    status, _, err = processes.run(tmp_path / "run", "--resume", str(tmp_path / "nothing.pt"))
    assert status == 2
    assert "nothing.pt: no such file" in err


def test_checkpoint_of_another_run_starts_a_new_log(uninterrupted_run, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    processes.run(other, "--batch-size", "5", "--max-steps", "7")
    (saved,) = (s for s in run_dir.list_checkpoints(other) if s.step == 7)
    before = (other / "result_0.txt").read_bytes()
    status, _, err = processes.run(run, *EACH_STEP, "--resume", str(saved.path))
    assert status == 3, err
    assert events(run)[0][0] == "submission_benchmark"
    assert ("resumed", 2) in events(run)
    assert [event for event in events(run) if event[0] == "epoch_start"] == [("epoch_start", 2), ("epoch_start", 3)]
    assert processes.bit_identical(processes.load_tensors(run), processes.load_tensors(uninterrupted_run))
    assert (other / "result_0.txt").read_bytes() == before


def test_finished_run_cannot_be_resumed_or_overwritten(uninterrupted_run):
    status, _, err = processes.run(uninterrupted_run, "--resume", "auto")
    assert status == 2
    assert "finished, nothing to resume" in err
    before = (uninterrupted_run / "result_0.txt").read_bytes()
    assert processes.run(uninterrupted_run)[0] == 2
    assert (uninterrupted_run / "result_0.txt").read_bytes() == before


def test_run_without_checkpoint_starts_over_and_keeps_its_old_log(uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "result_0.txt").write_text("lost\n")
    status, out, _ = processes.run(run, *EACH_STEP, "--resume", "auto")
    assert status == 3
    assert "nothing to resume" in out
    assert (run / "result_0.txt.cut").read_text() == "lost\n"
    assert events(run) == events(uninterrupted_run)


def test_more_ranks_resume_at_the_same_image(uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    flags = ("--batch-size", "4", "--bn-group", "0", "--log-every", "1")
    assert processes.run(run, *flags, "--max-steps", "3")[0] == 0  # 12 of the 24 images of the first epoch
    status, _, err = processes.run(run, *flags, "--resume", "auto", ranks=2)
    assert status == 3, err
    # 12 more images in 2 steps of 8 and 4, after the equivalent of 2 (1.5) steps of 8. Then 3 per epoch.
    assert processes.steps(run) == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]


def test_changed_settings_are_reported(tmp_path):
    run = tmp_path / "run"
    processes.run(run, "--max-steps", "2", "--batch-size", "5")
    _, out, _ = processes.run(run, "--batch-size", "5", "--weight-decay", "0.5", "--resume", "auto")
    assert "warning: weight_decay is 0.5, but was 0.001 when the checkpoint was saved" in out
    assert out.count("warning:") == 1


def test_seed_different_from_the_checkpoint_is_rejected(tmp_path):
    run = tmp_path / "run"
    processes.run(run, "--max-steps", "2")
    process = processes.start(run, "--resume", "auto", "--seed", "6")
    status, _, err = processes.finish(process)
    assert status == 2
    assert "was trained with seed 5" in err


def test_rng_states_are_restored():
    device = torch.device("cpu")
    states = checkpointer.rng_states(device)

    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002

    first = draw()
    assert draw() != first
    checkpointer.set_rng_states(states, device)
    assert draw() == first
