"""Several data sets as one: mixed by weights to train on, one behind the other to evaluate on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from common.data.examples import Example


@dataclass
class Mixture(Sequence):
    """Examples of several sets, each with its set's name as group.

    Without weights each example stands there once. With them set i has a share of `weights[i]` of the places: the set
    that is largest for its weight stands there once, the others as often as their shares take.
    """

    names: list[str]
    parts: list[Sequence[Example]]
    weights: Sequence[float] | None = None

    @property
    def counts(self) -> list[int]:
        """Places of each set."""
        lengths = [len(part) for part in self.parts]
        weights = self.weights or lengths
        unit = max(length / weight for length, weight in zip(lengths, weights, strict=True))
        return [round(weight * unit) for weight in weights]

    def place(self, index: int) -> tuple[int, int]:
        """Which set, and which of its examples, stands at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number, count in enumerate(self.counts):
            if index < count:
                return number, index % len(self.parts[number])
            index -= count

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Example:
        number, own = self.place(index)
        example = self.parts[number][own]
        return replace(example, group=self.names[number], id=f"{self.names[number]} {example.id}")

    @property
    def sizes(self) -> list[int]:
        """The area of each example's images in pixels, by which an evaluation sorts them; 0 where it is not known."""
        found = []
        for part, count in zip(self.parts, self.counts, strict=True):
            sizes = getattr(part, "sizes", None) or [0] * len(part)
            found += (sizes * math.ceil(count / len(part)))[:count]
        return found


def load_mixture(
    data: str, weights: Sequence[float] | None, load: Callable[..., Sequence[Example]], **counts: int
) -> Sequence[Example]:
    """What `load(name, ...)` gives for the set `data`, or a `Mixture` of several with commas between their names.
    `counts` (`draws`, `limit`) are shared out among them, by weight where there are weights.

    Raises:
        SystemExit: there are not as many weights as sets.
    """
    names = [name.strip() for name in data.split(",")]
    if weights and len(weights) != len(names):
        given = " ".join(map(str, weights))
        raise SystemExit(f"--data-weights {given}: {len(weights)} for {len(names)} sets in --data {data}")
    if len(names) == 1:
        return load(data, **counts)
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / len(names)] * len(names)
    parts = [
        load(name, **{key: math.ceil(count * share) for key, count in counts.items()})
        for name, share in zip(names, shares, strict=True)
    ]
    return Mixture(names, parts, weights)
