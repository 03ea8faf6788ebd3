"""What a comparison shows while it runs: a bar on a terminal, a line per result elsewhere."""

from __future__ import annotations

from typing import Any

from learned_opt.evaluation.results import Comparison, Result, format_cell
from learned_opt.progress import Bar


class ComparisonProgress(Bar):
    """A bar with how many results there are, what is being run, and the time left.

    Args:
        total: how many results there will be.
        console: a rich console; by default standard output.
    """

    def __init__(self, total: int, *, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        super().__init__(
            TextColumn("comparing"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[running]}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=total, running="")
        self._total = total

    def started(self, family: str, optimizer: str) -> None:
        """Show what is being run."""
        self._bar.update(self._task, running=f"{family}: {optimizer}")

    def found(self, result: Result, comparison: Comparison) -> None:
        """Show a result."""
        done = len(comparison.results)
        self._bar.update(self._task, completed=done)
        scores = result.scores
        if scores is None:
            words = result.note
        else:
            words = f"final loss {format_cell(scores.final_loss, 3, False)}"
            if scores.speedup is not None and result.optimizer != comparison.reference:
                words += f", speed-up {format_cell(scores.speedup, 3, False)}"
        if not self.console.is_terminal or scores is None:
            self.say(f"{done}/{self._total}  {result.family}, {result.optimizer}: {words}")
