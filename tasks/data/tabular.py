"""The real tables that ship with scikit-learn, standardized by their meta-train rows."""

from __future__ import annotations

import functools
import importlib.util

import torch

from learned_opt.task import SPLITS
from tasks.data.rows import RowSplit, split_rows

TABLES = ("breast_cancer", "wine", "diabetes", "digits")


@functools.lru_cache(maxsize=len(TABLES))
def load_table(dataset: str) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
    """A table in the order that the ranges of its split refer to.

    Args:
        dataset: "breast_cancer" (569 tumours, 30 measurements, malignant or benign), "wine" (178 wines, 13
            measurements, 3 growers), "diabetes" (442 patients, 10 measurements, progression after a year) or "digits"
            (1,797 images, 64 pixels, 10 digits).

    Returns:
        (inputs [rows, features] float32, targets, split). Features have mean 0 and variance 1 over the rows that
        meta-train tasks train on, and so has the diabetes target [rows, 1] float32; classes are [rows] int64.

    Raises:
        ValueError: an unknown data set.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if dataset not in TABLES:
        raise ValueError(f"dataset must be one of {', '.join(TABLES)}; got {dataset!r}")
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(f"dataset {dataset!r} needs scikit-learn; install it with `pip install scikit-learn`")
    from sklearn import datasets

    loaded = getattr(datasets, f"load_{dataset}")()
    split = split_rows(len(loaded.data))
    seen = split.ranges[SPLITS[0]].train
    inputs = torch.tensor(loaded.data)[split.order]
    if dataset == "diabetes":
        targets = torch.tensor(loaded.target)[split.order].unsqueeze(1)
        return _standardize(inputs, seen), _standardize(targets, seen), split
    return _standardize(inputs, seen), torch.tensor(loaded.target, dtype=torch.int64)[split.order], split


def _standardize(values: torch.Tensor, seen: slice) -> torch.Tensor:
    values = values.double()
    scale = values[seen].std(0)
    # Some pixels are the same in all rows: leave them at 0 rather than divide by it.
    return ((values - values[seen].mean(0)) / torch.where(scale > 0, scale, 1.0)).float()
