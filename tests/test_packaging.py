"""What an installation holds is what the folder holds."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r"))]


def test_every_script_and_every_file_beneath_common_is_installed():
    settings = PROJECT["tool"]["setuptools"]
    assert settings["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "mine")
    endings = {path.suffix for path in (ROOT / "common").rglob("*") if path.is_file()} - {".py", ".pyc"}
    assert {pattern.removeprefix("**/*") for pattern in settings["package-data"]["common"]} == endings
    assert set(settings["py-modules"]) < set(PROJECT["tool"]["ruff"]["lint"]["isort"]["known-first-party"])


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_tested_versions_are_within_the_ranges(name):
    tested = {name.lower(): Version(number) for name, number in (line.split("==") for line in lines("constraints.txt"))}
    for requirement in map(Requirement, lines(name)):
        assert requirement.specifier.contains(tested[requirement.name.lower()]), requirement
        assert version(requirement.name) in requirement.specifier, requirement


def test_what_is_imported_is_required():
    """What only comes along with a requirement can be gone with that requirement's next version."""
    required = {Requirement(line).name.lower() for line in lines("requirements.txt")}
    required |= {"sentence-transformers"}  # of one reward, which says so
    known, imported = packages_distributions(), set()
    for path in (*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    foreign = imported - set(sys.stdlib_module_names) - {"common", "grpo", "noisy_grpo", "roma", "vgpo", "vppo"}
    for name in foreign:
        distributions = {distribution.lower().replace("_", "-") for distribution in known.get(name, [name])}
        assert distributions & required, f"{name} is imported, and requirements.txt does not have it"


def test_the_workflow_calls_the_same_command():
    assert "run: .ci/run" in (ROOT / ".github/workflows/tests.yml").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
