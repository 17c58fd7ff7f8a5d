"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """A full disk or a folder that cannot be written ends the run with a line instead of a traceback."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # as torch.save and safetensors report a failed write
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        if "inline_container" in reason or "PytorchStreamWriter" in reason:  # torch.save does not say what failed
            reason = "a file could not be written to its end; see whether the disk is full"
        raise SystemExit(f"{what}: cannot be written ({reason.splitlines()[0]}); what was there stays") from None


def append(path: Path, rows: list[dict]) -> None:
    """Add lines to a JSONL file; each is there before the next step begins."""
    with one_line(str(path)), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """Write a whole file and wait until it is on the disk, or leave the old one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def read_arguments(asked: str, folder: Path) -> dict:
    """What the run in `folder` was started with; `asked` is the flag that names it.

    Raises:
        SystemExit: there is no run, or its args.json is damaged.
    """
    try:
        held = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{asked}: no run there (args.json is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise SystemExit(f"{asked}: {folder / 'args.json'} cannot be read ({reason})") from None
    if not isinstance(held, dict):
        raise SystemExit(f"{asked}: {folder / 'args.json'} cannot be read (it holds no settings)")
    return held


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines of steps behind `step`, which will be done again, strange ones, and a last one that was cut off;
    all lines where no step is done."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            if json.loads(line)["step"] <= step > 0:
                kept.append(line + "\n")
    write(path, "".join(kept))
