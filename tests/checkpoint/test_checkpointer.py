import errno

import pytest
import torch

from detection.checkpoint import checkpointer


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def save(folder, epoch, score, **state):
    return checkpointer.save(folder, epoch=epoch, step=10 * epoch, score=score, state=state)


def test_last_two_and_best_checkpoints_are_kept(tmp_path):
    for epoch, score in ((1, 0.1), (2, 0.3), (3, 0.2), (4, None), (5, 0.25)):
        save(tmp_path, epoch, score)
    assert names(tmp_path) == [
        "epoch_0002_step_0000020_ap_0.3000.pt",
        "epoch_0004_step_0000040.pt",
        "epoch_0005_step_0000050_ap_0.2500.pt",
    ]


def test_checkpoint_loads_without_executing_code(tmp_path):
    path = save(tmp_path, 1, 0.0, benchmark="ssd", model={"weight": torch.arange(3.0)}, config="{}")
    state = checkpointer.load(path, benchmark="ssd")
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))
    torch.save({"format": checkpointer.FORMAT, "benchmark": "ssd", "model": print}, path)
    with pytest.raises(ValueError, match="not a valid checkpoint"):
        checkpointer.load(path, benchmark="ssd")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_failed_save_keeps_older_checkpoints_and_leaves_no_partial_file(tmp_path, monkeypatch, error):
    save(tmp_path, 1, 0.1)

    def full(*_):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space|write failed"):
        save(tmp_path, 2, 0.2)
    assert names(tmp_path) == ["epoch_0001_step_0000010_ap_0.1000.pt"]


def test_undefined_metric_gives_a_valid_file_name(tmp_path):
    assert save(tmp_path, 7, -1.0).name == "epoch_0007_step_0000070_ap_0.0000.pt"
