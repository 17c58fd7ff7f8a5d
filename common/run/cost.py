"""What a run's steps cost: a card from the lines of metrics.jsonl."""

import math


def cost_card(lines: list[dict]) -> dict[str, str]:
    """Names and values of the card, as text; what the lines do not have is left out.

    Counts are those of the steps and of the evaluations between them, over all processes.
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
    if peak := max((line.get("memory_gib") or 0 for line in lines), default=0):
        card["memory at most"] = f"{peak:.2f} GiB a process"
    return card


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
