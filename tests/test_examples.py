"""The example notebooks run, and their stored outputs are what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def outputs(notebook: Any) -> list[str]:
    """Texts and tables of all cells."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown.append(output.get("text") or data.get("text/html") or data["text/plain"])
    return shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_gives_its_stored_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=200, kernel_name="python3").execute()
    # Rounded figures and words; the last digits of a float may differ between machines.
    assert len(outputs(fresh)) == len(outputs(stored))
    assert outputs(fresh)[:4] == outputs(stored)[:4]
    assert "captions are shifted by +1" in "".join(outputs(stored))
