"""Signals as wishes: a run that is asked to stop finishes its outer step and saves."""

from __future__ import annotations

import signal
from typing import Any


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop after the current outer step; a second one acts at once.

    Attributes:
        received: the signal's number; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, self._before[number])
