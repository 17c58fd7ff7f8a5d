"""The scripts stand side by side: what is not the method is the same to the letter."""

import ast
import difflib
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import grpo

ROOT = Path(__file__).parents[1]
SECTIONS = ["Set up", "Sample", "Reward", "Advantage", "Views", "Update", "Log", "Save"]
# How many lines of grpo.py each script may change (its docstring apart); everything else it only adds to.
CHANGED = {"roma": 20, "vppo": 8, "vgpo": 5, "noisy_grpo": 11}
# Defaults that differ from grpo.py's because the paper's do.
OWN_DEFAULTS = {"vppo": {"filter_groups"}, "noisy_grpo": {"kl_coef"}}


def body(script: str) -> list[str]:
    """The lines of a script behind its docstring."""
    text = (ROOT / f"{script}.py").read_text()
    return text[text.index('"""', 3) + 3 :].splitlines()


def functions(script: str) -> dict[str, str]:
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("script", CHANGED)
def test_a_method_changes_few_lines_of_grpo(script):
    removed = [line[2:] for line in difflib.ndiff(body("grpo"), body(script)) if line.startswith("- ")]
    assert len(removed) <= CHANGED[script], "\n".join(removed)


@pytest.mark.parametrize("script", ["grpo", *CHANGED])
def test_the_sections_come_in_the_same_order(script):
    lines = [line.strip() for line in body(script) if line.strip().startswith("# === ")]
    assert [line.removeprefix("# === ").split(":")[0].removesuffix(" ===") for line in lines] == SECTIONS


@pytest.mark.parametrize("script", CHANGED)
def test_shared_functions_and_arguments_are_the_same(script):
    ours, theirs = functions(script), functions("grpo")
    for name in set(theirs) - {"main", "check"}:
        assert ours[name] == theirs[name], name
    module = __import__(script)
    own = OWN_DEFAULTS.get(script, set())
    shared = {f.name: (f.type, f.default) for f in fields(grpo.Args) if f.name not in own}
    assert {f.name: (f.type, f.default) for f in fields(module.Args) if f.name in shared} == shared
    assert inspect.getsource(grpo.Args.__post_init__) == inspect.getsource(module.Args.__post_init__)


@pytest.mark.parametrize("script", ["grpo", *CHANGED])
def test_no_script_imports_another(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert not scripts & set(imported)
    for path in ROOT.glob("common/**/*.py"):
        assert not any(f"import {name}\n" in path.read_text() for name in scripts), path
