"""What a run shows while it goes: lines on a terminal, and in a file."""

import io
import os
import pty
import re
import time

from common.run import progress
from common.run.progress import Progress, counted, shown, step_text
from tests.test_run import new_run

METRICS = {
    "reward": 0.71875, "accuracy": 0.6, "completions/mean_length": 1444.2, "entropy": 0.0612,
    "tokens_per_second": 15479.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(terminal: Terminal) -> list[str]:
    """Every state that the last line had."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", terminal.getvalue()) if line.strip()]


def test_a_step_is_one_line_of_at_most_100_columns():
    terminal = Terminal()
    bar = Progress(12_000, 10_000, leave=True, stream=terminal)
    for _ in range(3):
        bar.update(text=step_text(METRICS))
    bar.close()
    lines = drawn(terminal)
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("10003/12000 ━") and lines[-1].endswith(step_text(METRICS))
    assert re.search(r" \d+:\d\d(:\d\d)? left ", lines[-1])


def test_a_long_phase_is_seen_to_go_on(monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    terminal, clock = Terminal(), time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    bar = Progress(300, stream=terminal)
    bar.phase("sampling")
    for seconds in (1, 7, 8):
        clock += seconds
        time.sleep(0.05)
    bar.close()
    assert any("sampling 8 s" in line for line in drawn(terminal)) and "sampling 16 s" in terminal.getvalue()
    assert "sampling 1 s" not in terminal.getvalue()


def test_a_steps_phases_are_named_while_they_last(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "TICK", 0.01)
    terminal, clock = Terminal(), time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    monkeypatch.setattr("sys.stdout", terminal)
    run = new_run(tmp_path / "run")
    run.close_bar()
    run.meter.start()
    for phase, seconds in (("sample", 5), ("reward", 3), ("update", 4)):
        clock += seconds
        time.sleep(0.05)
        assert drawn(terminal)[-1].endswith(f"left  {phase} {seconds} s")
        run.meter.lap(phase)
    run.close()


def test_lines_stand_above_the_bar():
    terminal = Terminal()
    bar = Progress(3, leave=True, stream=terminal)
    bar.update()
    bar.say("step 1: held-out accuracy 78 %")
    bar.close()
    assert "step 1: held-out accuracy 78 %" in drawn(terminal)


def test_a_file_gets_plain_lines_every_so_often(monkeypatch):
    clock = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    file = io.StringIO()
    bar = Progress(300, stream=file)
    for _ in range(300):
        clock += 1
        bar.phase("sampling")
        bar.update(text=step_text(METRICS))
    bar.close()
    lines = file.getvalue().splitlines()
    assert 10 <= len(lines) <= 12 and lines[0].startswith("1/300  04:59 left  reward 0.719")
    assert lines[-1].startswith("300/300  reward")
    assert file.getvalue().isprintable() or not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f━]", file.getvalue())


def test_phases_and_evaluations_are_named_in_a_file_too():
    file = io.StringIO()
    with shown("loading the model", file):
        pass
    assert list(counted("abc", 5, "evaluating", 2, file)) == ["a", "b", "c"]
    assert file.getvalue() == "loading the model\nevaluating 0/5\n"


def test_a_count_never_goes_beyond_its_total(monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.0)
    terminal = Terminal()
    assert list(counted("abc", 5, "evaluating", 2, terminal)) == ["a", "b", "c"]
    assert any("5/5" in line and "evaluating" in line for line in drawn(terminal)) and "6/5" not in terminal.getvalue()


def test_a_real_terminal_is_left_clean(monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        with shown("loading the model", terminal):
            time.sleep(0.1)
        print("loaded", file=terminal, flush=True)
        text = ""
        while "loaded" not in text:
            text += os.read(leader, 10_000).decode()
    assert "loading the model" in text and text.endswith("\rloaded\r\n")
    os.close(leader)


def test_a_phase_of_less_than_a_second_leaves_no_trace():
    terminal = Terminal()
    with shown("loading the model", terminal):
        pass
    assert not drawn(terminal)


def test_what_has_no_value_is_a_dash():
    assert step_text({"reward": 0.0, "entropy": None}) == "reward 0.000  right –  – tokens  entropy –  –/s"


def test_an_evaluation_says_what_it_comes_to_and_then_how_long_it_takes(monkeypatch):
    clock, file = 1000.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    for _ in counted(range(10), 100, "evaluating", 10, file, "100 completions, 7,200 tokens at most"):
        clock += 20  # seconds a batch: with the first the rest is known
    lines = file.getvalue().splitlines()
    assert lines[0] == "evaluating 0/100  100 completions, 7,200 tokens at most"
    assert lines[1] == "evaluating 10/100  03:00 left  100 completions, 7,200 tokens at most"
    short = io.StringIO()
    for _ in counted(range(10), 100, "evaluating", 10, short):
        clock += 2
    assert short.getvalue().splitlines() == ["evaluating 0/100"], "nobody waits for that"
