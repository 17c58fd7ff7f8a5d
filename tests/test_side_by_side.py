"""The scripts stand side by side: what is not the method is the same to the letter, and little is the method."""

import ast
import inspect
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import grpo
from tests import diff_page

ROOT = Path(__file__).parents[1]
SECTIONS = ["Set up", "Sample", "Reward", "Advantage", "Views", "Update", "Log", "Save"]
# Lines that plain `diff grpo.py SCRIPT.py` removes and adds, at most, docstring included.
CHANGED = {"vgpo": 110, "noisy_grpo": 110, "vppo": 140, "roma": 140}
PLACES, CHANGED_IN_MAIN = 14, 40
LINES, LINES_OF_MAIN, MORE_LINES = 340, 150, 120
# Defaults that differ from grpo.py's because the paper's do.
OWN_DEFAULTS = {"vppo": {"filter_groups"}, "noisy_grpo": {"kl_coef"}, "roma": {"robust_examples"}}
FLOORS = ({"model", "rewards"}, {"data"}, {"corruptions"}, {"run"}, {"evaluation"}, {"tiny"})


def text(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def tree(script: str) -> ast.Module:
    return ast.parse(text(script))


def lines_of_main(script: str) -> range:
    (main,) = (node for node in tree(script).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return range(main.lineno, main.end_lineno + 1)


def imports(path: Path) -> list[str]:
    found = [node for node in ast.walk(ast.parse(path.read_text()))]
    named = [node.module for node in found if isinstance(node, ast.ImportFrom)]
    return named + [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]


def difference(script: str) -> tuple[int, int, int]:
    """Lines that differ from grpo.py, places where they do, and lines that differ within `main`."""
    command = ["diff", ROOT / "grpo.py", ROOT / f"{script}.py"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    main, changed, places, inside = lines_of_main("grpo"), 0, 0, 0
    for line in found:
        if place := re.match(r"(\d+)", line):
            places, within = places + 1, int(place[1]) in main
        elif line[0] in "<>":
            changed, inside = changed + 1, inside + within
    return changed, places, inside


def test_grpo_can_be_read_in_one_sitting():
    assert len(text("grpo").splitlines()) <= LINES and len(lines_of_main("grpo")) <= LINES_OF_MAIN


@pytest.mark.parametrize("script", CHANGED)
def test_a_method_is_few_lines_in_few_places(script):
    changed, places, inside = difference(script)
    assert changed <= CHANGED[script] and places <= PLACES and inside <= CHANGED_IN_MAIN, (changed, places, inside)
    assert len(text(script).splitlines()) <= len(text("grpo").splitlines()) + MORE_LINES


@pytest.mark.parametrize("script", CHANGED)
def test_the_page_and_the_readme_count_as_diff_does(script):
    _, added, removed = diff_page.counts(script)
    assert added + removed == difference(script)[0]


def test_the_page_side_by_side_and_the_readmes_counts_are_those_of_the_scripts():
    assert (ROOT / "docs/side_by_side.html").read_text() == diff_page.page(), "run python -m tests.diff_page"
    readme = (ROOT / "README.md").read_text()
    assert readme == diff_page.readme(readme), "run python -m tests.diff_page"
    for script in ("grpo", *CHANGED):
        page = (ROOT / f"docs/{script}.md").read_text()
        assert page == diff_page.with_lines(page), "run python -m tests.diff_page"


@pytest.mark.parametrize("script", CHANGED)
def test_every_term_of_an_objective_stands_beside_a_line(script):
    lines, known = diff_page.difference(script), diff_page.terms(script)
    for term in known:
        assert any(diff_page.notes(line, [term]) for line in lines), term


@pytest.mark.parametrize("script", ["grpo", *CHANGED])
def test_the_sections_come_in_the_same_order(script):
    lines = [line.strip() for line in text(script).splitlines() if line.startswith("    ")]
    titles = [line for line in lines if line.startswith("# === ")]
    assert [title.removeprefix("# === ").split(":")[0].removesuffix(" ===") for title in titles] == SECTIONS


@pytest.mark.parametrize("script", CHANGED)
def test_shared_functions_and_arguments_are_the_same(script):
    ours, theirs = (
        {node.name: ast.dump(node) for node in tree(name).body if isinstance(node, ast.FunctionDef)}
        for name in (script, "grpo")
    )
    for name in set(theirs) - {"main", "check"}:
        assert ours[name] == theirs[name], name
    module, own = __import__(script), OWN_DEFAULTS.get(script, set())
    shared = {f.name: (f.type, f.default) for f in fields(grpo.Args) if f.name not in own}
    assert {f.name: (f.type, f.default) for f in fields(module.Args) if f.name in shared} == shared
    assert inspect.getsource(grpo.Args.__post_init__) == inspect.getsource(module.Args.__post_init__)


@pytest.mark.parametrize("script", ["grpo", *CHANGED])
def test_a_script_says_where_its_page_is(script):
    assert text(script).splitlines()[0].endswith(f" Page: docs/{script}.md") and (ROOT / f"docs/{script}.md").is_file()


@pytest.mark.parametrize("script", ["grpo", *CHANGED])
def test_a_script_stands_on_few_modules_of_the_floor_and_on_no_other_script(script):
    imported, scripts = imports(ROOT / f"{script}.py"), {path.stem for path in ROOT.glob("*.py")}
    assert len([name for name in imported if name.startswith("common.")]) <= 8
    assert not scripts & set(imported)
    for path in ROOT.glob("common/**/*.py"):
        assert not scripts & set(imports(path)), path


def test_imports_of_the_floor_run_downwards():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    for path in ROOT.glob("common/**/*.py"):
        room = path.relative_to(ROOT / "common").parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("common.") and (other := name.split(".")[1]) != room:
                assert floor[other] < floor[room], f"{path} imports {name}"
