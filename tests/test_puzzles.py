"""The built-in puzzles: always the same, never in two splits, not to be guessed without the picture."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from common.data.examples import load_examples
from common.data.puzzles import (
    COLOURS,
    FAMILIES,
    HELD_OUT,
    SHAPES,
    SPLITS,
    ask,
    blind_guess_accuracy,
    content_hash,
    hint,
    puzzle,
    solve,
)


def test_a_puzzle_is_the_same_for_ever():
    p = puzzle("test", 3)
    assert p.question == "What is the purple bar plus the yellow bar?" and p.answer == "11"
    assert p.image.size == (128, 128) and p.image.mode == "RGB"
    code = (
        "from common.data.puzzles import puzzle; import hashlib;"
        "print(hashlib.sha256(puzzle('test', 3).image.tobytes()).hexdigest())"
    )
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_splits_never_share_a_layout():
    seen = {
        split: {content_hash(p.family, p.things) for p in (puzzle(split, i) for i in range(1500))} for split in SPLITS
    }
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert not seen[one] & seen[other]


def test_two_families_of_bars_are_one_where_layouts_are_told_apart():
    things = puzzle("train", 3).things
    assert content_hash("bars", things) == content_hash("extreme", things) != content_hash("hop", things)


def test_families_take_turns_and_answers_are_balanced():
    puzzles = [puzzle("train", i) for i in range(3000)]
    assert [p.family for p in puzzles[:5]] == list(FAMILIES) and len(FAMILIES) >= 4
    for family in FAMILIES:
        answers = Counter(p.answer for p in puzzles if p.family == family)
        assert answers.most_common(1)[0][1] / answers.total() < 0.25, (family, answers)
    assert {p.kind for p in puzzles} == {"int", "exact"}


def test_no_guess_without_the_picture_reaches_a_fifth():
    figures = blind_guess_accuracy(n_train=10_000, n_test=1000)
    assert figures["constant"] < figures["question"] < 0.2
    assert blind_guess_accuracy(10_000, 1000, "shifted")["question"] < 0.2


def test_only_shifted_draws_the_held_out_pairs_and_it_draws_more():
    for split in SPLITS:
        puzzles = [puzzle(split, i) for i in range(500)]
        pairs = {(t.colour, t.shape) for p in puzzles for t in p.things if t.shape in SHAPES}
        assert (pairs <= HELD_OUT) if split == "shifted" else not pairs & HELD_OUT
    count = lambda split: np.mean([len(puzzle(split, i).things) for i in range(500)])
    assert count("shifted") > 1.3 * count("test")


@pytest.mark.parametrize("split", SPLITS)
def test_a_chain_of_good_looks_ends_in_the_answer(split):
    for i in range(500):
        p = puzzle(split, i)
        shown = solve(p)
        assert shown.answer == p.answer and shown.text.endswith(f"{p.answer}.")
        assert all(shown.text[start:end] == read.text == read.truth for start, end, read in shown.spans)
    looks = [solve(puzzle(split, i)).spans[-1][2].look + 1 for i in range(500)]
    assert min(looks) == 2 and np.mean(np.array(looks) >= 4) > 0.3, "many chains are of four looks and more"


def test_what_bad_eyes_see_is_what_the_answer_follows_from():
    p = next(p for p in (puzzle("test", i) for i in range(3, 1000, 5)) if "plus" in p.question)
    lower = solve(p, lambda kind, truth, look, looks: str(int(truth) - 1) if kind == "height" else truth)
    assert int(lower.answer) == int(p.answer) - 2 and lower.text.endswith(f"= {lower.answer}.")
    everything_red = lambda kind, truth, look, looks: "red" if kind == "colour" else truth
    for i in range(0, 50):
        p = puzzle("test", i)
        if p.answer in COLOURS:
            assert solve(p, everything_red).answer == "red"


def test_every_reading_comes_from_the_picture():
    for i in range(300):
        p = puzzle("train", i)
        words = {word for t in p.things for word in (t.colour, t.shape, str(t.row), str(t.column + 1))}
        words |= {t.place for t in p.things if t.shape != "bar"}
        assert {read.text for _, _, read in solve(p).spans} <= words


def test_hints_are_right_as_often_as_the_dial_says():
    puzzles = [puzzle("train", i) for i in range(2000)]
    right = {share: [hint(p, share) == p.answer for p in puzzles] for share in (0.0, 0.5, 0.75, 0.9, 1.0)}
    for share, hits in right.items():
        assert abs(np.mean(hits) - share) < 0.03
    assert sum(right[0.0]) == 0 and all(right[1.0])
    assert all(b for a, b in zip(right[0.5], right[0.75], strict=True) if a), "a larger share only adds right ones"
    wrong = {(p.answer in COLOURS, hint(p, 0.0) in COLOURS) for p in puzzles}
    assert wrong == {(True, True), (False, False)}, "a misleading hint is of the answer's sort"


def test_hinted_puzzles_are_opened_by_name():
    plain, hinted = load_examples("puzzles", "test", limit=20), load_examples("puzzles:hint=75", "test", limit=20)
    for n in range(20):
        p = puzzle("test", n)
        assert hinted[n].question == f"<image>{ask(p, hint(p, 0.75))}" != plain[n].question
        assert hinted[n].answer == plain[n].answer
    assert "Somebody says it is" in hinted[0].question
    for wrong in ("puzzles:hint=101", "puzzles:hint", "puzzles:75"):
        with pytest.raises(SystemExit, match="must be puzzles, or puzzles:hint=N"):
            load_examples(wrong, "test")
    with pytest.raises(SystemExit, match="puzzles:hint=75 has no split 'dev'"):
        load_examples("puzzles:hint=75", "dev")


def test_unknown_splits_and_indices_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train"):
        puzzle("dev", 0)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        puzzle("test", -1)
