"""The notebook runs from its first cell to its last, and what it keeps is for any reader."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FILE = Path(__file__).parent.parent / "experiments" / "first_hour.ipynb"


@pytest.fixture
def book():
    return nbformat.read(FILE, as_version=4)


@pytest.mark.slow
def test_it_runs(book, tmp_path, monkeypatch):
    """With fewer seeds and steps."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for cell in book.cells:
        cell.source = re.sub("steps=[0-9]+", "steps=20", cell.source.replace("--seeds=0-4", "--seeds=0,1"))
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = nbformat.writes(book)
    assert all(word in text for word in ("frozen leaves keep their bytes", "undecided", "image/png", "mine.npz"))
    [folder] = tmp_path.iterdir()
    assert (folder / "runs" / "mine" / "report.html").is_file()


def test_its_cells_were_run_in_order_and_it_stays_small(book):
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert FILE.stat().st_size < 200_000


def test_what_it_keeps_names_no_place_of_a_machine_and_no_error(book):
    outputs = [out for cell in book.cells for out in cell.get("outputs", ())]
    assert {(out.output_type, out.get("name")) for out in outputs} == {("stream", "stdout"), ("display_data", None)}
    for out in outputs:
        text = out.get("text") or "".join(out.data.get(kind, "") for kind in ("text/html", "text/plain"))
        assert not re.search(r"Traceback|Warning|(?<![\w<.])/\w+/|[A-Z]:\\|~/", text), text
