"""Several processes of one run: what a rank is, which particles are its, and how numbers become one on all of them.

`torchrun` starts the processes and says in the environment who is who; `start` joins them into a group of
`torch.distributed` (gloo between CPUs, nccl between GPUs). Everything else here works as well without a group: `ALONE`
is the one process of an ordinary run, for which sharing takes all and reducing changes nothing.

Ranks hold different particles and the same theta. What decides theta is therefore summed in float64 at the first rank
and sent from there: every rank holds those very bits, whatever algorithm the network library chose and whatever
machine a rank runs on. The sum depends on the number of ranks by rounding alone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions have the group of their import as a default. Loaded inside a run (an optimizer of torch loads it) they
# would keep that group over its end, and its threads, which may then want the lock of an interpreter that is gone.
import torch.distributed.nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits for another: longer than any outer step, validation or diagnosis takes."""

_ORPHAN_CHECK_SECONDS = 1.0
_ORPHAN_GRACE_SECONDS = 30.0
_LAUNCHER_SECONDS = 10.0
"""How long a rank that starts looks for the store of the `torchrun` that started it, which is there before any rank."""


class StoppedElsewhere(RuntimeError):
    """Another rank failed and says why; this one only stops."""


class LostRank(RuntimeError):
    """Another rank has gone, so that this one cannot go on."""


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        rank: this process among all, from 0.
        size: how many there are.
        local_rank, local_size: the same on this machine.

    Attributes:
        rank, size, local_rank, local_size: the arguments.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._buffer_device = torch.device("cpu")

    @property
    def launch(self) -> str:
        """The name of the `torchrun` that started this process, and starts it again if need be; empty without one.

        Its number of restarts says less: a machine whose ranks start again because another's failed does not count.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        began = ""
        with contextlib.suppress(OSError):  # on Linux: numbers of processes come back, and this tells them apart
            began = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return "-".join([os.environ["TORCHELASTIC_RUN_ID"], platform.node(), str(os.getppid()), began])

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files, prints, and talks to services."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """The device of this rank, for a run whose settings say `device`; "cuda" gives each rank of a machine a GPU.

        With more ranks on a machine than GPUs they share them, and exchange numbers through the CPU (gloo): nccl
        wants a GPU for each rank.

        Raises:
            ValueError: one numbered GPU for several ranks.
        """
        if self.size == 1 or torch.device(device).type != "cuda" or not torch.cuda.is_available():
            return device
        if torch.device(device).index is not None and self.local_size > 1:
            raise ValueError(
                f"device is {device!r}, one GPU, for {self.local_size} ranks on a machine; "
                "say 'cuda', and each gets its own"
            )
        mine = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(mine)
        if self.local_size <= torch.cuda.device_count():
            self._buffer_device = mine
        return str(mine)

    def share(self, units: Sequence[T], first: int = 0) -> list[T]:
        """Those of `units` (particles, or groups that stay together) that this rank holds: every `size`-th.

        Args:
            units: all of them, the same on every rank.
            first: number of the first one in the whole run, so that what remains of a division does not always go to
                the same ranks.
        """
        return [unit for k, unit in enumerate(units, start=first) if k % self.size == self.rank]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in float64 on the way: of the same shape, dtype and device, the same bits everywhere."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self._buffer_device, torch.float64, copy=True).contiguous()
        with _named():
            dist.reduce(total, dst=0)
            dist.broadcast(total, src=0)
        return total.to(tensor.device, tensor.dtype)

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite these tensors, of one dtype, with the first rank's."""
        if self.size == 1:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in tensors]).to(self._buffer_device)
        with _named():
            dist.broadcast(flat, src=0)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.detach().copy_(part.view_as(tensor))

    def highest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        total = torch.tensor(value, device=self._buffer_device)
        with _named():
            dist.all_reduce(total, dist.ReduceOp.MAX)
        return int(total)

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value, in the order of ranks, at the first rank; None elsewhere. Tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        with _named():
            dist.gather_object(value, found, dst=0)
        return found

    def everyone(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _named():
            dist.all_gather_object(found, value)
        return found

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns at the first rank, which alone calls it; tensors in it must be on the CPU.

        Raises:
            StoppedElsewhere: on the other ranks, where it raised at the first one.
        """
        if self.size == 1:
            return function()
        result: list[Any] = [None, ""]
        error: Exception | None = None
        if self.is_first:
            try:
                result[0] = function()
            except Exception as caught:
                error, result[1] = caught, str(caught) or type(caught).__name__
        with _named():
            dist.broadcast_object_list(result, src=0)
        if error is not None:
            raise error
        if result[1]:
            raise StoppedElsewhere(result[1])
        return result[0]

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank, and go on only if none raised.

        Raises:
            Exception: the first rank's own; or, at the first rank, a ValueError that names the ranks that raised and
                their reasons.
            StoppedElsewhere: on the other ranks.
        """
        if self.size == 1:
            return function()
        value: Any = None
        error: Exception | None = None
        try:
            value = function()
        except Exception as caught:
            error = caught
        reasons = self.everyone("" if error is None else str(error) or type(error).__name__)
        if not any(reasons):
            return value
        if self.is_first and error is not None:
            raise error
        lines = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        if self.is_first:
            raise ValueError("\n  ".join(lines))
        raise StoppedElsewhere("\n  ".join(lines))


ALONE = Ranks()
"""The one process of a run without `torchrun`."""


def on_cpu(value: Any) -> Any:
    """Nested dicts and lists with every tensor in them on the CPU, as an exchange of objects needs it."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: on_cpu(inner) for name, inner in value.items()}
    return [on_cpu(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def start() -> Iterator[Ranks]:
    """Join the processes that `torchrun` (or anything that sets RANK, WORLD_SIZE and MASTER_ADDR) has started.

    Inside, this process ends when the one that started it does: a `torchrun` that is killed leaves nobody behind.

    Yields:
        Who this process is; `ALONE` where there is one process.

    Raises:
        ValueError: the environment names no valid rank.
        LostRank: the others could not be reached.
    """
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) <= 1 or "MASTER_ADDR" not in environment:
        yield Ranks()
        return
    size = int(environment["WORLD_SIZE"])
    rank = int(environment.get("RANK", "-1"))
    if not 0 <= rank < size:
        raise ValueError(f"RANK must lie in [0, WORLD_SIZE = {size}); got {environment.get('RANK')!r}; use torchrun")
    stop = threading.Event()
    if "TORCHELASTIC_RUN_ID" in environment:
        threading.Thread(target=_watch_parent, args=(os.getppid(), stop), daemon=True).start()
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _find_launcher(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    with _named():
        store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        dist.init_process_group(store=_fresh(store, rank, size), rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks(
            rank, size, int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
        )
    finally:
        stop.set()
        dist.destroy_process_group()


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of the store that no earlier start of the same ranks has written to.

    `torchrun` keeps its store over restarts, and a rank that finds there the address of one that was killed waits for
    nobody. So each rank says hello with a word it has just made up, and the first one answers that very word.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", word)
        answer = store.get(f"welcome/{rank}/{word}").decode()
        store.set(f"{answer}/here/{rank}", "")
        return PrefixStore(answer, store)
    missing, answered = set(range(1, size)), set()
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{word}/here/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                said = store.get(f"hello/{other}").decode()
                if (other, said) not in answered:
                    store.set(f"welcome/{other}/{said}", word)
                    answered.add((other, said))
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {', '.join(map(str, sorted(missing)))} have not come")
        time.sleep(0.01)
    return PrefixStore(word, store)


def _find_launcher(host: str, port: int) -> None:
    """See that the `torchrun` that started this rank is still there.

    One that is interrupted while it starts its ranks may leave a rank that it does not know of. That rank has another
    parent by the time it looks, and would wait for the others until its patience ends.
    """
    end = time.monotonic() + _LAUNCHER_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=_LAUNCHER_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise LostRank(
                    f"the torchrun that started this rank cannot be reached at {host}:{port} ({error}); start it again"
                ) from error
        time.sleep(0.1)


def _watch_parent(parent: int, stop: threading.Event) -> None:
    """End this process, at first as a user would, once its parent is another one: `torchrun` was killed."""
    while not stop.wait(_ORPHAN_CHECK_SECONDS):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            if not stop.wait(_ORPHAN_GRACE_SECONDS):
                os._exit(128 + signal.SIGTERM)
            return


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Turn what the network library says into who is missing."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(
            f"another rank of this run has stopped or cannot be reached ({str(error).strip().splitlines()[0]}); "
            "torchrun starts all ranks again if it was given --max-restarts"
        ) from error
