"""Reader of the IDX format of MNIST and its relatives: plain or gzip-compressed, images and labels.

An IDX file is a big-endian header (two zero bytes, a type code, the number of dimensions, then each dimension as a
32-bit integer) followed by the numbers in row-major order. The published image sets hold unsigned bytes, the only type
read here.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 8
PARTS = ("train", "t10k")
"""File name prefixes, in the order in which their rows are concatenated."""


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes.

    Args:
        path: the file; decompressed if its name ends in .gz.
        num_dims: dimensions the array must have: 3 for images, 1 for labels.

    Raises:
        ValueError: the file is damaged, or not of this kind.
    """
    remedy = "replace the file with a fresh copy"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); {remedy}") from error
    if len(content) < 4 + 4 * num_dims or content[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it has no valid header; {remedy}")
    if content[2] != _UNSIGNED_BYTE or content[3] != num_dims:
        raise ValueError(
            f"{path} must hold unsigned bytes (type 8) in {num_dims} dimensions; "
            f"its header says type {content[2]} in {content[3]} dimensions"
        )
    shape = struct.unpack(f">{num_dims}I", content[4 : 4 + 4 * num_dims])
    data = content[4 + 4 * num_dims :]
    if len(data) != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: its header announces {math.prod(shape)} bytes of data, it has {len(data)}; {remedy}"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def read_folder(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the image and label files in a folder: train-… first, then t10k-…, whichever are there.

    Returns:
        (images [rows, height, width] uint8, labels [rows] uint8).

    Raises:
        FileNotFoundError: no such folder, no image files in it, or images without their labels.
        ValueError: a damaged file, or files that do not belong together.
    """
    folder = Path(folder).expanduser()
    names = [f"{part}-images-idx3-ubyte[.gz]" for part in PARTS]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir {str(folder)!r} is not a folder; it must hold {' or '.join(names)} and the labels"
        )
    images, labels = [], []
    for part in PARTS:
        image_file = _find(folder, f"{part}-images-idx3-ubyte")
        if image_file is None:
            continue
        label_file = _find(folder, f"{part}-labels-idx1-ubyte")
        if label_file is None:
            raise FileNotFoundError(
                f"{image_file} has no labels beside it; expected {part}-labels-idx1-ubyte[.gz] in the same folder"
            )
        images.append(read_idx(image_file, 3))
        labels.append(read_idx(label_file, 1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(
                f"{image_file} has {len(images[-1])} images but {label_file} {len(labels[-1])} labels; they must agree"
            )
        if images[-1].shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"{image_file} has images of shape {images[-1].shape[1:]}, the other file {images[0].shape[1:]}"
            )
    if not images:
        raise FileNotFoundError(
            f"data_dir {str(folder)!r} has no image files; it must hold {' or '.join(names)} and the labels"
        )
    return np.concatenate(images), np.concatenate(labels)


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None
