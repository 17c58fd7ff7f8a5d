"""Run a notebook's cells in order, in one process and without a notebook: `python -m tests.run_notebook FILE.ipynb`."""

import json
import runpy
import sys
import tempfile
from pathlib import Path


def script(notebook: Path) -> str:
    """The cells of a notebook as one script."""
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notebook.py"
        path.write_text(script(Path(sys.argv[1])))
        runpy.run_path(str(path), run_name="__main__")
