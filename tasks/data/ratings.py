"""Reader of ratings as MovieLens and its relatives publish them: one line a rating, of user, item, rating and more.

The fields are separated by tabs (u.data), by "::" (ratings.dat) or by commas (ratings.csv); a first line whose third
field says "rating" is a header. Fields after the third, such as the time, are not read.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

_SEPARATORS = ("\t", "::", ",")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings in the order of their file.

    Attributes:
        users: [ratings] int64, positions in `user_names`.
        items: [ratings] int64, positions in `item_names`.
        ratings: [ratings] float32.
        user_names: as in the file, in order of first appearance.
        item_names: likewise.
    """

    users: torch.Tensor
    items: torch.Tensor
    ratings: torch.Tensor
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]


def read_ratings(path: str | Path) -> Ratings:
    """All ratings of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a text file, no ratings in it, or a line that is none (the message has its number).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"ratings_file {str(path)!r} is not a file; give one such as MovieLens' u.data")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8; unpack it if it is an archive") from error
    first = next((line for line in lines if line.strip()), "")
    separator = next((s for s in _SEPARATORS if s in first), None)
    if separator is None:
        raise ValueError(
            f"{file} must have lines of user, item and rating, separated by tabs, '::' or commas; "
            f"its first is {first[:60]!r}"
        )
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    seen: dict[tuple[int, int], int] = {}
    ratings: list[float] = []
    for number, line in enumerate(lines, start=1):
        fields = [field.strip().strip('"') for field in line.split(separator)]
        if fields == [""] or (line is first and len(fields) > 2 and fields[2].lower() == "rating"):
            continue
        if len(fields) < 3 or not all(fields[:3]):
            raise ValueError(f"{file}, line {number}: expected user, item and rating; got {line[:60]!r}")
        pair = (users.setdefault(fields[0], len(users)), items.setdefault(fields[1], len(items)))
        if pair in seen:
            raise ValueError(
                f"{file}, line {number}: user {fields[0]} rated item {fields[1]} already in line {seen[pair]}; "
                "keep one of them"
            )
        seen[pair] = number
        ratings.append(_rating(fields[2], f"{file}, line {number}"))
    if not ratings:
        raise ValueError(f"{file} has no ratings")
    pairs = torch.tensor(list(seen))
    return Ratings(pairs[:, 0], pairs[:, 1], torch.tensor(ratings), tuple(users), tuple(items))


def _rating(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: the rating must be a finite number; got {text[:20]!r}")
    return value
