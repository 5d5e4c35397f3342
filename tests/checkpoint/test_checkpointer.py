import errno

import pytest
import torch

from detection.checkpoint import checkpointer


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def save(folder, epoch, score, **state):
    return checkpointer.save(folder, epoch=epoch, step=10 * epoch, score=score, state=state)


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for epoch, score in ((1, 0.1), (2, 0.3), (3, 0.2), (4, None), (5, 0.25)):
        save(tmp_path, epoch, score)
    assert names(tmp_path) == [
        "epoch_0002_step_0000020_ap_0.3000.pt",
        "epoch_0004_step_0000040.pt",
        "epoch_0005_step_0000050_ap_0.2500.pt",
    ]


def test_a_checkpoint_is_loaded_without_running_code(tmp_path):
    path = save(tmp_path, 1, 0.0, benchmark="ssd", model={"weight": torch.arange(3.0)}, config="{}")
    state = checkpointer.load(path, benchmark="ssd")
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))
    torch.save({"format": checkpointer.FORMAT, "benchmark": "ssd", "model": print}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpointer.load(path, benchmark="ssd")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_save_that_fails_leaves_the_older_ones_and_no_file_of_its_own(tmp_path, monkeypatch, error):
    save(tmp_path, 1, 0.1)

    def full(*_):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space|write failed"):
        save(tmp_path, 2, 0.2)
    assert names(tmp_path) == ["epoch_0001_step_0000010_ap_0.1000.pt"]


def test_figures_that_pycocotools_leaves_undefined_still_make_a_name(tmp_path):
    assert save(tmp_path, 7, -1.0).name == "epoch_0007_step_0000070_ap_0.0000.pt"
