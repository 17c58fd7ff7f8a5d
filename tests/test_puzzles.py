"""The built-in puzzles: always the same, never in two splits, not to be guessed without the picture."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from common.data.puzzles import FAMILIES, HELD_OUT, SPLITS, blind_guess_accuracy, content_hash, puzzle


def test_a_puzzle_is_the_same_for_ever():
    p = puzzle("test", 3)
    assert p.question == puzzle("test", 3).question and p.image.size == (128, 128) and p.image.mode == "RGB"
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


def test_families_take_turns_and_answers_are_balanced():
    puzzles = [puzzle("train", i) for i in range(3000)]
    assert [p.family for p in puzzles[:5]] == list(FAMILIES) and len(FAMILIES) >= 4
    for family in FAMILIES:
        answers = Counter(p.answer for p in puzzles if p.family == family)
        assert answers.most_common(1)[0][1] / answers.total() < 0.25, (family, answers)


def test_no_guess_without_the_picture_reaches_a_quarter():
    figures = blind_guess_accuracy(n_train=10_000, n_test=1000)
    assert figures["constant"] < figures["question"] < 0.25
    assert blind_guess_accuracy(10_000, 1000, "shifted")["question"] < 0.25


def test_only_shifted_draws_the_held_out_pairs_and_it_draws_more():
    for split in SPLITS:
        puzzles = [puzzle(split, i) for i in range(500)]
        pairs = {(t.colour, t.shape) for p in puzzles for t in p.things} - {
            (t.colour, t.shape) for p in puzzles for t in p.things if t.colour in ("grey", "black")
        }
        assert (pairs <= HELD_OUT) if split == "shifted" else not pairs & HELD_OUT
    count = lambda split: np.mean([len(puzzle(split, i).things) for i in range(500)])
    assert count("shifted") > 1.3 * count("test")


def test_demonstrations_end_in_what_they_say():
    for i in range(300):
        p = puzzle("train", i)
        assert p.answer in p.careful.rstrip(".").split()[-3:] or p.answer in p.careful.split(".")[-2]
        assert p.hasty_answer in p.hasty and p.kind in ("int", "exact")
    right = np.mean([p.hasty_answer == p.answer for p in (puzzle("train", i) for i in range(1000))])
    assert 0.25 < right < 0.5, "the hasty demonstrator is often wrong"


def test_unknown_splits_and_indices_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train"):
        puzzle("dev", 0)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        puzzle("test", -1)
