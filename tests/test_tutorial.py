"""The tutorial's cells run, in order, with one step of training each."""

from tests import commands
from tests.commands import ROOT
from tests.run_notebook import script

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def test_the_tutorial_runs(tmp_path):
    variables = {"TUTORIAL_STEPS": "1", "TMPDIR": str(tmp_path)}
    command, output = ["-m", "tests.run_notebook", NOTEBOOK], tmp_path / "output"
    code = commands.run(command, output, commands.environment() | variables)
    assert code == 0, output.read_text()[-4000:]
    (runs,) = tmp_path.glob("tutorial-*")
    assert {path.name for path in runs.iterdir()} == {"grpo", "only-good", "grpo.png", "tokens.png", "both.png"}


def test_its_cells_are_kept_without_what_they_printed():
    """What they show depends on the built-in model."""
    assert '"output_type"' not in NOTEBOOK.read_text() and "assert torch.allclose(loss, by_hand" in script(NOTEBOOK)
