"""The notebook, run from top to bottom by a Jupyter kernel."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs the extra `test-extra`")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs the extra `test-extra`")
pytest.importorskip("ipykernel", reason="the notebook needs the extra `test-extra`")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "own_videos.ipynb"


def test_the_stored_notebook_holds_no_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    run = tmp_path / "runs" / "own-videos"
    for name in ("model/model.safetensors", "curves.png", "tokens.mp4"):
        assert (run / name).stat().st_size > 0
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= shown  # the curves and the moving picture
    texts = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert any("val_top1" in text for text in texts)
    assert sum(text.startswith("[('") for text in texts) == 2  # labels with their scores
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert "finetune: 100%" in printed
    assert "\x1b" not in printed  # a bar within another would move the cursor, which a notebook shows as letters
