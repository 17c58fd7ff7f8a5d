"""Runs that are struck at random moments, by signals, a full disk, a folder that turns read-only, or too little memory,
and then continued: to the same bits as a run that nothing happened to.

Two moments by default; `FAULTS=50 pytest tests/test_faults.py` strikes at fifty. A moment is a number of calls and
returns of functions, drawn by a seed, so that it does not depend on the machine's speed. `FIRST=20` begins with the
twentieth moment.
"""

import ctypes
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SCRIPTS = ("grpo", "noisy_grpo", "vgpo", "vppo", "roma")
KINDS = ("SIGKILL", "full disk", "SIGTERM", "read-only folder", "SIGHUP", "out of memory")
MOMENTS, FIRST = int(os.environ.get("FAULTS", "2")), int(os.environ.get("FIRST", "0"))
FLAGS = (
    "--prompts-per-step 2 --group-size 4 --steps 3 --save-every 1 --seed 3 --no-preflight --max-completion-length 40"
)
FLAGS = [*FLAGS.split(), "--eval-every", "2", "--eval-examples", "2", "--test-examples", "2", "--keep-checkpoints", "3"]


def strike(kind: str, folder: Path) -> None:
    """What happens to this process."""
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "full disk":  # a file that grows beyond this fails as on one; the log is smaller
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif kind == "read-only folder":
        if folder.exists():
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
        # Root may write anywhere, but not without its capabilities.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    elif kind == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")  # as from whatever is called


def train(script: str, folder: str, log: str, kind: str = "", moment: int = 0) -> None:
    """Run a script as from the command line in this process, which its output and the number of its calls outlive."""
    from common.run.settings import launch

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    calls, module = 0, importlib.import_module(script)
    begun = (Path(folder) / "args.json").is_file()
    sys.argv = [f"{script}.py", *(["--resume", folder] if begun else ["--out", folder, *FLAGS])]

    def count(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == moment:
            sys.setprofile(None)
            strike(kind, Path(folder))

    sys.setprofile(count)
    try:
        launch(module.main, module.Args)
    finally:
        sys.setprofile(None)
        if not kind:
            Path(f"{log}.calls").write_text(str(calls))


@pytest.fixture(scope="module")
def start():
    """Starts `train` in a fresh process that need not import anything again."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "matplotlib.pyplot", "transformers.models.qwen3_vl.modeling_qwen3_vl"])

    def run(*arguments) -> int:
        process = context.Process(target=train, args=arguments)
        process.start()
        process.join(900)
        process.kill()
        process.join()
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The folder of a script's run that nothing happens to, and the number of its calls."""
    done = {}

    def of(script: str) -> tuple[Path, int]:
        if script not in done:
            folder = tmp_path_factory.mktemp(script) / "run"
            log = folder.parent / "log"
            assert start(script, str(folder), str(log)) == 0, log.read_text()
            done[script] = folder, int(Path(f"{log}.calls").read_text())
        return done[script]

    return of


def results(folder: Path) -> dict:
    """All that a run leaves which does not depend on time: weights, metrics, completions, evaluations."""
    measured = ("seconds", "tokens_per_second", "memory_gib", "cost/")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if v and not k.startswith(measured)} for line in lines]
    kept = {"metrics": kept}  # null or 0 is also what an earlier step of the same process had and this one has not
    for path in folder.glob("checkpoints/step-*/*.safetensors"):
        kept[str(path.relative_to(folder))] = path.read_bytes()
    for path in (folder / "completions.jsonl", *folder.glob("evaluations/*.json")):
        kept[path.name] = path.read_text()
    return kept


@pytest.mark.parametrize("number", range(FIRST, FIRST + MOMENTS))
def test_a_run_that_is_struck_goes_on_to_the_same_bits(number, start, reference, tmp_path):
    script, kind, dice = SCRIPTS[number % len(SCRIPTS)], KINDS[number % len(KINDS)], random.Random(number)
    whole, calls = reference(script)
    moment, struck, log = dice.randrange(calls), 0, tmp_path / "log"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        struck = start(script, str(folder), str(log), kind, moment)
        said = f"{script}, {kind} at call {moment} of {calls}, exit code {struck}\n{log.read_text()}"
        print(said)
        allowed = {"SIGKILL": {-signal.SIGKILL}, "SIGTERM": {0, -signal.SIGTERM}, "SIGHUP": {0, -signal.SIGHUP}}
        assert struck in allowed.get(kind, {0, 1}) or kind == "out of memory", said
        assert "Traceback" not in log.read_text() or kind == "out of memory", said
        for path in (folder, *folder.rglob("*")) if folder.exists() else ():
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert start(script, str(folder), str(log)) == 0, said + log.read_text()
        assert [line["step"] for line in results(folder)["metrics"]] == [1, 2, 3]
        assert results(folder) == results(whole), said
