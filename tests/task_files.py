"""Tiny data files in the formats of public data sets, for families that read files."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch


@functools.cache
def folder() -> Path:
    """A folder that is gone when the tests are over."""
    path = Path(tempfile.mkdtemp(prefix="task-files-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def write_ratings(path: Path, *, num_users: int = 15, num_items: int = 20, separator: str = "\t") -> Path:
    """Ratings 1 to 5 with two tastes among the users; user u has rated 8 + u % 4 items."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for user in range(num_users):
        for item in torch.randperm(num_items, generator=generator)[: 8 + user % 4].tolist():
            liked = 4 if (item % 2 == 0) == (user % 2 == 0) else 2
            rating = liked + int(torch.randint(-1, 2, (), generator=generator))
            lines.append(separator.join(map(str, (user + 1, 100 + item, rating, 881250949))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
