"""The examples in docstrings hold, in the scripts and on the floor below them."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("tests/benchmarks/*.py")]
)
SHOWING = [path.relative_to(ROOT) for path in FILES if ">>> " in path.read_text()]


def test_the_methods_show_values():
    assert {"grpo.py", "noisy_grpo.py", "roma.py", "vgpo.py", "vppo.py"} <= {str(path) for path in SHOWING}


@pytest.mark.parametrize("path", SHOWING, ids=str)
def test_examples_in_docstrings_hold(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
