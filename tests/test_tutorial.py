"""The tutorial's cells run, in order, with one step of training each."""

import subprocess
import sys

from tests.run_notebook import script
from tests.test_training import ROOT, environment

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def test_the_tutorial_runs(tmp_path):
    variables = {"TUTORIAL_STEPS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_notebook", str(NOTEBOOK)],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (runs,) = tmp_path.glob("tutorial-*")
    assert {path.name for path in runs.iterdir()} == {"grpo", "only-good", "grpo.png", "tokens.png", "both.png"}


def test_its_cells_are_kept_without_what_they_printed():
    """What they show depends on the built-in model."""
    assert '"output_type"' not in NOTEBOOK.read_text() and "assert torch.allclose(loss, by_hand" in script(NOTEBOOK)
