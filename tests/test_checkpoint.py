import pytest
import torch

from detection import checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_and_the_best_are_kept(tmp_path):
    for epoch, ap in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.25)):
        checkpoint.save(tmp_path, epoch, ap, {"epoch": epoch})
    assert names(tmp_path) == ["epoch_0002_ap_0.3000.pt", "epoch_0004_ap_0.2500.pt"]


def test_a_checkpoint_is_loaded_without_running_code(tmp_path):
    path = checkpoint.save(tmp_path, 1, 0.0, {"model": {"weight": torch.arange(3.0)}, "config": "{}"})
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], torch.arange(3.0))


def test_a_save_that_fails_leaves_the_older_ones_and_no_file_of_its_name(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, 0.1, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, 0.2, {})
    assert "epoch_0001_ap_0.1000.pt" in names(tmp_path)
    assert not any(name.startswith("epoch_0002") and name.endswith(".pt") for name in names(tmp_path))


def test_figures_that_pycocotools_leaves_undefined_still_make_a_name(tmp_path):
    assert checkpoint.save(tmp_path, 7, -1.0, {}).name == "epoch_0007_ap_0.0000.pt"
