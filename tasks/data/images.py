"""Image data sets as flat float rows in [0, 1]: scikit-learn's digits; MNIST and Fashion-MNIST by file or download.

Sources: Alpaydin and Kaynak, 1998 (digits); LeCun, Bottou, Bengio and Haffner, 1998 (MNIST); Xiao, Rasul and Vollgraf,
2017 (Fashion-MNIST).
"""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch

from tasks.data.idx import read_folder
from tasks.data.rows import RowSplit, split_rows

_OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
DATASETS = ("digits", *_OPENML)


def check_dataset(dataset: str, data_dir: str = "") -> None:
    """Raise ValueError unless the names fit together; reads no file."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    if dataset == "digits" and data_dir:
        raise ValueError(f"dataset 'digits' ships with scikit-learn and takes no data_dir; got {data_dir!r}")


@functools.lru_cache(maxsize=4)
def load_images(dataset: str, data_dir: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of an image data set, in the order of its files.

    Args:
        dataset: "digits" (1,797 rows of 8x8), "mnist" or "fashion_mnist" (28x28).
        data_dir: folder with IDX files, whose rows are all used (`tasks.data.idx.read_folder`); empty to take
            scikit-learn's copy, downloaded once by `sklearn.datasets.fetch_openml` and cached in its data home (70,000
            rows).

    Returns:
        (images [rows, pixels] float32 in [0, 1], labels [rows] int64).

    Raises:
        ValueError: an unknown data set or a damaged file.
        FileNotFoundError: files that are not there.
        ConnectionError: a download that failed.
        ModuleNotFoundError: scikit-learn is needed and not installed.
    """
    check_dataset(dataset, data_dir)
    if data_dir:
        images, labels = read_folder(data_dir)
        return _tensors(images.reshape(len(images), -1), labels, 255)
    _need_sklearn(dataset)
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _tensors(digits.data, digits.target, 16)
    return _download(dataset)


@functools.lru_cache(maxsize=4)
def load_split_images(
    dataset: str, data_dir: str = "", meta_test_from: int = 0
) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
    """(images, labels, split): the rows of `load_images` in the order that the ranges of `split` refer to."""
    images, labels = load_images(dataset, data_dir)
    split = split_rows(len(images), meta_test_from)
    return images[split.order], labels[split.order], split


def _need_sklearn(dataset: str) -> None:
    if importlib.util.find_spec("sklearn") is None:
        remedy = "install it with `pip install scikit-learn`"
        if dataset != "digits":
            remedy += ", or give data_dir, a folder with the IDX files"
        raise ModuleNotFoundError(f"dataset {dataset!r} needs scikit-learn; {remedy}")


def _download(dataset: str) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import fetch_openml

    # pandas reads the file in a tenth of the time and memory, but is not required.
    parser = "pandas" if importlib.util.find_spec("pandas") else "liac-arff"
    try:
        data = fetch_openml(_OPENML[dataset], version=1, as_frame=False, parser=parser)
    except (OSError, ValueError) as error:  # URLError is an OSError; a checksum mismatch a ValueError
        raise ConnectionError(
            f"dataset {dataset!r} could not be downloaded from openml.org ({error}); check the network and try again, "
            "or put the IDX files in a folder and give it as data_dir"
        ) from error
    return _tensors(np.asarray(data.data), np.asarray(data.target).astype(np.int64), 255)


def _tensors(images: np.ndarray, labels: np.ndarray, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)) / largest
    return scaled, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
