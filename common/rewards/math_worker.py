"""Symbolic comparison in a process of its own: sympy has no limits, so whoever asks must be able to kill it.

Reads one JSON pair [prediction, gold] a line, answers one JSON boolean a line, ends when its input ends. Started by
`common.rewards.answers` as `python -m common.rewards.math_worker`; it imports nothing of the training program.
"""

import json
import logging
import signal
import sys

MEMORY_BYTES = 2 * 2**30


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training program handles Ctrl-C and closes the pipe
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the deadline still holds
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    verify(
        parse("$(x+1)^2$", parsing_timeout=None), parse("$x^2$", parsing_timeout=None), timeout_seconds=None
    )  # warm up
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        prediction, gold = json.loads(line)
        try:
            # Time limits are alarms, which cannot stop one long call; the asking side has the clock.
            gold, prediction = (parse(f"${text}$", parsing_timeout=None) for text in (gold, prediction))
            equal = bool(verify(gold, prediction, timeout_seconds=None))
        except Exception:  # whatever a hostile expression brings about, it is not equal
            equal = False
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
