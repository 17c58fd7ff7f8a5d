"""Methods compared over training seeds, with numbers that can be checked by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from common.evaluation.comparison import (
    SECONDS,
    area,
    at_equal_time,
    compare,
    comparison_rows,
    comparison_table,
    plot_curves,
    seed_interval,
    step_costs,
)

FIGURES = {
    "grpo": {"test, greedy": [0.50, 0.60, 0.40], "entropy": [0.1, 0.2, 0.3]},
    "vppo": {"test, greedy": [0.60, 0.66, 0.54], "entropy": [0.1, 0.2, 0.3], "late": [0.5, 0.5, 0.5]},
}


def test_differences_are_paired_by_seed():
    """Seeds differ by 20 points, the methods in every seed by about ten: a pair sees it, two means would not."""
    found = compare(FIGURES)["vppo"]["test, greedy"]
    assert found["mean"] == pytest.approx(0.6) and found["difference"] == pytest.approx(0.1)
    low, high = found["difference_ci"]
    expected = stats.ttest_rel(FIGURES["vppo"]["test, greedy"], FIGURES["grpo"]["test, greedy"]).confidence_interval()
    assert (low, high) == pytest.approx(tuple(expected)) and 0 < low < 0.1 < high
    assert found["seeds"] == [0.60, 0.66, 0.54]
    assert "difference" not in compare(FIGURES)["grpo"]["test, greedy"]
    assert "difference" not in compare(FIGURES)["vppo"]["late"], "the first method has no such figure"


def test_one_seed_has_no_interval():
    assert seed_interval([0.3]) is None
    single = {name: {"test, greedy": [values["test, greedy"][0]]} for name, values in FIGURES.items()}
    assert comparison_rows(compare(single))[1] == ["test, greedy", "50.0", "60.0"]


def test_the_table_shows_shares_in_percent_and_the_rest_as_it_is():
    rows = comparison_rows(compare(FIGURES))
    assert rows[0] == ["", "grpo", "vppo"]
    assert rows[1][:2] == ["test, greedy", "50.0"] and rows[1][2].startswith("60.0 (+0.")
    assert rows[2] == ["entropy", "0.200", "0.200 (+0.000 to +0.000)"]
    assert rows[3] == ["late", "", "50.0"]
    unused = {"grpo": {"rethink, share": {"mean": 0.0}, "visual, share": {"mean": 0.2}}}
    assert [row[0] for row in comparison_rows(unused)] == ["", "visual, share"], (
        "sections that nobody wrote are left out"
    )
    assert "test, greedy" in comparison_table(compare(FIGURES)).splitlines()[1]


def test_the_area_weighs_steps_and_not_evaluations():
    assert area([(50, 0.5)]) == 0.5
    assert area([(0, 0.0), (100, 1.0), (400, 1.0)]) == pytest.approx(0.875)


def test_equal_time_is_that_of_all_steps_of_the_first_method():
    curve = [(50, 0.5), (100, 0.7), (150, 0.8)]
    assert at_equal_time(curve, 1.0) == at_equal_time(curve, 0.8) == 0.8, "a cheaper step has no later evaluation"
    assert at_equal_time(curve, 2.0) == pytest.approx(0.6)
    busy = {"grpo": {SECONDS: {"seeds": [3.0, 1.0]}}, "before": {}, "roma": {SECONDS: {"seeds": [1.5, 9.0]}}}
    assert step_costs(busy) == {"grpo": 1.0, "roma": 1.5}, "seeds that shared the machine do not count"


def test_an_oracle_that_checks_readings_credits_each_by_its_own_truth(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import oracles

    from common.data.examples import load_examples
    from common.model.load import load_policy

    tokenizer, example = load_policy("tiny").tokenizer, load_examples("puzzles", "test", limit=1)[0]
    assert oracles.true_readings(example) == ["d2", "purple"]
    chain = "<think>yellow circle at {}. 2 right is d4. 2 up is b4. b4 is {}.</think>"
    rows = [torch.tensor(tokenizer(chain.format(*read))["input_ids"]) for read in (("d2", "blue"), ("d3", "blue"))]
    ids, plain = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([[1.5], [-1.5]])
    credit = oracles.checked_advantages(tokenizer, ids, [example] * 2, plain, group_size=2)
    for row, own, place in ((0, 1.5, 1.0), (1, -1.5, -1.0)):
        by_text = {read: credit[row, tokens].tolist() for read, tokens in oracles.readings_of(tokenizer, ids[row])}
        assert by_text.pop("blue") == [0.0], "wrong in both: nothing to choose"
        ((_, values),) = by_text.items()
        assert values == pytest.approx([place] * len(values), abs=1e-3)
        assert (credit[row] == own).sum() == ids.shape[1] - len(values) - 1


def test_curves_are_drawn(tmp_path):
    runs = [[(50, 0.4), (100, 0.6)], [(50, 0.5), (100, 0.7)]]
    both = {"grpo": runs, "vppo": runs[::-1]}
    widths = []
    for costs in ({}, {"grpo": 1.0, "vppo": 1.2}):  # with costs there is a panel by time
        plot_curves(both, tmp_path / "curves.png", costs)
        widths.append(Image.open(tmp_path / "curves.png").width)
    assert widths[1] > 1.5 * widths[0]


def test_oracles_train_the_tokens_that_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import oracles

    from common.model.load import load_policy

    tokenizer = load_policy("tiny").tokenizer
    texts = ["<think>So it is red.</think><answer>red</answer>", "<think>b4 is red. a1 is ring.</think>"]
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    words = lambda oracle: [
        [tokenizer.decode([token]).strip() for token in row[mask].tolist()]
        for row, mask in zip(ids, oracles.reading_mask(tokenizer, ids, oracle), strict=True)
    ]
    assert words("readings") == [[], ["red", "ring"]]
    assert words("late") == [[], ["ring"]]
    assert words("undecided")[0][:3] == ["it", "is", "red"] and words("undecided")[1][0] == "4"
    mask = torch.arange(40) < torch.tensor([[40], [11], [1]])
    drawn = oracles.random_mask(mask, 0.1, torch.Generator().manual_seed(0))
    assert drawn.sum(1).tolist() == [4, 2, 1] and not (drawn & ~mask).any()
    many = [oracles.random_mask(mask, 0.1, torch.Generator().manual_seed(n))[0] for n in range(400)]
    assert np.abs(torch.stack(many).float().mean(0) - 0.1).max() < 0.07
