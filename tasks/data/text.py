"""Text as character numbers: the sources of Python's own standard library, or any text file.

There are 96 characters: the newline, and printable ASCII from the space on. Everything else counts as a space.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import numpy as np
import torch

from learned_opt.task import SPLITS
from tasks.data.rows import RowRange, RowSplit

NUM_CHARACTERS = 96
_MOST_PER_FILE = 20_000
_FEWEST = 3_000
_LEAST_SHARE = 0.6
_MOST_HELD_OUT = 20_000
# Of every five files, so many are meta-train, meta-validation and meta-test.
_TURNS = ("meta_train", "meta_validation", "meta_train", "meta_test", "meta_train")


def encode(text: bytes) -> np.ndarray:
    """Characters as numbers in [0, 96), uint8."""
    codes = np.frombuffer(text, np.uint8)
    printable = (codes >= 32) & (codes < 127)
    return np.where(codes == ord("\n"), 0, np.where(printable, codes - 31, 1)).astype(np.uint8)


def _share_of_text(content: bytes) -> float:
    """The share of bytes that are characters of their own or stand for white space."""
    codes = np.frombuffer(content, np.uint8)
    return float((((codes >= 32) & (codes < 127)) | ((codes >= 9) & (codes <= 13))).mean())


@functools.lru_cache(maxsize=4)
def load_text(text_file: str = "") -> tuple[torch.Tensor, RowSplit]:
    """A text, and which stretches of it belong to which split.

    Args:
        text_file: path of a text file, cut in three: its first 60 % are meta-train, the next 20 % meta-validation, the
            rest meta-test. Empty for the modules at the top of Python's standard library, dealt out file by file, at
            most 20,000 characters of each; which they are depends on the version of Python.

    Returns:
        (characters [length] uint8, split). Within each split the last part is held out, the same length in all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: fewer than 3,000 characters, or a file that is mostly something else than the 96 characters, such as
            an archive or text in another alphabet.
    """
    if text_file:
        path = Path(text_file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"text_file {text_file!r} is not a file; give the path of a text file, or leave it empty for the "
                "sources of Python's standard library"
            )
        content = path.read_bytes()
        if len(content) < _FEWEST:
            raise ValueError(
                f"text_file must hold at least {_FEWEST} characters; {text_file!r} has {len(content)}. Give a longer "
                "text, or several in one file"
            )
        whole = encode(content)
        share = _share_of_text(content)
        if share < _LEAST_SHARE:
            raise ValueError(
                f"text_file must be plain text, at least {_LEAST_SHARE:.0%} of it ASCII; of {text_file!r} {share:.0%} "
                "is. Unpack it if it is an archive, save it as UTF-8 if it is UTF-16, and transcribe other alphabets"
            )
        cuts = [int(len(whole) * 0.6), int(len(whole) * 0.8)]
        parts = dict(zip(SPLITS, np.split(whole, cuts)))
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        if len(files) < len(_TURNS):
            raise ValueError("this Python comes without the sources of its standard library; give text_file instead")
        texts = [encode(path.read_bytes()[:_MOST_PER_FILE]) for path in files]
        parts = {
            split: np.concatenate([t for i, t in enumerate(texts) if _TURNS[i % len(_TURNS)] == split])
            for split in SPLITS
        }
    num_test = min(_MOST_HELD_OUT, min(len(part) for part in parts.values()) // 4)
    ranges, first = {}, 0
    for split in SPLITS:
        ranges[split] = RowRange(first, len(parts[split]) - num_test, num_test)
        first += len(parts[split])
    return torch.from_numpy(np.concatenate([parts[s] for s in SPLITS])), RowSplit(torch.arange(first), ranges)
