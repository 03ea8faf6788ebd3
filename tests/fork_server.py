"""Python processes that have torch already: forked from one that imported it, and did nothing else.

A process that starts anew spends some three seconds of a core on importing torch before it does what a test is about,
and so does every rank, and the torchrun that starts them. `Program` is what `subprocess.Popen` is to the caller: the
program runs in a process of its own, in its own folder and environment, with Python's own signal handlers, and can be
killed, interrupted and waited for. Under torchrun the ranks are children of torchrun, as they are there. What a forked
process does not show is what happens while Python and the packages are being imported: tests of that start real ones.

    Program(["script.py", "--flag"], cwd=folder, env=environment)
    Program(["-m", "torch.distributed.run", …], …)
    run("-c", "import torch; …")
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch.distributed.run",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch._dynamo",  # two seconds, which torch spends when a function is first vectorized
    "train_optimizer",
)
_LONGEST_REQUEST = 2**20


class Program:
    """A forked program; its output goes to files, which `communicate` reads.

    Attributes:
        pid: of the process.
        returncode: as that of `subprocess.Popen`: None while it runs.
    """

    def __init__(self, arguments: Sequence[str | Path], *, cwd: str | Path, env: dict[str, str]) -> None:
        self._files: list[IO[str]] = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        self._line, theirs = socket.socketpair()
        request = json.dumps({"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": env}).encode()
        handles = [theirs.fileno(), *(file.fileno() for file in self._files)]
        socket.send_fds(_server(), [request], handles)
        theirs.close()
        self.returncode: int | None = None
        self.pid = int(self._line.recv(64))

    def poll(self) -> int | None:
        return self._wait(0)

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], seconds)[0]:
            said = self._line.recv(64)
            self.returncode = int(said) if said else -signal.SIGKILL
            self._line.close()
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and read what was written to standard output and to standard error."""
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        said = []
        for file in self._files:
            if not file.closed:
                file.seek(0)
                said.append(file.read())
                file.close()
        return (said[0], said[1]) if said else ("", "")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str | Path, cwd: str | Path = ROOT, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """A program from start to end, in the tests' own environment unless told otherwise."""
    program = Program(arguments, cwd=cwd, env=dict(os.environ) if env is None else env)
    try:
        out, err = program.communicate(timeout)
    finally:
        program.kill()
    assert program.returncode is not None
    return subprocess.CompletedProcess([*arguments], program.returncode, out, err)


_started: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


def _server() -> socket.socket:
    """The line to this process's server, which ends with it."""
    if not _started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        _started.append((ours, server))
        atexit.register(_end)
    return _started[0][0]


def _end() -> None:
    line, server = _started.pop()
    line.close()
    server.wait()


def _serve(line: socket.socket) -> dict[str, object] | None:
    """Fork a process for each request and say when it ends; returns the request in the new process, None at the end."""
    waiting: dict[int, socket.socket] = {}
    while True:
        if select.select([line], [], [], 0.01 if waiting else None)[0]:
            data, handles, _, _ = socket.recv_fds(line, _LONGEST_REQUEST, 3)
            if not data:
                return None
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                os.dup2(handles[1], 1)
                os.dup2(handles[2], 2)
                os.closerange(3, 4096)
                line.detach()
                for other in waiting.values():
                    other.detach()
                return json.loads(data)
            answer = socket.socket(fileno=handles[0])
            answer.send(str(pid).encode())
            waiting[pid] = answer
            for handle in handles[1:]:
                os.close(handle)
        for pid in [*waiting]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError), waiting.pop(pid) as answer:
                    answer.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run a program as Python's command line would."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(entry for entry in sys.path[1:] if entry not in paths)]
    while arguments[0] == "-u":
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        if arguments[1] == "torch.distributed.run":
            _fork_ranks()
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, folder)
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _fork_ranks() -> None:
    """Let torchrun fork its ranks instead of starting Python anew."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    class Rank:
        """What torchrun asks of a `subprocess.Popen`."""

        def __init__(self, pid: int) -> None:
            self.pid, self.returncode = pid, None

        def poll(self) -> int | None:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if ended else None
            return self.returncode

        def wait(self, timeout: float | None = None) -> int:
            end = time.monotonic() + (1e9 if timeout is None else timeout)
            while self.poll() is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired("a rank", timeout)
                time.sleep(0.005)
            return self.returncode

    def start(_: object, args: tuple[str, ...], env: dict[str, str]) -> Rank:
        assert args[0] == sys.executable, args
        pid = os.fork()
        if pid:
            return Rank(pid)
        with _own_end():
            os.setsid()
            os.closerange(3, 4096)  # torchrun's own connections, which a new process would not have
            atexit._clear()
            _become([*args[1:]], env, os.getcwd())
        raise AssertionError("not reached")

    subprocess_handler.subprocess_handler.SubprocessHandler._popen = start


@contextlib.contextmanager
def _own_end() -> Iterator[None]:
    """Ends the process as Python does at the end of a program, wherever in the stack of its parent it was forked."""
    status = 0
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        traceback.print_exc()
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests, which end; then so does this
    for name in _PACKAGES:
        __import__(name)
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        _become(request["arguments"], request["env"], request["cwd"])  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
