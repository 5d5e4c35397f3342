"""The notebook of the tutorial runs from its first cell to its last."""

import nbformat
import pytest
from nbclient import NotebookClient

from paths import ROOT
from script_clone import FLAGS, make_clone

ASSIGNMENT = 'FLAGS = ""'


@pytest.mark.slow
def test_every_cell_runs(tmp_path, four_image_coco, monkeypatch):
    clone = make_clone(tmp_path)
    (clone / "data").mkdir()
    (clone / "data/toy").symlink_to(four_image_coco)
    monkeypatch.setenv("PYTHONPATH", str(clone))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("VENV", "RUN_DIR", "LOGDIR", "DATADIR", "DGXSYSTEM"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(ROOT / "examples/tutorial.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if ASSIGNMENT in cell.source)
    settings.source = settings.source.replace(ASSIGNMENT, f'FLAGS = "--backbone resnet18 {FLAGS}"')
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": clone}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    assert printed.count("RESULT,SINGLE_STAGE_DETECTOR") == 2
    assert "initialized" in printed, "the outputs of the new classes"
    assert "JITTER_RANGES" in printed
    assert "error" not in printed.lower()
