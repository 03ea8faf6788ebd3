"""Running independent pieces of work on a few threads, each of which computes on one core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

_lock = threading.Lock()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def _one_core() -> None:
    # The setting belongs to the calling thread, but torch also keeps it for threads that are yet to come.
    torch.set_num_threads(1)


def _threads(num_threads: int) -> ThreadPoolExecutor:
    """The pool, made on first use; again in a forked process, which has none of its parent's threads."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid() or _pool[1] < num_threads:
            everywhere = torch.get_num_threads()
            pool = ThreadPoolExecutor(num_threads, "learned_opt", initializer=_one_core)
            barrier = threading.Barrier(num_threads)
            for future in [pool.submit(barrier.wait) for _ in range(num_threads)]:
                future.result()
            torch.set_num_threads(everywhere)
            if _pool is not None and _pool[0] == os.getpid():
                _pool[2].shutdown(wait=False)
            _pool = (os.getpid(), num_threads, pool)
        return _pool[2]


def run(pieces: Iterable[Piece], make: Callable[[], Callable[[Piece], None]], num_threads: int) -> None:
    """Do every piece, on up to `num_threads` threads that take the next one as they become free.

    Args:
        pieces: the work; in no particular order.
        make: called once by each thread; returns what does a piece there, with that thread's own buffers.
        num_threads: at most so many; 1 runs here, with whatever threads torch uses itself.

    Raises:
        Exception: what a piece raised; the others have ended then.
    """
    if num_threads <= 1:
        do = make()
        for piece in pieces:
            do(piece)
        return
    source = _Shared(pieces)
    pool = _threads(num_threads)

    @torch.no_grad()
    def work() -> None:
        do = make()
        for piece in source:
            do(piece)

    futures = [pool.submit(work) for _ in range(num_threads)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


class _Shared(Iterator[Piece]):
    """An iterator that several threads may take from."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces, self._lock = iter(pieces), threading.Lock()

    def __next__(self) -> Piece:
        with self._lock:
            return next(self._pieces)
