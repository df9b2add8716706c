"""The quickstart notebook runs from its first cell to its last, and what is committed of it is what a run gives."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    return [output.output_type for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_notebook_is_committed_with_the_outputs_of_one_whole_run() -> None:
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "error" not in outputs(read())
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3


def test_the_notebook_points_to_documents_that_are_there() -> None:
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for link in links:
        assert (DOCS / link).exists(), link


@pytest.mark.slow
def test_the_notebook_runs_on_this_machine(tmp_path: Path) -> None:
    notebook = read()
    before = outputs(notebook)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert outputs(notebook) == before
    (table,) = (cell for cell in notebook.cells if "summary.tsv" in cell.source)
    text = table.outputs[0].data["text/plain"]
    assert all(name in text for name in ("pretrained", "untrained", "intensity", "baseline"))
