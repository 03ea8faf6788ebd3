"""Data sets: IDX files, downloads, and how rows are dealt out."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import sklearn.datasets
import torch

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.task import SPLITS, draw_task
from tasks.data import images as images_module
from tasks.data.idx import read_folder
from tasks.data.images import load_images
from tasks.data.rows import split_rows, test_rows

TRAIN, T10K = "train", "t10k"


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_part(folder, part, rows, *, first=0, compressed=True, side=5):
    """Images whose every pixel is the row number, with labels row number modulo 10."""
    numbers = np.arange(first, first + rows)
    images = np.repeat(numbers % 256, side * side).reshape(rows, side, side)
    for kind, array in (("images-idx3", images), ("labels-idx1", numbers % 10)):
        path = folder / f"{part}-{kind}-ubyte"
        if compressed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            path.write_bytes(idx_bytes(array))


@pytest.mark.parametrize("compressed", [True, False])
def test_all_rows_of_both_parts_in_order(tmp_path, compressed):
    write_part(tmp_path, TRAIN, 30, compressed=compressed)
    write_part(tmp_path, T10K, 20, first=30, compressed=compressed)
    images, labels = load_images("mnist", str(tmp_path))
    assert images.shape == (50, 25) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 3], torch.arange(50) / 255)
    assert torch.equal(labels, torch.arange(50) % 10)


def test_one_part_is_enough(tmp_path):
    write_part(tmp_path, T10K, 20)
    assert [len(a) for a in read_folder(tmp_path)] == [20, 20]


def test_a_family_on_idx_files_in_file_order(tmp_path):
    write_part(tmp_path, T10K, 100)
    family = tasks.get("image_mlp", dataset="mnist", data_dir=str(tmp_path), meta_test_from=80, hidden=(3,))
    seen = {}
    for split in SPLITS:
        task, _ = draw_task(family, split, SPLITS.index(split))
        batches = family.sample_batches(task, 50, torch.Generator().manual_seed(0))
        pixel = family.shared_data()["inputs"][batches["rows"].flatten(), 0] * 255
        seen[split] = {*pixel.round().int().tolist()}
        held_out = family.shared_data()["inputs"][test_rows(task, family.load()[2].num_test), 0] * 255
        assert not seen[split] & {*held_out.round().int().tolist()}
    assert max(seen["meta_train"]) < 64
    assert min(seen["meta_validation"]) >= 64 and max(seen["meta_validation"]) < 80
    assert min(seen["meta_test"]) >= 80
    batched = BatchedFamily(family)
    stacked, params = batched.start("meta_test", [2, 5])
    assert batched.eval_metrics(params, stacked)["test_loss"].shape == (2,)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere' is not a folder; it must hold train-images"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no image files; it must hold train-images"):
        read_folder(tmp_path)
    write_part(tmp_path, TRAIN, 20)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    good_images, good_labels = images.read_bytes(), labels.read_bytes()
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no labels beside it; expected train-labels-idx1-ubyte\[.gz\]"):
        read_folder(tmp_path)
    labels.write_bytes(good_labels)
    images.write_bytes(good_images[:-12])
    with pytest.raises(ValueError, match=r"is not a complete gzip file .*; replace the file with a fresh copy"):
        read_folder(tmp_path)
    images.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        read_folder(tmp_path)
    images.write_bytes(gzip.compress(gzip.decompress(good_images)[:-7]))
    with pytest.raises(ValueError, match="is damaged: its header announces 500 bytes of data, it has 493"):
        read_folder(tmp_path)
    images.write_bytes(gzip.compress(b"garbage that is no header"))
    with pytest.raises(ValueError, match="is not an IDX file: it has no valid header"):
        read_folder(tmp_path)
    images.write_bytes(good_labels + b"")
    with pytest.raises(
        ValueError, match="must hold unsigned bytes .type 8. in 3 dimensions; its header says type 8 in 1"
    ):
        read_folder(tmp_path)
    images.write_bytes(good_images)
    labels.write_bytes(gzip.compress(idx_bytes(np.zeros(19))))
    with pytest.raises(ValueError, match="has 20 images but .* 19 labels; they must agree"):
        read_folder(tmp_path)
    labels.write_bytes(good_labels)
    write_part(tmp_path, T10K, 5, side=4)
    with pytest.raises(ValueError, match=r"has images of shape \(4, 4\), the other file \(5, 5\)"):
        read_folder(tmp_path)


@pytest.fixture
def _fresh_cache():
    load_images.cache_clear()
    yield
    load_images.cache_clear()


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("dataset", "openml_name"), [("mnist", "mnist_784"), ("fashion_mnist", "Fashion-MNIST")])
def test_download_through_scikit_learn(monkeypatch, dataset, openml_name):
    asked = []

    def fetch(name, *, version, as_frame, parser):
        asked.append((name, version, as_frame, parser))
        pixels = np.arange(40, dtype=np.int64)[:, None] * np.ones(784, dtype=np.int64)
        return sklearn.utils.Bunch(data=pixels, target=np.array([str(i % 10) for i in range(40)], dtype=object))

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    images, labels = load_images(dataset)
    assert asked[0][:3] == (openml_name, 1, False)
    torch.testing.assert_close(images[:, 9], torch.arange(40) / 255)
    assert torch.equal(labels, torch.arange(40) % 10)


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), ValueError("md5 checksum differs")])
def test_no_network(monkeypatch, error):
    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(
        ConnectionError, match=r"'mnist' could not be downloaded from openml.org \(.*\); check the network .*data_dir"
    ):
        load_images("mnist")


@pytest.mark.usefixtures("_fresh_cache")
def test_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(images_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match="'digits' needs scikit-learn; install it with `pip install scikit-learn`$"
    ):
        load_images("digits")
    with pytest.raises(ModuleNotFoundError, match="or give data_dir, a folder with the IDX files"):
        load_images("mnist")


def test_digits_are_scikit_learns():
    images, labels = load_images("digits")
    source = sklearn.datasets.load_digits()
    assert np.array_equal((images * 16).numpy(), source.data)
    assert np.array_equal(labels.numpy(), source.target)


@pytest.mark.parametrize(("num_rows", "meta_test_from"), [(12, 0), (1797, 0), (10_000, 8000), (70_000, 0), (12, 10)])
def test_every_row_is_dealt_out_once(num_rows, meta_test_from):
    split = split_rows(num_rows, meta_test_from)
    assert torch.equal(split.order.sort().values, torch.arange(num_rows))
    covered = []
    for name in SPLITS:
        rows = split.ranges[name]
        assert rows.num_train >= 1 and rows.num_test == split.num_test >= 1
        covered += range(rows.first, rows.first + rows.num_train + rows.num_test)
    assert covered == list(range(num_rows))


def test_rows_that_cannot_be_dealt_out():
    with pytest.raises(ValueError, match="at least 12 rows to be split three ways with rows held out; got 11"):
        split_rows(11)
    with pytest.raises(
        ValueError, match=r"meta_test_from must be 0 or lie in \[10, 98\] for a data set of 100 rows; got 99"
    ):
        split_rows(100, 99)


def test_importing_the_package_and_making_families_reads_no_data():
    """Nothing is opened but Python's own modules, nothing connected to, no data set held."""
    code = """
import sys
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith((".py", ".pyc", ".so")):
        opened.append(arguments[0])
    if event == "socket.connect":
        opened.append("network")
import torch, learned_opt.batched
sys.addaudithook(watch)
import tasks, tasks.suites
families = [family for name in tasks.suites.SUITES for family in tasks.suites.suite(name).values()]
families += [tasks.get("omniglot", data_dir="x"), tasks.get("user_ratings", ratings_file="x")]
families += [tasks.get("image_mlp", dataset=name) for name in ("digits", "mnist", "fashion_mnist")]
tasks.sample_families("image_conv", {"depth": [1, 2], "width": [2, 4]}, 3, 0)
hidden = [name for m in list(sys.modules.values()) if m.__name__.split(".")[0] == "tasks"
          for name, f in vars(m).items() if hasattr(f, "cache_info") and f.cache_info().currsize]
print(len(families) > 35, opened, hidden)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True [] []"


def test_importing_the_package_loads_no_optional_dependency():
    optional = ("sklearn", "pandas", "scipy", "wandb")
    code = f"import sys, tasks; tasks.get('image_mlp'); print([m for m in {optional} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
