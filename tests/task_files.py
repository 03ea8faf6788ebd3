"""Tiny data files in the formats of public data sets, for families that read files."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


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


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of an image [height, width] of bytes, in black and white as Omniglot's are."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1", dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def drawing(character: int, number: int) -> np.ndarray:
    """[105, 105], paper 255, with a bar that tells the character and a dot that tells the drawing."""
    pixels = np.full((105, 105), 255, np.uint8)
    pixels[5 + 4 * character : 9 + 4 * character, 15:90] = 0
    pixels[95:103, 5 + 12 * number : 13 + 12 * number] = 0
    return pixels


def write_omniglot(data_dir: Path, name: str = "images_background_small1", *, characters: range = range(20)) -> Path:
    """A zip file of these characters, ten an alphabet, four drawings each."""
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/", "")
        for c in characters:
            for d in range(4):
                entry = f"{name}/Alphabet_{c // 10}/character{c % 10 + 1:02}/{c:04}_{d + 1:02}.png"
                archive.writestr(entry, png(drawing(c, d)))
    return path
