"""What a run shows while it goes: one line a step, the phase that lasts, and nothing but plain lines in a file.

On a terminal the last line is drawn anew in place, every second also where nothing has ended, so that a long step is
seen to go on. Where the output is a file or a pipe, a line is printed at the beginning, every `EVERY` seconds, and at
the end, without control characters.
"""

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import TextIO, TypeVar

from tqdm import tqdm

COLUMNS = 100
EVERY = 30.0  # seconds between lines in a file
TICK = 1.0  # seconds between redrawings on a terminal
T = TypeVar("T")


class Progress:
    """A bar over `total` things, of which `done` are: the steps of training, the examples of an evaluation, or, with a
    total of 0, a phase without a count. `text` and `phase` stand behind the bar."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        name: str = "",
        leave: bool = False,
        stream: TextIO | None = None,
        text: str = "",
    ):
        self.stream = stream or sys.stdout
        self.name, self.total, self.done, self.first = name, total, done, done
        self.text, self.doing = text, ""
        self.started = self.printed = self.doing_since = time.monotonic()
        self.over = threading.Event()
        self.bar = self.ticker = None
        if self.stream.isatty():
            form = "{n_fmt}/{total_fmt} {bar:12} {remaining} left  {desc}" if total else "{desc}  {elapsed}"
            self.bar = tqdm(
                total=total or None, initial=done, desc=name, file=self.stream, leave=leave, bar_format=form,
                ascii=" ━", mininterval=0, ncols=COLUMNS,
                delay=TICK if name else 0,  # a short phase is not shown
            )  # fmt: skip
            self.ticker = threading.Thread(target=self.tick, daemon=True)
            self.ticker.start()
        elif name:
            self.say(self.line())

    def tick(self) -> None:
        while not self.over.wait(TICK):
            self.draw()

    def draw(self) -> None:
        self.bar.ncols = min(COLUMNS, get_terminal_size((COLUMNS, 24)).columns)
        spent = time.monotonic() - self.doing_since
        doing = f"{self.doing} {spent:.0f} s" if self.doing and spent >= 2 else ""  # short ones would only flicker
        self.bar.set_description_str("  ".join(filter(None, (self.name, doing, self.text))), refresh=True)

    def line(self) -> str:
        """The line for a file."""
        spent = time.monotonic() - self.started
        counted = f"{self.done}/{self.total}" if self.total else ""
        more = spent / (self.done - self.first) * (self.total - self.done) if self.done > self.first else 0
        left = f"{tqdm.format_interval(more)} left" if more else ""
        return "  ".join(filter(None, (f"{self.name} {counted}".strip(), left, self.text)))

    def update(self, count: int = 1, text: str = "") -> None:
        """So many more are done; `text` stands behind the bar from now on."""
        self.done, self.text, self.doing = self.done + count, text or self.text, ""
        if self.bar is not None:
            self.bar.update(count)
            if not self.name:
                self.draw()
        else:
            now, begun = time.monotonic(), self.done == self.first + count
            end = not self.name and (begun or self.done == self.total)  # of training
            # With its first part done it is known how long an evaluation takes.
            long = begun and (now - self.started) / count * (self.total - self.done) >= EVERY
            if end or long or now - self.printed >= EVERY:
                self.say(self.line())

    def phase(self, text: str) -> None:
        """What goes on until the next `update` or `phase`: shown on a terminal, with its seconds, once it lasts two."""
        self.doing, self.doing_since = text, time.monotonic()
        if self.bar is not None:
            self.draw()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.printed = time.monotonic()
        tqdm.write(text, file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        self.over.set()
        if self.bar is not None:
            self.ticker.join()
            self.doing = ""
            if self.bar.leave:
                self.draw()
            else:
                self.bar.clear()
            self.bar.close()
            self.bar = None


def step_text(metrics: dict[str, float | None]) -> str:
    """What a step's line says behind the bar, in about 60 characters.

    >>> step_text({"reward": 0.71875, "accuracy": 0.6, "completions/mean_length": 44.2, "entropy": 0.0612,
    ...            "tokens_per_second": 5479.0})
    'reward 0.719  right 60%  44 tokens  entropy 0.06  5.5k/s'
    """
    reward, right, length, entropy, speed = (
        math.nan if metrics.get(name) is None else metrics[name]
        for name in ("reward", "accuracy", "completions/mean_length", "entropy", "tokens_per_second")
    )
    rate = f"{speed / 1000:.1f}k/s" if speed >= 1000 else f"{speed:.0f}/s"
    text = f"reward {reward:.3f}  right {right:.0%}  {length:.0f} tokens  entropy {entropy:.2f}  {rate}"
    return text.replace("nan%", "–").replace("nan", "–")


def counted(
    items: Iterable[T], total: int, name: str, size: int = 1, stream: TextIO | None = None, text: str = ""
) -> Iterator[T]:
    """The items, each standing for `size` of `total` things, under a bar: "evaluating 128/500 ━━━ 0:12 left  text"."""
    progress = Progress(total, name=name, stream=stream, text=text)
    try:
        for item in items:
            yield item
            progress.update(min(size, total - progress.done))
    finally:
        progress.close()


@contextmanager
def shown(text: str, stream: TextIO | None = None) -> Iterator[None]:
    """A phase without a count: "loading the model 00:07"."""
    progress = Progress(0, name=text, stream=stream)
    try:
        yield
    finally:
        progress.close()


def close_bars() -> None:
    """Take away every bar that stands, so that what is printed next begins a line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.clear()
        bar.close()
