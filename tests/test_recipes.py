"""The commands of docs/recipes.md parse and fit the machines that they name; the table there is that of the code."""

import pytest

from common.data.sets import SOURCES
from common.model.memory import find_shape
from common.run.settings import check_ranges
from tests.benchmarks.recipes import PAGE, read_recipes, rows, seconds_a_step

RECIPES = read_recipes(PAGE.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_fits_its_machine(recipe):
    check_ranges(recipe.args)
    assert recipe.plan.fits
    assert recipe.args.data in SOURCES or recipe.args.data.endswith((".jsonl", "/geometry3k"))
    assert recipe.args.prompts_per_step % (recipe.plan.machine.count * recipe.args.updates_per_rollout) == 0
    if "validation" not in splits_of(recipe.args.data):
        assert not recipe.args.eval_every, "else the run would end before it began"


def splits_of(data: str) -> tuple[str, ...]:
    data = data.split("/")[-1]
    return ("train", "validation", "test") if data == "geometry3k" else ("train",)


def test_the_table_is_that_of_the_code():
    table = PAGE.read_text().partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]
    assert table.strip().splitlines() == rows(RECIPES), "run python -m tests.benchmarks.recipes"


def test_the_literal_command_of_the_scripts_is_among_them():
    assert "accelerate launch roma.py --model Qwen/Qwen3-VL-4B\n" in PAGE.read_text()


def test_seconds_of_a_step_are_the_arithmetic_that_is_shown():
    """4B on one card: 2,048 steps of decoding, three pictures' forwards and backwards, the step off the device."""
    recipe = next(r for r in RECIPES if r.name == "4B, all weights")
    shape, width, cache = find_shape(recipe.args.model), 256 + 1024, 64 * 0.7 * 250 + 8 * (256 + 1024)
    decoding = 2048 * (2 * shape.read + cache * shape.cached) / (0.21 * 3.35e12)
    products = (2 * 8 * width + 8 * 3 * (8 * width + 64 * 500)) * shape.read / (0.2 * 989e12)
    step = shape.parameters * (24 / 100e9 + 4 / 25e9)
    assert seconds_a_step(recipe.args, recipe.plan, shape) == pytest.approx(decoding + products + step)
