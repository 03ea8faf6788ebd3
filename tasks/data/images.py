"""Image data sets as flat float rows in [0, 1], and their split into meta-train, meta-validation and meta-test rows."""

from __future__ import annotations

import functools

import torch

from learned_opt.task import SPLITS

_SHARES = (0.6, 0.2, 0.2)


@functools.lru_cache(maxsize=8)
def load_images(dataset: str, data_dir: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(images [rows, pixels] float32 in [0, 1], labels [rows] int64)."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target, dtype=torch.int64)
    raise ValueError(f"dataset must be one of digits; got {dataset!r}")


@functools.lru_cache(maxsize=8)
def split_rows(num_rows: int) -> dict[str, torch.Tensor]:
    """Disjoint row numbers for every split: 60 % meta-train, 20 % meta-validation, 20 % meta-test of one fixed permutation."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    cuts = [0, int(num_rows * _SHARES[0]), int(num_rows * (_SHARES[0] + _SHARES[1])), num_rows]
    return {split: order[a:b].sort().values for split, a, b in zip(SPLITS, cuts, cuts[1:])}
