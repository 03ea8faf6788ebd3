"""A data set with a group column: one task per customer, sensor, store, patient or the like.

Rows are brought into one order in which every group is a contiguous range, its held-out rows last. All groups share one
pair of tensors, whatever their sizes; a task is the range of its group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from learned_opt.task import SPLITS, check_split
from tasks.data.rows import SPLIT_SHARES, RowRange, num_held_out

_FEWEST_ROWS = 2


class GroupedData:
    """Rows of inputs and targets, dealt out by group to meta-train, meta-validation and meta-test.

    A group belongs to one split with all of its rows. Within each group, `test_share` of the rows (at least one) is
    held out of the task for `eval_metrics`.

    Args:
        inputs: [rows, …], numbers: NumPy array, tensor, or pandas DataFrame/Series. Floating point (float32 in here) or
            integer (int64, for example token or category numbers).
        targets: [rows] or [rows, …], numbers; integers stay integers, as `cross_entropy` wants them.
        groups: [rows], the group of each row: any values that compare equal within a group, such as strings or
            integers. None for one data set without groups: its rows are dealt out to the three splits.
        test_share: share of each group's rows to hold out, strictly between 0 and 1.
        small_groups: what to do with groups of a single row: "error" or "drop".
        shares: of the groups, for meta-train, meta-validation and meta-test: three positive numbers with sum 1, of
            which each split gets at least one group. Rows without groups are dealt out by them too.
        seed: of the deal; the same seed, the same deal.

    Attributes:
        inputs, targets: all kept rows as tensors, in the order the ranges refer to.
        ranges: per split, its groups' rows.
        labels: per split, its groups' names, in the same order.

    Raises:
        ValueError: empty data, unequal lengths, values that are not numbers or not finite, fewer than three groups, or
            groups with too few rows.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        groups: Any = None,
        *,
        test_share: float = 0.25,
        small_groups: str = "error",
        shares: Sequence[float] = SPLIT_SHARES,
        seed: int = 0,
    ) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must lie strictly between 0 and 1; got {test_share}")
        if small_groups not in ("error", "drop"):
            raise ValueError(f"small_groups must be error or drop; got {small_groups!r}")
        if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"shares must be {len(SPLITS)} positive numbers with sum 1, for {', '.join(SPLITS)}; "
                f"got {tuple(shares)}"
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative; got {seed}")
        all_inputs, all_targets = as_tensor("inputs", inputs), as_tensor("targets", targets)
        num_rows = len(all_inputs)
        if len(all_targets) != num_rows:
            raise ValueError(f"targets must have one entry per row of inputs ({num_rows}); got {len(all_targets)}")
        random = np.random.default_rng(seed)
        split_labels, members = self._deal(groups, num_rows, small_groups, shares, random)
        self.labels: dict[str, list[Any]] = split_labels
        self.ranges: dict[str, list[RowRange]] = {split: [] for split in SPLITS}
        order: list[np.ndarray] = []
        first = 0
        for split in SPLITS:
            for rows in members[split]:
                num_test = num_held_out(len(rows), test_share)
                order.append(random.permutation(rows))
                self.ranges[split].append(RowRange(first, len(rows) - num_test, num_test))
                first += len(rows)
        index = torch.from_numpy(np.concatenate(order))
        self.inputs, self.targets = all_inputs[index], all_targets[index]

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        group: Hashable,
        target: Hashable,
        features: Sequence[Hashable] | None = None,
        **options: Any,
    ) -> GroupedData:
        """Grouped data out of a table.

        Args:
            frame: a pandas DataFrame, or anything with `columns` and columns by name (`frame[name]`).
            group: the column that says which task a row belongs to.
            target: the column to predict.
            features: the columns to predict it from, all of numbers; by default all others.
            **options: `test_share`, `small_groups`, `shares`, `seed`.

        Raises:
            ValueError: a column that is not there or there twice, and whatever the constructor raises.
        """
        if not hasattr(frame, "columns"):
            raise ValueError(
                f"frame must be a table with named columns, such as a pandas DataFrame; got {type(frame).__name__}. "
                "Give arrays to GroupedData(inputs, targets, groups)"
            )
        columns = list(frame.columns)
        if isinstance(features, str):
            raise ValueError(f"features must be a list of columns; got {features!r}")
        chosen = list(features) if features is not None else [c for c in columns if c not in (group, target)]
        for argument, names in (("group", [group]), ("target", [target]), ("features", chosen)):
            for name in names:
                if columns.count(name) != 1:
                    found = "has no" if name not in columns else "has more than one"
                    raise ValueError(
                        f"{argument}: the table {found} column {name!r}; it has {', '.join(map(str, columns))}"
                    )
        if not chosen:
            raise ValueError("features must name at least one column beside the group and the target")
        if target in chosen:
            raise ValueError(f"features must not name the target, which a task is to predict; got {chosen}")
        inputs = torch.stack([as_tensor(f"column {name!r}", frame[name]).float() for name in chosen], dim=1)
        return cls(inputs, frame[target], frame[group], **options)

    @property
    def most_test(self) -> int:
        """The largest number of held-out rows of any group."""
        return max(r.num_test for ranges in self.ranges.values() for r in ranges)

    def num_groups(self, split: str) -> int:
        """How many groups are in a split."""
        return len(self.ranges[check_split(split)])

    @staticmethod
    def _deal(
        groups: Any, num_rows: int, small_groups: str, shares: Sequence[float], random: np.random.Generator
    ) -> tuple[dict[str, list[Any]], dict[str, list[np.ndarray]]]:
        """Per split, the names of its groups and the row numbers of each."""
        if groups is None:
            if num_rows < _FEWEST_ROWS * len(SPLITS):
                raise ValueError(
                    f"data without groups must have at least {_FEWEST_ROWS * len(SPLITS)} rows; got {num_rows}"
                )
            parts = np.split(random.permutation(num_rows), _cuts(num_rows, shares, _FEWEST_ROWS))
            return {s: [s] for s in SPLITS}, {s: [p] for s, p in zip(SPLITS, parts)}
        if isinstance(groups, torch.Tensor):
            groups = groups.detach().cpu()
        names = groups.to_numpy() if hasattr(groups, "to_numpy") else np.asarray(groups)
        if names.shape != (num_rows,):
            raise ValueError(f"groups must have one entry per row of inputs ({num_rows}); got shape {names.shape}")
        missing = [i for i, name in enumerate(names.tolist()) if name is None or name != name]
        if missing:
            raise ValueError(f"groups has a missing value in row {missing[0]}; drop such rows or name their group")
        unique, inverse, counts = np.unique(
            names.astype(str) if names.dtype == object else names, return_inverse=True, return_counts=True
        )
        small = np.flatnonzero(counts < _FEWEST_ROWS)
        if len(small) and small_groups == "error":
            raise ValueError(
                f"{len(small)} of {len(unique)} groups have fewer than {_FEWEST_ROWS} rows, for example "
                f"{unique[small[0]]!s}; a task "
                "needs one to train on and one to hold out. Merge them with others, or leave them out with "
                "small_groups='drop'"
            )
        kept = np.flatnonzero(counts >= _FEWEST_ROWS)
        if len(kept) < len(SPLITS):
            raise ValueError(
                f"groups must name at least {len(SPLITS)} groups of {_FEWEST_ROWS} rows or more, one for each of "
                f"{', '.join(SPLITS)}; "
                f"got {len(kept)}"
            )
        dates = unique.dtype.kind in "mM"
        by_group = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
        parts = np.split(random.permutation(kept), _cuts(len(kept), shares, 1))
        return (
            # NumPy's own items of dates are nanoseconds since 1970; their text says which day it was.
            {s: [str(unique[g]) if dates else unique[g].item() for g in part] for s, part in zip(SPLITS, parts)},
            {s: [by_group[g] for g in part] for s, part in zip(SPLITS, parts)},
        )


