"""How the rows of a shared data set are dealt out: to the three splits, and within each to training and held-out rows.

The rows are put into one order in which every split is a contiguous range, its held-out rows last. A task then is two
numbers, where its range begins and how many rows it trains on; no row numbers are copied per task.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from learned_opt.task import SPLITS, Tensors

ROW_SHARES = (0.5, 0.2, 0.3)
"""Meta-train, meta-validation and meta-test shares of a data set's rows; models are trained on all three kinds."""
SPLIT_SHARES = (0.6, 0.2, 0.2)
"""The same for groups, users or characters, each of which is a task of its own."""
_HELD_OUT_SHARE = 0.25
_MOST_HELD_OUT = 1000


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Consecutive rows of one split: `num_train` from row `first` on to train on, the next `num_test` held out."""

    first: int
    num_train: int
    num_test: int

    @property
    def train(self) -> slice:
        """The rows to train on."""
        return slice(self.first, self.first + self.num_train)

    @property
    def test(self) -> slice:
        """The rows held out."""
        return slice(self.first + self.num_train, self.first + self.num_train + self.num_test)

    def as_task(self) -> Tensors:
        """The task constants that `draw_rows` and `test_rows` read."""
        return {"first_row": torch.tensor(self.first), "num_rows": torch.tensor(self.num_train)}


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """All rows of a data set, dealt out.

    Attributes:
        order: [rows], the data set's row numbers in the order the ranges refer to.
        ranges: per split, its rows. All splits hold out equally many rows, so that evaluation is one batched program.
    """

    order: torch.Tensor
    ranges: dict[str, RowRange]

    @property
    def num_test(self) -> int:
        """Rows held out in each split."""
        return self.ranges[SPLITS[0]].num_test


@functools.lru_cache(maxsize=16)
def split_rows(num_rows: int, meta_test_from: int = 0) -> RowSplit:
    """Deal out rows 0 … num_rows − 1; a function of its arguments alone.

    Args:
        num_rows: at least 12.
        meta_test_from: 0 deals out one fixed permutation, 50 % meta-train, 20 % meta-validation, 30 % meta-test.
            Otherwise rows keep their order: those from this number on are meta-test, and the last fifth of those before
            it meta-validation.

    Raises:
        ValueError: too few rows, or `meta_test_from` leaves a split with fewer than two rows.
    """
    if num_rows < 12:
        raise ValueError(f"a data set needs at least 12 rows to be split three ways with rows held out; got {num_rows}")
    if meta_test_from:
        order, cuts = torch.arange(num_rows), [0, meta_test_from - meta_test_from // 5, meta_test_from, num_rows]
        if not 10 <= meta_test_from <= num_rows - 2:
            raise ValueError(
                f"meta_test_from must be 0 or lie in [10, {num_rows - 2}] for a data set of {num_rows} rows; got "
                f"{meta_test_from}"
            )
    else:
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
        first, second = int(num_rows * ROW_SHARES[0]), int(num_rows * (ROW_SHARES[0] + ROW_SHARES[1]))
        cuts = [0, first, second, num_rows]
    sizes = [b - a for a, b in zip(cuts, cuts[1:])]
    num_test = max(1, min(_MOST_HELD_OUT, int(min(sizes) * _HELD_OUT_SHARE)))
    ranges = {s: RowRange(start, size - num_test, num_test) for s, start, size in zip(SPLITS, cuts, sizes)}
    return RowSplit(order, ranges)


def num_held_out(num_rows: int, share: float) -> int:
    """How many of num_rows ≥ 2 rows to hold out: the share, but at least one, and one is left to train on."""
    return min(max(1, round(num_rows * share)), num_rows - 1)


def draw_rows(task: Tensors, num_steps: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Row numbers [num_steps, batch_size] of the task's training rows, drawn with replacement."""
    return int(task["first_row"]) + torch.randint(int(task["num_rows"]), (num_steps, batch_size), generator=generator)


def test_rows(task: Tensors, num_test: int) -> torch.Tensor:
    """The numbers [num_test] of the rows held out of the task; runs under `torch.func.vmap`."""
    return task["first_row"] + task["num_rows"] + torch.arange(num_test, device=task["first_row"].device)


test_rows.__test__ = False  # type: ignore[attr-defined]  # a test module that imports it must not collect it
