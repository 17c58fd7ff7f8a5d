"""Probes: what a policy takes from the picture, hints and its own words, on puzzles and on any other set."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.examples import Example, load_examples
from common.data.messages import TEMPLATE
from common.data.puzzles import hint, puzzle
from common.evaluation import probes
from common.model.inputs import process_images
from common.model.load import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", trainable=False)


@pytest.fixture
def blind(policy):
    """The same policy, to whom every picture is the same: its patches are embedded as nothing."""
    embedding = policy.base.model.visual.patch_embed.proj
    kept = embedding.weight.clone()
    with torch.no_grad():
        embedding.weight.zero_()
    yield policy
    with torch.no_grad():
        embedding.weight.copy_(kept)


def puzzles(count: int = 10) -> list[Example]:
    examples = load_examples("puzzles", "test", limit=count)
    return [examples[n] for n in range(count)]


def test_a_neighbour_is_the_next_of_the_group_with_as_many_pictures():
    picture = Image.new("RGB", (32, 32))
    groups = ["a", "b", "a", "a", "c"]
    examples = [Example((picture,), "<image>?", "1", group=group) for group in groups]
    assert probes.neighbours(examples) == [2, 1, 3, 0, 4]
    examples[3] = Example((picture, picture), "<image><image>?", "1", group="a")
    assert probes.neighbours(examples) == [2, 1, 0, 3, 4]


def test_the_other_picture_is_brought_to_the_size_of_the_real_one(policy):
    small, large = (
        Example((Image.effect_noise(size, 80).convert("RGB"),), "<image>?", "1") for size in ((64, 96), (128, 128))
    )
    seen = probes.views(policy, [small, large], [large, small], TEMPLATE)
    assert seen["other"].image_grid_thw.equal(seen["real"].image_grid_thw)
    expected, _ = process_images(policy, [large.images[0].resize((64, 96)), small.images[0].resize((128, 128))])
    assert seen["other"].pixel_values.equal(expected) and not seen["real"].pixel_values.equal(expected)
    assert len(seen["grey"].pixel_values.unique()) <= 3, "one value a channel"


def test_a_policy_that_sees_relies_on_its_picture_and_a_blind_one_does_not(policy):
    figures = probes.image_reliance(policy, puzzles(), template=TEMPLATE, max_new_tokens=72)
    assert set(figures) == {"reliance/grey", "reliance/other"} and min(figures.values()) > 0.2
    batched = probes.image_reliance(policy, puzzles(), template=TEMPLATE, max_new_tokens=72, batch_prompts=3)
    # Other batches, other neighbours' rounding; the neighbours themselves are of the whole set.
    assert batched == pytest.approx(figures, abs=1e-3)


def test_nothing_changes_for_a_blind_policy(blind):
    figures = probes.image_reliance(blind, puzzles(), template=TEMPLATE, max_new_tokens=24)
    assert figures == pytest.approx({"reliance/grey": 0, "reliance/other": 0}, abs=1e-6)
    values = probes.probe(blind, puzzles(), max_new_tokens=24)
    for name in (
        "sensitivity",
        "reliance on grey, accuracy",
        "reliance on other, nats",
        "other picture from 50% on, nats",
    ):
        assert np.abs(values[name]).max() < 1e-6, name


def test_hints_are_worded_as_in_the_puzzles():
    (example,) = puzzles(1)
    p = puzzle("test", 0)
    (told,) = [load_examples("puzzles:hint=0", "test", limit=1)[0]]
    assert probes.hinted(example, hint(p, 0.0)).question == told.question


def test_brackets(policy):
    ids = torch.tensor([policy.tokenizer("a1 (well so), up (now) b2.")["input_ids"]])
    inside = probes.in_brackets(policy, ids, torch.ones_like(ids, dtype=torch.bool))
    words = [policy.tokenizer.decode([token]).strip() for token in ids[inside].tolist()]
    assert words == ["well", "so", "now"]


def test_means_over_a_mask_and_over_what_is_known():
    values, mask = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    means = probes.token_means(values, mask)
    assert means[0] == 1.5 and np.isnan(means[1])
    assert probes.mean_of(np.array([1.0, np.nan, 3.0])) == 2 and np.isnan(probes.mean_of(np.array([np.nan])))
    summary = probes.summarize({"m": {"f": np.array([0.0, 1.0, np.nan]), "g": np.array([np.nan])}})
    assert summary["m"]["f"]["mean"] == 0.5 and summary["m"]["f"]["count"] == 2 and "g" not in summary["m"]


def test_readings_are_probabilities_of_what_the_picture_shows(policy, monkeypatch):
    read = probes.readings(policy, puzzles(20))
    assert set(read["kind"]) == {"colour", "shape", "height", "place", "direction"}
    assert all(0 <= value <= 1 for part in read.values() for value in part.values() if value is not None)
    # Were every token as likely as the others of the vocabulary, so would be every reading of one token.
    uniform = lambda self, prompts, ids, mask, *_: probes_scores(-np.log(100) * mask.float())
    monkeypatch.setattr(probes.Scorer, "forward", uniform)
    read = probes.readings(policy, puzzles(20))
    assert read["kind"]["shape"] == pytest.approx(0.01) and read["word"]["red"] == pytest.approx(0.01)


def probes_scores(logprobs: torch.Tensor):
    return type("Scores", (), {"logprobs": logprobs})


def test_any_set_is_probed_by_one_command(tmp_path, capsys):
    rows = []
    for n, (colour, answer) in enumerate([("red", "red"), ("blue", "blue"), ("green", "green")]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": "What colour is it?", "answer": answer, "kind": "exact"})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "probes"
    probes.main(probes.Args(data=str(tmp_path / "set.jsonl"), out=str(out), max_completion_length=8, samples=2))
    held = json.loads((out / "probes.json").read_text())
    assert held["summary"]["tiny"]["accuracy, misleading hint"]["count"] == 3 and held["readings"] == {}
    assert (out / "probes.png").stat().st_size > 1000
    assert "sensitivity" in capsys.readouterr().out


def test_puzzles_are_probed_by_word_and_place(tmp_path, capsys):
    probes.main(probes.Args(data="puzzles:hint=75", limit=10, out=str(tmp_path / "probes"), max_completion_length=8))
    printed = capsys.readouterr().out
    assert "purple read right" in printed and "last look right" in printed