def _cuts(count: int, shares: Sequence[float], fewest: int) -> list[int]:
    """Where to cut `count` ≥ 3·fewest things in three by their shares, with at least `fewest` in each part."""
    last = min(max(fewest, round(count * shares[2])), count - 2 * fewest)
    middle = min(max(fewest, round(count * shares[1])), count - last - fewest)
    return [count - last - middle, count - last]


def as_tensor(argument: str, values: Any) -> torch.Tensor:
    """Numbers as a float32 or int64 CPU tensor [rows, …].

    Raises:
        ValueError: not numbers, no rows, or values that are not finite.
    """
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        if tensor.is_complex():
            raise ValueError(
                f"{argument} must be real numbers; got {tensor.dtype}. Give real and imaginary parts apart"
            )
    else:
        try:
            array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
        except ValueError as error:  # rows of different lengths
            raise ValueError(f"{argument} must have rows of one length; {error}") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"{argument} must be numbers; got values of type {array.dtype} such as "
                f"{array.reshape(-1)[:1].tolist()}. "
                "Encode them as numbers first"
            )
        tensor = torch.tensor(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"{argument} must have at least one row; got shape {tuple(tensor.shape)}")
    if tensor.is_floating_point():
        bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{argument} must be finite; {len(bad)} of {len(tensor)} rows hold NaN or infinity, the first in row "
                f"{int(bad[0])}. Fill in or drop them first"
            )
    return tensor
