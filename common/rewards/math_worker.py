"""Symbolic equality by math-verify, in a process of its own: sympy has no limits, so whoever asks can kill it.

Run as `python -m common.rewards.math_worker` it reads one JSON list [prediction, gold, digits] a line, answers one JSON
boolean a line, and ends when its input ends. It imports nothing of the training program.
"""

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from queue import LifoQueue

LONGEST_EXPRESSION = 512  # characters
DEADLINE, START_DEADLINE = 2.0, 60.0  # seconds, of one comparison and of the worker's imports
MOST_TIMEOUTS = 8  # of a worker in one call of `score`; its further comparisons are then false without being tried
MEMORY_BYTES = 2 * 2**30

_TOO_HEAVY = re.compile(
    r"\^ ?(?:[^{\s] ?|\{[^}]{0,60})\^"  # a power in an exponent
    r"|\d{16}|(?:e|\^ ?\{? ?[+-]?)\d{3}"  # numbers and exponents that are written to be large
    r"|(?:[)\]}!]|\d{3}) ?!"  # factorials of anything but a small number
    r"|\\(?:int|sum|prod|lim|binom)",
    re.IGNORECASE,
)
# What math-verify would read a part of, or read anyhow: words, numbers side by side, `5 -`, `5_2`, `5'`, `5?`, `5 & 6`.
_NO_EXPRESSION = re.compile(
    r"(?<!\\)\b(?!operatorname|(?:arc)?(?:sin|cos|tan)h?\b)[^\W\d_]{4,}|\b[a-zA-Z]{2,} [a-zA-Z]{2,}"
    r"|(?<!_)\d \.?\d|\d ?[_']|[?@#;]|[-+*/^=_,:<>] ?$|^ ?[*/^=_,:]|\\(?:times|cdot|div|pm) ?$"
)


def is_bounded(text: str) -> bool:
    """Refuse what could keep a computer algebra system busy, and what it would read although it is no expression."""
    opened, closed = sum(map(text.count, "([{")), sum(map(text.count, ")]}"))
    return (
        len(text) <= LONGEST_EXPRESSION
        and opened == closed <= 60
        and text.count("|") % 2 == 0
        and ("&" not in text or "matrix}" in text)
        and _TOO_HEAVY.search(text) is None
        and _NO_EXPRESSION.search(re.sub(r"\\(?!times|cdot|div|pm)[a-zA-Z]+(?: ?\{[a-z]*matrix\})?", "§", text)) is None
    )


class Worker:
    """The process that compares symbolically: started when first needed, killed when it takes too long."""

    def __init__(self):
        self.process, self.timeouts = None, 0
        self.ask_once = lru_cache(maxsize=100_000)(self.ask)

    def equal(self, answer: str, gold: str, digits: int = 6) -> tuple[bool, str]:
        if not (is_bounded(answer) and is_bounded(gold)):
            return False, "unparsed"
        if self.timeouts >= MOST_TIMEOUTS:
            return False, "timeout"
        try:
            return self.ask_once(answer, gold, digits), "ok"
        except TimeoutError:
            self.timeouts += 1
            return False, "timeout"

    def ask(self, answer: str, gold: str, digits: int) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([answer, gold, digits]) + "\n")
            self.process.stdin.flush()
            return self.read(DEADLINE)
        except (OSError, ValueError):  # it died under the question
            self.kill()
            raise TimeoutError from None

    def start(self) -> None:
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        )
        self.read(START_DEADLINE)

    def read(self, seconds: float):
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.kill()
                raise TimeoutError
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


WORKERS = [Worker() for _ in range(min(8, os.cpu_count() or 1))]
_idle: LifoQueue[Worker] = LifoQueue()  # last in, first out: a second process starts when there is work for two
for _worker in WORKERS:
    _idle.put(_worker)


def same_expression(answer: str, gold: str, digits: int = 6) -> tuple[bool, str]:
    """Whether two expressions are equal as mathematics (decimals: rounded to so many digits), and the status: `ok`,
    `unparsed` or `timeout`."""
    worker = _idle.get()
    try:
        return worker.equal(answer, gold, digits)
    finally:
        _idle.put(worker)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training program handles Ctrl-C and closes the pipe
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the deadline still holds
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    # Not its own units, which drop the letters t, h, s, d and others at the end of an expression, nor parts of a text.
    latex = replace(LatexExtractionConfig().normalization_config, units=False, boxed="none")
    reading = {"extraction_config": [LatexExtractionConfig(normalization_config=latex)], "parsing_timeout": None}
    verify(parse("$(x+1)^2$", **reading), parse("$x^2$", **reading), timeout_seconds=None)  # warm up
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        prediction, gold, digits = json.loads(line)
        try:
            # Time limits are alarms, which cannot stop one long call; the asking side has the clock.
            gold, prediction = (parse(f"${text}$", **reading) for text in (gold, prediction))
            equal = bool(verify(gold, prediction, float_rounding=digits, timeout_seconds=None))
        except Exception:  # whatever a hostile expression brings about, it is not equal
            equal = False
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
