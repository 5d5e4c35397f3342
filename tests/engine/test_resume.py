"""Runs that break off and go on: nothing is lost before the last checkpoint, and nothing is trained twice."""

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
def whole(tmp_path_factory):
    """A run of 15 steps and 3 evaluations that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, err = processes.run(folder, *EACH_STEP)
    assert status == 3, err
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """One of 72 steps: enough that one which is killed ten times is not done before."""
    folder = tmp_path_factory.mktemp("long") / "run"
    status, _, err = processes.run(folder, *EACH_STEP, *LONG)
    assert status == 3, err
    return folder


def events(folder):
    return [(event.key, event.metadata.get("epoch_num")) for event in read(folder / "result_0.txt")]


def without_resumed(folder):
    return [event for event in events(folder) if event[0] != "resumed"]


def test_a_run_killed_at_ten_random_moments_ends_with_the_weights_of_one_that_was_not(long, tmp_path):
    run = tmp_path / "run"
    moment = random.Random(11)
    kills, newest = 0, 0
    for _ in range(10):
        process = processes.start(run, *EACH_STEP, *LONG, "--step-s", "0.05", "--resume", "auto")
        # Some time after it has got further than the one before it, so that the whole is done at last.
        wait_for_progress(run, newest, process)
        time.sleep(moment.uniform(0, 0.12))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        newest = newest_step(run)
    status, out, err = processes.run(run, *EACH_STEP, *LONG, "--resume", "auto")
    assert status in (2, 3), err
    assert kills == 10
    assert processes.equal(processes.weights(run), processes.weights(long))
    assert without_resumed(run) == events(long), "no event is lost or doubled"
    assert processes.steps(run) == processes.steps(long)
    assert "resuming from" in out
    verdict = check.check(run / "result_0.txt", "1.1.0")
    assert not verdict.passed
    assert verdict.messages[0] == "the run was resumed: it is no MLPerf result"


def newest_step(run):
    saved = run_dir.checkpoints(run)
    return saved[-1].step if saved else 0


def wait_for_progress(run, newest, process):
    end = time.monotonic() + 40
    while newest_step(run) <= newest and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("bind", ["off", "exclusive"])
def test_a_signal_to_every_process_of_a_job_saves_too(tmp_path, bind):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1", "--num-workers", "2", "--numa-binding", bind)
    process = processes.start(run, *flags, "--step-s", "0.5")
    processes.wait_for(run / "metrics.jsonl", '"step": 1')
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, data workers included
    status, _, err = processes.finish(process)
    assert status == 143, err
    assert "stopped by SIGTERM after step" in err
    assert run_dir.checkpoints(run)
    assert not processes.alive(process.pid)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_terminated_run_saves_first_and_goes_on_to_the_same_weights(whole, tmp_path, ranks):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1")
    if ranks:
        processes.run(tmp_path / "two", *flags, ranks=ranks)
        whole = tmp_path / "two"
    process = processes.start(run, *flags, "--step-s", "0.4", ranks=ranks)
    processes.wait_for(run / "metrics.jsonl", '"step": 1')
    process.terminate()
    status, _, err = processes.finish(process)
    assert status == 143
    assert "stopped by SIGTERM after step" in err
    assert "Traceback" not in err
    saved = run_dir.checkpoints(run)[-1]
    assert 2 <= saved.step < 9
    assert not saved.evaluated, "it was in the middle of an epoch"
    assert events(run)[-1][0] == "run_stop"
    status, _, err = processes.run(run, *flags, "--resume", "auto", ranks=ranks)
    assert status == 3, err
    assert processes.equal(processes.weights(run), processes.weights(whole))
    assert without_resumed(run) == events(whole)


def test_a_run_broken_off_in_its_evaluation_does_that_again(whole, tmp_path):
    run = tmp_path / "run"
    flags = ("--batch-size", "5", "--log-every", "1")
    process = processes.start(run, *flags, "--step-s", "0.3")
    processes.wait_for(run / "result_0.txt", "eval_start")
    process.terminate()
    assert processes.finish(process)[0] == 143
    assert [(s.epoch, s.step, s.evaluated) for s in run_dir.checkpoints(run)] == [(1, 5, False)]
    assert processes.run(run, *flags, "--resume", "auto")[0] == 3
    assert processes.equal(processes.weights(run), processes.weights(whole))
    assert without_resumed(run) == events(whole)


def test_max_steps_ends_a_trial_that_can_be_gone_on_with(whole, tmp_path):
    run = tmp_path / "run"
    for stop, step in (("3", 3), ("7", 7)):
        status, _, err = processes.run(run, "--batch-size", "5", "--max-steps", stop, "--resume", "auto")
        assert status == 3
        assert f"stopped by max_steps: {step} steps are made" in err
        assert run_dir.checkpoints(run)[-1].step == step
    assert processes.run(run, "--batch-size", "5", "--resume", "auto")[0] == 3
    assert processes.equal(processes.weights(run), processes.weights(whole))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(whole, tmp_path):
    run = tmp_path / "run"
    processes.run(run, *EACH_STEP, "--max-steps", "4")
    older, newer = (saved.path for saved in run_dir.checkpoints(run))
    content = newer.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    for broken in (content[:-100], content[:500], b"", bytes(damaged), b"PK nonsense"):
        newer.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{newer.name}: "):
            checkpointer.load(newer, benchmark="stand_in")
    status, out, _ = processes.run(run, *EACH_STEP, "--resume", "auto")
    assert status == 3
    assert f"warning: {newer}: not a whole checkpoint (" in out
    assert "An older one is tried." in out
    assert f"resuming from {older}" in out
    assert processes.equal(processes.weights(run), processes.weights(whole))


def test_what_is_no_checkpoint_of_this_benchmark_is_refused(whole, tmp_path):
    path = run_dir.checkpoints(whole)[-1].path
    with pytest.raises(ValueError, match="is a checkpoint of stand_in, not of ssd"):
        checkpointer.load(path, benchmark="ssd")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    status, _, err = processes.run(tmp_path / "run", "--resume", str(tmp_path / "foreign.pt"))
    assert status == 2
    assert f"error: {tmp_path}/foreign.pt: this is no checkpoint of this program" in err
    status, _, err = processes.run(tmp_path / "run", "--resume", str(tmp_path / "nothing.pt"))
    assert status == 2
    assert "nothing.pt: no such file" in err


def test_a_checkpoint_of_another_run_starts_a_log_of_its_own(whole, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    processes.run(other, "--batch-size", "5", "--max-steps", "7")
    (saved,) = (s for s in run_dir.checkpoints(other) if s.step == 7)
    before = (other / "result_0.txt").read_bytes()
    status, _, err = processes.run(run, *EACH_STEP, "--resume", str(saved.path))
    assert status == 3, err
    assert events(run)[0][0] == "submission_benchmark"
    assert ("resumed", 2) in events(run)
    assert [event for event in events(run) if event[0] == "epoch_start"] == [("epoch_start", 2), ("epoch_start", 3)]
    assert processes.equal(processes.weights(run), processes.weights(whole))
    assert (other / "result_0.txt").read_bytes() == before


def test_a_finished_run_has_nothing_to_resume_and_a_new_run_leaves_an_old_log_alone(whole):
    status, _, err = processes.run(whole, "--resume", "auto")
    assert status == 2
    assert "is finished: there is nothing to resume" in err
    before = (whole / "result_0.txt").read_bytes()
    assert processes.run(whole)[0] == 2
    assert (whole / "result_0.txt").read_bytes() == before


def test_a_run_that_left_no_checkpoint_begins_anew_and_keeps_what_was_logged(whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "result_0.txt").write_text("lost\n")
    status, out, _ = processes.run(run, *EACH_STEP, "--resume", "auto")
    assert status == 3
    assert "nothing to resume" in out
    assert (run / "result_0.txt.cut").read_text() == "lost\n"
    assert events(run) == events(whole)


def test_more_ranks_go_on_by_samples(whole, tmp_path):
    run = tmp_path / "run"
    flags = ("--batch-size", "4", "--bn-group", "0", "--log-every", "1")
    assert processes.run(run, *flags, "--max-steps", "3")[0] == 3  # 12 of the 24 images of the first epoch
    status, _, err = processes.run(run, *flags, "--resume", "auto", ranks=2)
    assert status == 3, err
    # 12 more images in 2 steps of 8 and 4, after what counts as 2 (1.5) steps of 8; then 3 each epoch.
    assert processes.steps(run) == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]


def test_settings_that_changed_are_told(tmp_path):
    run = tmp_path / "run"
    processes.run(run, "--max-steps", "2", "--batch-size", "5")
    _, out, _ = processes.run(run, "--batch-size", "5", "--weight-decay", "0.5", "--resume", "auto")
    assert "warning: weight_decay is 0.5, and was 0.001 when that was saved" in out
    assert out.count("warning:") == 1


def test_a_seed_that_contradicts_the_checkpoint_is_refused(tmp_path):
    run = tmp_path / "run"
    processes.run(run, "--max-steps", "2")
    process = processes.start(run, "--resume", "auto", "--seed", "6")
    status, _, err = processes.finish(process)
    assert status == 2
    assert "was trained with seed 5" in err


def test_random_states_are_put_back():
    device = torch.device("cpu")
    states = checkpointer.random_states(device)

    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002

    first = draw()
    assert draw() != first
    checkpointer.set_random_states(states, device)
    assert draw() == first
