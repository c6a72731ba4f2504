"""Notebooks: run them and store what they show, and turn them into pages of the site.

python docs/site/notebooks.py            # executes docs/notebooks/*.ipynb and stores their outputs
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """(Markdown, pictures by file name) of a notebook with its stored outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text, data = _output(output)
            if text:
                parts.append(f"```text\n{text.rstrip()}\n```")
            if data is not None:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = data
                parts.append(f"![What the cell above draws]({name})")
    about = f"*A notebook: `docs/notebooks/{path.name}`.*"
    return "\n\n".join([parts[0], about, *parts[1:]]) + "\n", pictures


def _output(output: dict[str, Any]) -> tuple[str, bytes | None]:
    """(text, picture) of one stored output."""
    if output["output_type"] == "stream":
        return "".join(output["text"]), None
    data = output.get("data", {})
    if "image/png" in data:
        return "", base64.b64decode(data["image/png"])
    return "".join(data.get("text/plain", "")), None


def execute(path: Path) -> None:
    """Run a notebook's cells in a kernel, in its own folder, and store their outputs without what changes by itself."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if output.output_type != "stream":
                output.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for each in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        execute(each)
        print(each)
