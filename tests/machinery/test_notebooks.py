"""The notebooks run from top to bottom, and what is stored in them is what they show."""

from __future__ import annotations

import json
import shutil

import pytest
from documents import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))


def kinds(path):
    """What each code cell shows: the kinds of its outputs, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        [kind for output in cell["outputs"] for kind in (output["output_type"], *sorted(output.get("data", {})))]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, tmp_path):
    pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[docs]'")
    import notebooks

    stored = ROOT / "docs" / "notebooks" / name
    copy = tmp_path / name
    shutil.copy(stored, copy)
    notebooks.execute(copy)
    assert kinds(copy) == kinds(stored), "python docs/site/notebooks.py stores the outputs anew"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored_is_small_and_no_error(name):
    path = ROOT / "docs" / "notebooks" / name
    shown = kinds(path)
    assert path.stat().st_size < 250_000
    assert any(shown) and not any("error" in kind for kind in shown)
    assert str(ROOT) not in path.read_text(encoding="utf-8") and "/tmp" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_page_has_every_cell(name):
    import notebooks

    path = ROOT / "docs" / "notebooks" / name
    page, pictures = notebooks.page(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all("".join(cell["source"]) in page for cell in cells)
    assert all(f"]({picture})" in page and data[:4] == b"\x89PNG" for picture, data in pictures.items())
