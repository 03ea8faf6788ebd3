"""Starts programs under torchrun, of which nothing may be left.

torchrun and its ranks are forked from a process that has imported torch (tests/fork_server.py). `anew` starts Python
itself, for what happens while it imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fork_server import Program

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 240
"""Seconds; a start takes some five on a machine at rest."""


def command(num_ranks: int, *arguments: str | Path, restarts: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher, "--max-restarts", str(restarts), *map(str, arguments)]


def environment(**values: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **values}


@contextlib.contextmanager
def started(
    command: list[str], folder: Path, anew: bool = False, **values: str
) -> Iterator[Program | subprocess.Popen[str]]:
    """The program, running; whatever is left of it at the end is killed."""
    process: Program | subprocess.Popen[str]
    if anew:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=folder, env=environment(**values), **pipes)
    else:
        process = Program(command[1:], cwd=folder, env=environment(**values))
    try:
        yield process
    finally:
        for pid in [*ranks_of(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)


def run(command: list[str], folder: Path, anew: bool = False, **values: str) -> subprocess.CompletedProcess[str]:
    with started(command, folder, anew, **values) as process:
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher has started, in the order of ranks."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in found.stdout.split())


def wait_until(condition, what: str, seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be collected by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
