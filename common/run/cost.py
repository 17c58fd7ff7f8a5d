"""What a run's steps cost: a card from the lines of metrics.jsonl."""

import math


def cost_card(lines: list[dict], machine: dict | None = None) -> dict[str, str]:
    """Names and values of the card, as text; what the lines do not have is left out.

    Counts are those of the steps and of the evaluations between them, over all processes. With `machine`, what
    `common.run.rates` has found, also how near training comes to the device's measured rates, at the least:

        update    trained tokens * operations a token / seconds of updates, of a matrix product's operations a second
        sampling  decoding steps * bytes of the weights / seconds of sampling, of a copy's bytes a second
    """
    if not lines:
        return {}

    def total(name: str) -> float:
        return sum(line.get(name) or 0 for line in lines)

    steps, seconds = len(lines), total("seconds")
    card = {"steps": f"{steps:,}", "time in steps": f"{duration(seconds)} ({seconds / steps:.3g} s a step)"}
    phases = {
        name.removeprefix("seconds/"): total(name)
        for line in lines[-1:]
        for name in line
        if name.startswith("seconds/")
    }
    for name, spent in phases.items():
        card[f"— {name}"] = f"{duration(spent)} ({spent / max(seconds, 1e-9):.0%})"
    if any("cost/scored_tokens" in line for line in lines):
        sampled, scored = total("cost/sampled_tokens"), total("cost/scored_tokens")
        card["tokens sampled"] = f"{count(sampled)} ({sampled / max(seconds, 1e-9):,.0f} a second)"
        card["tokens scored"] = f"{count(scored)} ({scored / max(sampled, 1):.2f} a sampled one)"
        rows, repeated = total("cost/rows"), total("cost/repeated_rows")
        card["completions scored"] = f"{count(rows)}, {count(repeated)} as copies"
        card["forwards"] = f"{count(total('cost/forwards'))} ({total('cost/forwards') / steps:.3g} a step)"
        card["decoder's steps"] = count(total("cost/decode_steps"))
        card["pictures encoded"] = f"{count(total('cost/images'))} ({total('cost/images') / steps:.3g} a step)"
    machine, processes = machine or {}, (machine or {}).get("processes") or 1
    for phase, done, each, best, what in (
        ("update", "trained_tokens", "operations_a_token", "operations", "a matrix product's"),
        ("sample", "decode_steps", "bytes_a_decoding_step", "bytes", "a copy's"),
    ):
        spent, rate = total(f"seconds/{phase}"), machine.get(best)
        if spent and rate and total(f"cost/{done}"):
            reached = total(f"cost/{done}") * machine.get(each, 0) / processes / spent
            card[f"{best} in {phase}"] = f"{reached / 1e9:.3g} G a second, {reached / rate:.1%} of {what}"
    if peak := max((line.get("memory_gib") or 0 for line in lines), default=0):
        card["memory at most"] = f"{peak:.2f} GiB a process"
    return card


def against(lines: list[dict], name: str, others: list[dict]) -> dict[str, str]:
    """The card's line that compares a run's steps with those of the run `name`: seconds a step and, where both have
    counted them, tokens scored, forwards and pictures encoded."""

    def times(metric: str) -> float:
        own, other = (sum(line.get(metric) or 0 for line in part) / max(len(part), 1) for part in (lines, others))
        return own / other if other else 0.0

    texts = {"seconds": "seconds a step", "cost/scored_tokens": "tokens scored", "cost/forwards": "forwards"}
    texts |= {"cost/images": "pictures encoded"}
    found = [f"{times(metric):.2f} times its {text}" for metric, text in texts.items() if times(metric)]
    return {f"against {name}": ", ".join(found)} if found else {}


def duration(seconds: float) -> str:
    """A time span in two units.

    >>> duration(3725), duration(72.4), duration(7.26)
    ('1 h 02 min', '1 min 12 s', '7.3 s')
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def count(value: float) -> str:
    """A number as people say it.

    >>> count(950), count(12_345), count(6_789_000)
    ('950', '12.3 thousand', '6.79 million')
    """
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if value >= size:
            return f"{value / (1e3 if size == 1e4 else size):.3g} {name}"
    return f"{value:,.0f}"
