"""A reward of one's own: a function in a file, named as `path/to/file.py:function`.

    def function(completions: list[str], examples: list[Example]) -> list[float]: ...

It gets R completions and their examples, with pictures, and returns R numbers, or these and a dictionary of terms, each
R numbers too, which are logged as `rewards/NAME/mean`.
"""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path


def is_own(reward: str) -> bool:
    return ".py:" in reward


@cache
def load_reward(reward: str) -> Callable:
    """The function that `path/to/file.py:function` names.

    Raises:
        SystemExit: one line, where there is no such file or function, or the file cannot be run.
    """
    path, _, name = reward.rpartition(":")
    if not Path(path).is_file():
        raise SystemExit(f"--reward {reward}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with the file
        raise SystemExit(f"--reward {reward}: {path} cannot be run: {where(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise SystemExit(f"--reward {reward}: {path} has no function {name}; it has {', '.join(names) or 'none'}")
    return function


def own_rewards(
    reward: str, completions: Sequence[str], examples: Sequence
) -> tuple[list[float], dict[str, list[float]]]:
    """Rewards [R] and terms by name, [R] each, of completions by one's own function. Example i belongs to completion i.

    Raises:
        SystemExit: one line, where the function fails or returns something else.
    """
    function = load_reward(reward)
    try:
        found = function(list(completions), list(examples))
    except Exception as error:  # whatever the function raises
        raise SystemExit(f"--reward {reward}: {where(error, reward.rpartition(':')[0])}") from None
    rewards, terms = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not isinstance(terms, dict):
        raise SystemExit(
            f"--reward {reward}: its terms are a {type(terms).__name__}, and must be a dictionary of lists"
        )
    return numbers(reward, "rewards", rewards, len(completions)), {
        str(name): numbers(reward, f"the term {name}", values, len(completions)) for name, values in terms.items()
    }


def numbers(reward: str, what: str, values: object, count: int) -> list[float]:
    """`count` finite numbers, or one line that says what they are."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--reward {reward}: {what}: {error}") from None
    if len(found) != count:
        raise SystemExit(f"--reward {reward}: {what}: {len(found)} numbers for {count} completions")
    if bad := [value for value in found if not math.isfinite(value)]:
        raise SystemExit(f"--reward {reward}: {what}: {bad[0]} is not a finite number")
    return found


def where(error: Exception, path: str) -> str:
    """An error and the last line of the file `path` that led to it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(path)]
    return f"{text} ({path}, line {lines[-1]})" if lines else text
