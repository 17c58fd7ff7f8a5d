"""The documentation's links, anchors, commands and flags are those of the code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from common.run.settings import parse
from tests import results_page
from tests.diff_page import terms
from tests.settings_page import page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = ("grpo", "noisy_grpo", "roma", "vgpo", "vppo")
HEADINGS = ["Idea", "Objective", "Usage", "Metrics", "Implementation details", "Results", "What to try"]
OWN = ("python ", "accelerate launch ")


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(path: Path) -> list[str]:
    """Commands of a page's code blocks, fenced or indented, continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^(?:    )?((?:python|accelerate launch) .+)$", text, re.M)]
    return [line for line in lines if line.startswith(OWN) and "…" not in line and "`" not in line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            numbered = there.suffix == ".py" and re.fullmatch(r"L\d+", anchor)  # by tests/diff_page.py
            assert not anchor or numbered or anchor in anchors(there), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_parse(path, monkeypatch):
    monkeypatch.setattr("common.run.settings.newest_checkpoint", str)  # runs that commands before it have made
    for command in commands(path):
        words = shlex.split(command, comments=True)
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if words[1] == "-m" and words[2].startswith("common."):
            name = words[2] + ".__main__" if words[2] == "common.evaluation" else words[2]
            tyro.cli(importlib.import_module(name).Args, args=words[3:])
        elif words[1] != "-m" and script is not None and words[script] not in ("mine.py", "cispo.py"):
            parse(importlib.import_module(words[script][:-3]).Args, words[script + 1 :])


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_page_has_the_same_parts_as_others(method):
    text = (ROOT / f"docs/{method}.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.M) == HEADINGS
    assert f"(../{method}.py)" in text and "https://arxiv.org/abs/" in text
    usage = text.partition("## Usage")[2].partition("\n## ")[0]
    assert re.search(rf"^python {method}\.py ", usage, re.M) and f"--num-processes 8 {method}.py" in usage
    # Each term names what computes it, in the script itself.
    script = (ROOT / f"{method}.py").read_text()
    for term, _, names in terms(method):
        assert all(re.search(rf"\b{name}\b", script) for name in names), term


def test_the_page_of_the_rewards_has_them_too():
    found = re.findall(r"^## (.+)$", (ROOT / "docs/rewards.md").read_text(), re.M)
    assert [title for title in found if title != "A reward of your own"] == HEADINGS


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        reached.add(path)
        found = re.findall(r"\]\(([^)#\s]+)", path.read_text()) if path.suffix == ".md" else []
        todo += {(path.parent / target).resolve() for target in found if "://" not in target} - reached - set(todo)
    assert {path for path in (ROOT / "docs").iterdir()} <= reached


def test_the_readme_is_short_and_keeps_its_test_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert "-m pytest" in text.partition("<!-- tests -->")[2].partition("<!-- end -->")[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_row_of_a_table_is_one_line_with_as_many_cells_as_its_head(path):
    """Else GitHub renders what is left over as another row."""
    head, fenced = 0, False
    for line in path.read_text().splitlines():
        fenced ^= line.startswith("```")
        row = line.startswith("|") and not fenced
        cells = len(re.findall(r"(?<!\\)\|", line)) if row else 0
        assert not row or (line.endswith("|") and cells == (head or cells)), line
        head = cells and (head or cells)


def test_every_setting_is_on_its_page():
    assert (ROOT / "docs/settings.md").read_text() == page(), "run python -m tests.settings_page"


def test_results_are_those_of_the_studies():
    """Every table of results is made from the files in docs/studies."""
    readme = (ROOT / "README.md").read_text()
    assert results_page.readme(readme) == readme, "run python -m tests.results_page"
    for path in (ROOT / "docs").glob("*.md"):
        assert results_page.filled(path.read_text()) == path.read_text(), "run python -m tests.results_page"
    table = results_page.methods_table("default", {"sampled": "test, sampled"}, "test, sampled").splitlines()
    figures = results_page.study("default")["figures"]
    assert len(table) == 2 + len(figures) and table[3].startswith(
        f"| GRPO | {100 * figures['GRPO']['test, sampled']['mean']:.1f} |"
    )
