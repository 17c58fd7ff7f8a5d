"""Looking at tokens: the methods' own figures, at the right tokens, drawn on a page that holds whatever was written."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import vgpo
import vppo
from common.data.examples import Example
from common.evaluation.look import (
    DRAWN,
    Args,
    Look,
    by_place,
    look,
    main,
    page,
    plot_tokens,
    shade,
    summarize,
    visual_focus,
)
from common.model.inputs import process_images
from common.model.load import TINY
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from tests.small_models import FAMILIES, picture, small_policy, small_prompts, watch_loading


def examples():
    sizes = ((32, 48), (64, 32), (48, 48))
    return [Example((picture(w, h, n),), "<image>" + "what? " * (n + 1), "3", "int") for n, (w, h) in enumerate(sizes)]


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_the_methods(family):
    policy = small_policy(family)
    prompts, _, _ = small_prompts(policy)
    rollout = sample(policy, prompts, 1, 9, uniform_numbers(0, 0, range(3), 9))
    ids, mask = rollout.completion_ids, rollout.completion_mask
    scores = Scorer(policy)(prompts, ids, mask)
    image_mask = prompts.input_ids == policy.base.config.image_token_id
    ours = visual_focus(scores.states, scores.prompt_states, image_mask)
    cosine = vgpo.cosines(scores.states, scores.prompt_states, image_mask)
    torch.testing.assert_close(ours[mask], ((1 + cosine) / 2)[mask], atol=1e-5, rtol=0)
    black = process_images(policy, [Image.new("RGB", (64, 64))])[0][:1]
    torch.testing.assert_close(black[0], policy.black_patch)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_example_looks_the_same_alone_and_in_a_batch(temperature):
    policy, settings = small_policy(), dict(template="{question}", max_new_tokens=7, temperature=temperature)
    together = look(policy, examples(), **settings)
    one_by_one = look(policy, examples(), batch_prompts=1, **settings)
    for a, b in zip(together, one_by_one, strict=True):
        assert a.tokens == b.tokens and len(a.tokens) == len(a.focus) == len(a.dependency)
        np.testing.assert_allclose(a.focus, b.focus, atol=1e-4)
        np.testing.assert_allclose(a.dependency, b.dependency, atol=1e-3)
        assert (a.dependency > 1e-4).any() and (a.dependency >= 0).all()


def test_dependency_is_the_mean_over_masks_of_vppos(monkeypatch):
    policy, example = small_policy(), examples()[1]
    (seen,) = look(policy, [example], template="{question}", max_new_tokens=6, masks=3, mask_prob=0.5, seed=4)
    seen_prompts = []
    forward = Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda self, p, *rest: (seen_prompts.append(p), forward(self, p, *rest))[1])
    look(policy, [example], template="{question}", max_new_tokens=6, masks=3, mask_prob=0.5, seed=4)
    clean, *masked = seen_prompts
    rollout = sample(policy, clean, 1, 6, None, temperature=0)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    scorer, black = Scorer(policy), policy.black_patch
    expected = torch.zeros(ids.shape)
    for k, prompts in enumerate(masked):
        uniforms = torch.from_numpy(np.random.default_rng([4, 0, k]).random(len(clean.pixel_values)))
        view = replace(clean, pixel_values=vppo.blacken_patches(clean.pixel_values, uniforms, 0.5, black))
        torch.testing.assert_close(view.pixel_values, prompts.pixel_values)
        with torch.no_grad():
            pair = scorer(clean, ids, mask).logprobs, scorer(view, ids, mask).logprobs
        expected += vppo.visual_dependency(*pair, mask) / 3
    assert len(masked) == 3
    np.testing.assert_allclose(seen.dependency, expected[0][mask[0]].numpy(), atol=1e-5)


def test_without_an_image_nothing_depends_on_it():
    policy = small_policy()
    (seen,) = look(policy, [Example((), "what?", "3", "int")], template="{question}", max_new_tokens=5)
    assert (seen.dependency == 0).all()


def test_means_are_those_of_the_tokens():
    seen = Look(list("abcd"), np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.1, 0.2, 0.3, 0.6]), True)
    assert seen.means() == pytest.approx({"dependency": 2.0, "focus": 0.3, "late dependency": 3.5, "late focus": 0.45})
    np.testing.assert_allclose(by_place(np.arange(20.0)), np.arange(10) * 2 + 0.5)
    assert np.isnan(by_place(np.array([7.0, 9.0]))).sum() == 8


def test_differences_are_paired():
    dice = np.random.default_rng(0)
    base = dice.normal(0, 10, 200)
    models = {"a": {"focus": base}, "b": {"focus": base + dice.normal(1, 0.1, 200)}}
    figures = summarize(models)["b"]["focus"]
    assert 0.97 < figures["difference_ci"][0] < figures["difference"] < figures["difference_ci"][1] < 1.03
    assert figures["ci"][1] - figures["ci"][0] > 1, "though each mean is uncertain"


def test_colours_go_from_white_to_the_strongest():
    assert shade(0.0, (0, 1), "focus") == shade(-3.0, (0, 1), "focus") == (255, 255, 255)
    assert shade(1.0, (0, 1), "focus") == shade(9.0, (0, 1), "focus") == (80, 150, 255)
    assert shade(2.0, (2, 2), "focus") == (255, 255, 255), "all alike"


def test_the_page_shows_what_was_written_and_runs_none_of_it():
    text = ["<script>alert(1)</script>", '" onmouseover="x', "a & b"]
    seen = Look(text, np.array([0.0, 0.5, 2.0]), np.array([0.4, 0.5, 0.6]), False)
    example = Example((picture(8, 8, 0),), "<image>Is 1 < 2?", "<b>3</b>", "exact")
    written, tags = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attributes)

        def handle_data(self, data):
            written.append(data)

    Parser().feed(page({"tiny": [seen]}, [example]))
    assert "script" not in tags and "b" in tags and tags.count("img") == 1 and tags.count("span") == 6
    assert all(token in written for token in text) and "Is 1 < 2?" in written and " answer <b>3</b>" not in tags


def drawn(tokens, examples, path, monkeypatch):
    """The axis that the picture of examples, answered with the same tokens, is saved from."""
    figures, values = [], np.linspace(0, 1, len(tokens))
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    plot_tokens({"tiny": [Look(tokens, values, values, True)] * len(examples)}, examples, path)
    assert Image.open(path).width > 500
    (axis,) = figures[0].axes
    return axis


def test_the_picture_shows_dollars_as_they_were_written(tmp_path, monkeypatch):
    example = Example((picture(8, 8, 0),), r"<image>In $\parallelogram ABCD$?", r"$\nosuch$", "math")
    axis = drawn([r"$\frac{1}$", "\n", "$x_$"], [example], tmp_path / "tokens.png", monkeypatch)
    texts = [text.get_text() for text in axis.texts]
    assert texts[0] == r"In $\parallelogram ABCD$?  (answer $\nosuch$)" and texts[2:5] == [r"$\frac{1}$", "↵", "$x_$"]


def test_the_picture_has_a_text_a_token_on_its_colour_and_an_end(tmp_path, monkeypatch):
    """Of a long completion it shows the first tokens and says so."""
    tokens = ["mmmmmmmm", " and", " =", "iii"] * 300
    axis = drawn(tokens, [Example((), "?", "3", "int")], tmp_path / "tokens.png", monkeypatch)
    texts = [text for text in axis.texts if text.get_family() == ["monospace"]]
    assert [text.get_text() for text in texts] == 2 * tokens[:DRAWN]
    assert "… and 900 more tokens, which the page shows" in [text.get_text() for text in axis.texts]
    colours = [span.x0 for row in axis.collections for span in (path.get_extents() for path in row.get_paths())]
    assert [text.get_position()[0] for text in texts] == colours
    for text in texts:
        column, (left, right) = text.get_position()[0], text.get_window_extent().intervalx
        ends = axis.transData.transform([(column, 0), (column + len(text.get_text()), 0)])[:, 0]
        np.testing.assert_allclose((left, right), ends, atol=2, err_msg="pixels")


def test_pictures_of_short_completions_do_not_cover_each_other(tmp_path, monkeypatch):
    axis = drawn(["3"], examples(), tmp_path / "tokens.png", monkeypatch)
    spans = [sorted(image.get_extent()[2:]) for image in axis.images]
    assert len(spans) == 3 and spans[0][1] <= spans[1][0] and spans[1][1] <= spans[2][0]


def test_one_command_looks_at_the_built_in_model(tmp_path, capsys):
    main(Args(limit=3, show=2, masks=1, out=str(tmp_path / "look")))
    assert "tiny" in capsys.readouterr().out
    for name in ("tokens.png", "curves.png"):
        assert Image.open(tmp_path / "look" / name).width > 500
    saved = json.loads((tmp_path / "look" / "look.json").read_text())
    rows = saved["examples"]["tiny"]
    assert len(rows) == 3
    assert saved["summary"]["tiny"]["focus"]["mean"] == pytest.approx(np.mean([row["focus"] for row in rows]))


def test_one_model_at_a_time_stands_in_memory(tmp_path, monkeypatch):
    other = str(tmp_path / "other")
    shutil.copytree(TINY, other)
    loaded = watch_loading("common.evaluation.look", monkeypatch)
    settings = dict(limit=1, show=1, masks=1, max_completion_length=4)
    main(Args(model=("tiny", other), out=str(tmp_path / "look"), **settings))
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"out": "/proc/look"}, "--out /proc/look: cannot be written"),
        ({"mask_prob": 0.0}, "--mask-prob 0.0: must be above 0"),
        ({"model": ("runs/nothere",)}, "--model runs/nothere: no such run folder"),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(Args(**{"out": str(tmp_path)} | settings))
