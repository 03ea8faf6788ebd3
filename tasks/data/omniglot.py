"""Omniglot (Lake, Salakhutdinov and Tenenbaum, 2015): handwritten characters of fifty alphabets, twenty drawings each.

The published zip files hold a PNG of 105x105 pixels for each drawing, named set/alphabet/character/drawing.png.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import importlib.util
import io
import os
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.nn import functional as F

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
FILES: dict[str, str] = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
    "images_background_small1": "",
    "images_background_small2": "",
}
"""The published files without ".zip", and their MD5 where one is known. The small ones are parts of the first."""

SIDE = 28
_PUBLISHED_SIDE = 105


@dataclasses.dataclass(frozen=True)
class Characters:
    """Drawings of characters.

    Attributes:
        images: [characters, drawings, 28 · 28] float32 in [0, 1], paper 0 and ink 1.
        names: of each character, "alphabet/character"; sorted.
    """

    images: torch.Tensor
    names: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def load_omniglot(data_dir: str) -> Characters:
    """All characters in the zip files of a folder, each once, scaled down by averaging pixels.

    Args:
        data_dir: folder with some of `FILES`; every images_*.zip in it is read.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: a damaged file, or characters with different numbers of drawings.
        ModuleNotFoundError: pillow, which reads the images, is not installed.
    """
    folder = Path(data_dir).expanduser()
    remedy = f"get them with tasks.data.omniglot.download_omniglot({data_dir!r})"
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder; it must hold Omniglot's zip files: {remedy}")
    paths = sorted(folder.glob("images_*.zip"))
    if not paths:
        raise FileNotFoundError(f"data_dir {data_dir!r} has no images_*.zip, Omniglot's zip files; {remedy}")
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError("Omniglot's images are read by pillow; install it with `pip install pillow`")
    found: dict[str, np.ndarray] = {}
    for path in paths:
        # The small files share alphabets with each other and with the whole: a character counts once.
        found = {**_read_zip(path), **found}
    counts = {name: len(drawings) for name, drawings in found.items()}
    most = max(counts.values())
    short = next((name for name in sorted(counts) if counts[name] < most), None)
    if short is not None:
        raise ValueError(
            f"{data_dir}: character {short} has {counts[short]} drawings, others have {most}; replace the zip files "
            "with fresh copies"
        )
    names = sorted(found)
    images = [_shrink(found[name]) for name in names]
    return Characters(torch.stack(images), tuple(names))


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """Character -> its drawings [drawings, 105, 105] uint8, paper 255."""
    from PIL import Image

    remedy = "replace the file with a fresh copy"
    drawings: dict[str, list[np.ndarray]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                parts = PurePosixPath(name).parts
                if not name.endswith(".png") or parts[0] == "__MACOSX":
                    continue
                if len(parts) < 3:
                    raise ValueError(f"{path}: {name} must lie in a folder for its alphabet and character; {remedy}")
                try:
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        pixels = np.asarray(image.convert("L"))
                except (OSError, SyntaxError, ValueError) as error:  # what pillow raises for damaged images
                    raise ValueError(f"{path}: {name} is not a complete PNG image ({error}); {remedy}") from error
                if pixels.shape != (_PUBLISHED_SIDE, _PUBLISHED_SIDE):
                    raise ValueError(
                        f"{path}: {name} must have {_PUBLISHED_SIDE}x{_PUBLISHED_SIDE} pixels; got "
                        f"{pixels.shape[1]}x{pixels.shape[0]}"
                    )
                drawings.setdefault("/".join(parts[-3:-1]), []).append(pixels)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete zip file ({error}); {remedy}") from error
    if not drawings:
        raise ValueError(f"{path} holds no PNG images; {remedy}")
    return {name: np.stack(images) for name, images in drawings.items()}


def _shrink(drawings: np.ndarray) -> torch.Tensor:
    """[drawings, 105, 105] with paper 255 to [drawings, 28 · 28] with paper 0."""
    ink = 1 - torch.from_numpy(drawings).float() / 255
    return F.interpolate(ink[:, None], size=(SIDE, SIDE), mode="area").flatten(1)


def download_omniglot(
    data_dir: str | Path, files: Sequence[str] = ("images_background", "images_evaluation"), *, timeout: float = 30.0
) -> list[Path]:
    """Download some of the published zip files; those that are there already stay.

    Args:
        data_dir: the folder to put them in, made if it is missing.
        files: names in `FILES`; by default both halves of the data set, 15 MB.
        timeout: seconds to wait for an answer.

    Returns:
        The paths of the files.

    Raises:
        ValueError: an unknown name, or a download that is not the published file.
        ConnectionError: a download that failed. No part of it stays.
    """
    for name in files:
        if name not in FILES:
            raise ValueError(f"files must be among {', '.join(FILES)}; got {name!r}")
    folder = Path(data_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.zip" for name in files]
    for name, path in zip(files, paths):
        if path.exists():
            continue
        url = f"{URL}/{name}.zip"
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            raise ConnectionError(
                f"{url} could not be downloaded ({error}); check the network and try again, or get the file elsewhere "
                f"and put it into {folder}"
            ) from error
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if FILES[name] not in ("", digest) or not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError(
                f"what {url} returned is not the published file ({len(content)} bytes, MD5 {digest}); try again later"
            )
        # Written beside and renamed, so that an interrupted download leaves nothing that looks like the file.
        part = path.with_suffix(".part")
        part.write_bytes(content)
        os.replace(part, path)
    return paths
