"""Every figure that a run logs is explained."""

import json

import pytest

from common.run.metrics import METRICS, meaning, table
from tests.test_training import SCRIPTS, train


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_logged_name_has_a_meaning(script, tmp_path):
    flags = ["--steps", "1", "--kl-coef", "0.01", "--eval-every", "1", "--eval-examples", "4", "--reward", "vanilla"]
    train(tmp_path / "run", *flags, script=script)
    logged = set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text())) - {"step"}
    assert not {name for name in logged if meaning(name) is None}


def test_a_strange_name_has_none_and_the_table_has_all():
    assert meaning("temperature") is None and meaning("view/gap/fog/3") == METRICS["view/gap/*"]
    assert len(table().splitlines()) == 2 + len(METRICS)
