"""Commands of this project in processes of their own that begin with torch, transformers and the scripts imported.

Importing them takes longer than what most commands of the tests do. So a server imports them once and does nothing else
(multiprocessing's forkserver); each command runs in a fork of it, as `python WORDS` would run it in a new process.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
IMPORTED = ["grpo", "noisy_grpo", "roma", "vgpo", "vppo", "common.evaluation.probes", "tests.small_models"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def environment() -> dict[str, str]:
    """This process's variables with one thread on the CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def begin(words: list, output: Path, variables: dict[str, str]) -> BaseProcess:
    """Start `python WORDS` (`SCRIPT ...`, `-m MODULE ...` or `-c CODE ...`) in the project's folder with these
    environment variables; what it prints is added to the file `output`."""
    process = SERVER.Process(target=work, args=([*map(str, words)], str(output), variables))
    process.start()
    return process


def work(words: list[str], output: str, variables: dict[str, str]) -> None:
    """What the fork does."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # where $TMPDIR says now
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def finish(process: BaseProcess, timeout: float = 300) -> int:
    """Wait for a process; returns its exit status, negative the signal that ended it, as `subprocess` does."""
    process.join(timeout)
    assert not process.is_alive(), f"not done in {timeout} seconds"
    return process.exitcode


def run(words: list, output: Path, variables: dict[str, str] | None = None, processes: int = 1) -> int:
    """Run a command to its end, on several processes as `torchrun` does; returns its exit status, the first not 0."""
    variables = environment() if variables is None else variables
    started = [begin(words, output, variables | own) for own in group(processes)]
    try:
        codes = [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()
    return next((code for code in codes if code), 0)


def group(processes: int) -> list[dict[str, str]]:
    """The variables by which each of some processes knows the others."""
    if processes == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
