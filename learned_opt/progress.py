"""What a meta-training run shows while it runs: a progress bar on a terminal, a line per validation elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Bar:
    """A rich progress bar on a terminal, and a place to print to.

    Args:
        columns: of the bar, by rich.
        console: a rich console; by default standard output.
    """

    def __init__(self, *columns: Any, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import Progress as RichProgress

        self.console = console or Console()
        self._bar = RichProgress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)


class Progress(Bar):
    """A bar with outer step, meta-loss, validation, inner steps per second (times particles), and time left.

    Args:
        total: outer steps of the whole run.
        completed: outer steps taken before.
        console: a rich console; by default standard output.
    """

    def __init__(self, total: int, *, completed: int = 0, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        super().__init__(
            TextColumn("meta-training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(
                "meta-loss {task.fields[loss]}  validation {task.fields[validation]}  "
                "{task.fields[rate]} inner steps/s  left"
            ),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, loss="-", validation="-", rate="-")
        self._total, self._began, self._inner = total, time.perf_counter(), 0.0
        self._smooth = math.nan

    def update(self, step: int, meta_loss: float, num_inner_steps: float) -> float:
        """Show an outer step.

        Args:
            step: outer steps taken.
            meta_loss: of this one.
            num_inner_steps: inner steps x particles it spent.

        Returns:
            Inner steps x particles per second since the bar was made.
        """
        self._inner += num_inner_steps
        rate = self._inner / max(time.perf_counter() - self._began, 1e-9)
        self._smooth = meta_loss if math.isnan(self._smooth) else 0.9 * self._smooth + 0.1 * meta_loss
        self._bar.update(self._task, completed=step, loss=f"{self._smooth:.3f}", rate=f"{rate:,.0f}")
        return rate

    def validated(self, step: int, score: float, best: bool) -> None:
        """Show a validation."""
        self._bar.update(self._task, validation=f"{score:.3f}")
        if not self.console.is_terminal:
            rate = self._inner / max(time.perf_counter() - self._began, 1e-9)
            self.console.print(
                f"outer step {step}/{self._total}  meta-loss {self._smooth:.3f}  "
                f"validation {score:.3f}{' (best)' if best else ''}  "
                f"{rate:,.0f} inner steps/s",
                highlight=False,
                soft_wrap=True,
            )
