"""Omniglot's zip files, their download, and few-shot classification of their characters."""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import shutil
import urllib.error
import urllib.request
import zipfile

import pytest
import torch
from torch.nn import functional as F

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.task import SPLITS, draw_task, task_seed
from tasks.data import omniglot as data_module
from tasks.data.omniglot import download_omniglot, load_omniglot
from tests.task_files import drawing, png, write_omniglot


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omniglot")
    write_omniglot(folder)
    return str(folder)


def test_every_drawing_is_read_and_shrunk(data_dir):
    read = load_omniglot(data_dir)
    assert read.names == tuple(f"Alphabet_{a}/character{c:02}" for a in (0, 1) for c in range(1, 11))
    assert read.images.shape == (20, 4, 784) and read.images.dtype == torch.float32
    assert read.images.min() == 0 and read.images.max() == 1
    for c, d in ((0, 0), (13, 2), (19, 3)):
        ink = 1 - torch.from_numpy(drawing(c, d)).double() / 255
        # A small pixel is the mean of the pixels that it covers, wholly or in part.
        want = torch.empty(28, 28, dtype=torch.float64)
        for i in range(28):
            for j in range(28):
                rows = slice(i * 105 // 28, math.ceil((i + 1) * 105 / 28))
                want[i, j] = ink[rows, j * 105 // 28 : math.ceil((j + 1) * 105 / 28)].mean()
        torch.testing.assert_close(read.images[c, d].view(28, 28).double(), want, rtol=1e-6, atol=1e-6)


def test_a_character_in_several_files_counts_once(tmp_path):
    write_omniglot(tmp_path, characters=range(12))
    write_omniglot(tmp_path, "images_background_small2", characters=range(8, 20))
    with zipfile.ZipFile(tmp_path / "images_background_small2.zip", "a") as archive:
        archive.writestr("__MACOSX/images_background_small2/Alphabet_0/character01/._0001_01.png", b"not an image")
        archive.writestr("images_background_small2/.DS_Store", b"nor this")
    read = load_omniglot(str(tmp_path))
    assert len(read.names) == len(set(read.names)) == 20
    assert len(read.images.flatten(1).unique(dim=0)) == 20


def test_missing_and_damaged_files(tmp_path):
    def load():
        load_omniglot.cache_clear()
        return load_omniglot(str(tmp_path))

    with pytest.raises(
        FileNotFoundError, match=r"nowhere' is not a folder; it must hold Omniglot's.*download_omniglot"
    ):
        load_omniglot(str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"has no images_\*.zip, Omniglot's zip files; get them with tasks\.data"
    ):
        load()
    path = write_omniglot(tmp_path, characters=range(3))
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    with pytest.raises(
        ValueError, match=r"small1.zip is not a complete zip file \(.*\); replace the file with a fresh"
    ):
        load()
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is not a complete zip file"):
        load()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/read.me", "")
    with pytest.raises(ValueError, match="holds no PNG images; replace the file"):
        load()

    def with_entry(name, content):
        path.write_bytes(good)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content)

    whole = png(drawing(0, 0))
    for content in (b"\x89PNG and no more", whole[:60]):
        with_entry("i/Alphabet_0/character01/0000_05.png", content)
        with pytest.raises(ValueError, match=r"small1.zip: i/Alphabet_0/character01/0000_05.png is not a complete PNG"):
            load()
    with_entry("i/Alphabet_0/character01/0000_05.png", png(drawing(0, 0)[:100]))
    with pytest.raises(ValueError, match="0000_05.png must have 105x105 pixels; got 105x100"):
        load()
    with_entry("stray.png", whole)
    with pytest.raises(ValueError, match="stray.png must lie in a folder for its alphabet and character"):
        load()
    with_entry("i/Alphabet_0/character02/0001_05.png", whole)
    with pytest.raises(ValueError, match="character Alphabet_0/character01 has 4 drawings, others have 5; replace"):
        load()
    load_omniglot.cache_clear()


def test_without_pillow(monkeypatch, tmp_path):
    write_omniglot(tmp_path, characters=range(1))
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="read by pillow; install it with `pip install pillow`"):
        load_omniglot(str(tmp_path))


class Answer(io.BytesIO):
    """What the network returned."""


def serve(monkeypatch, content):
    """Answers every address with this; returns the list of what was asked."""
    asked = []

    def open_url(url, timeout):
        asked.append((url, timeout))
        if isinstance(content, Exception):
            raise content
        return Answer(content)

    monkeypatch.setattr(urllib.request, "urlopen", open_url)
    return asked


def test_download(monkeypatch, tmp_path):
    content = write_omniglot(tmp_path / "served").read_bytes()
    asked = serve(monkeypatch, content)
    monkeypatch.setitem(data_module.FILES, "images_evaluation", hashlib.md5(content).hexdigest())
    target = tmp_path / "new" / "folder"
    paths = download_omniglot(target, ["images_evaluation", "images_background_small1"], timeout=7)
    base = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    assert asked == [(f"{base}/images_evaluation.zip", 7), (f"{base}/images_background_small1.zip", 7)]
    assert sorted(target.iterdir()) == sorted(paths)
    assert all(path.read_bytes() == content for path in paths)
    assert len(load_omniglot(str(target)).names) == 20
    assert download_omniglot(target, ["images_evaluation"]) == paths[:1]
    assert len(asked) == 2  # what is there is not asked for again


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), TimeoutError("timed out"), http.client.IncompleteRead(b"PK")]
)
def test_no_network(monkeypatch, tmp_path, error):
    serve(monkeypatch, error)
    message = (
        r"omniglot/master/python/images_background.zip could not be downloaded \(.*\); check the network .* put it"
    )
    with pytest.raises(ConnectionError, match=message):
        download_omniglot(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_the_published_file(monkeypatch, tmp_path):
    serve(monkeypatch, write_omniglot(tmp_path / "served").read_bytes())
    with pytest.raises(ValueError, match=r"is not the published file \(\d+ bytes, MD5 [0-9a-f]{32}\); try again later"):
        download_omniglot(tmp_path / "data", ["images_background"])
    serve(monkeypatch, b"<html>")
    with pytest.raises(ValueError, match=r"is not the published file \(6 bytes"):
        download_omniglot(tmp_path / "data", ["images_background_small1"])
    assert not list((tmp_path / "data").iterdir())
    with pytest.raises(ValueError, match="files must be among images_background, .*; got 'images'"):
        download_omniglot(tmp_path, ["images"])


def test_characters_belong_to_one_split(data_dir):
    family = tasks.get("omniglot", data_dir=data_dir, num_ways=4, num_shots=2, num_queries=2)
    _, splits = family.load()
    assert [len(splits[split]) for split in SPLITS] == [12, 4, 4]
    assert torch.cat([splits[split] for split in SPLITS]).sort().values.tolist() == list(range(20))
    for split in SPLITS:
        seen = set()
        for i in range(30):
            task, _ = draw_task(family, split, task_seed(split, i))
            assert len(set(task["characters"].tolist())) == 4
            assert task["drawings"].sort(1).values.tolist() == [[0, 1, 2, 3]] * 4
            seen |= set(task["characters"].tolist())
        assert seen == set(splits[split].tolist())


@pytest.mark.parametrize("rotated", [False, True])
def test_support_and_queries_are_other_drawings_of_the_same_characters(data_dir, rotated):
    family = tasks.get("omniglot", data_dir=data_dir, num_ways=3, num_shots=1, num_queries=2, rotated=rotated)
    images = family.load()[0].view(20, 4, 28, 28)
    turns_seen = set()
    for i in range(10):
        task, _ = draw_task(family, "meta_train", task_seed("meta_train", i))
        everything = {**task, **family.shared_data()}
        for drawings, count in ((slice(0, 1), 1), (slice(1, 3), 2)):
            rows, classes = family.rows(everything, drawings)
            assert classes.tolist() == [c for c in range(3) for _ in range(count)]
            for row, (c, d) in zip(rows, [(c, d) for c in range(3) for d in range(drawings.start, drawings.stop)]):
                image = images[task["characters"][c], task["drawings"][c, d]]
                turn = int(task["turns"][c]) if rotated else 0
                turns_seen.add(turn)
                assert torch.equal(row.view(28, 28), torch.rot90(image, turn))
    assert turns_seen == (set(range(4)) if rotated else {0})


def test_metrics_are_those_of_the_queries(data_dir):
    family = tasks.get("omniglot", data_dir=data_dir, num_ways=3, num_queries=2, channels=())
    task, params = draw_task(family, "meta_test", task_seed("meta_test", 0))
    everything = {**task, **family.shared_data()}
    images = family.load()[0][task["characters"][:, None], task["drawings"]]
    scores = images @ params["weight0"] + params["bias0"]
    torch.testing.assert_close(
        family.loss(params, everything, {}), F.cross_entropy(scores[:, 0], torch.arange(3)), rtol=1e-5, atol=1e-6
    )
    metrics = family.eval_metrics(params, everything)
    classes = torch.arange(3).repeat_interleave(2)
    wanted = F.cross_entropy(scores[:, 1:].flatten(0, 1), classes)
    torch.testing.assert_close(metrics["test_loss"], wanted, rtol=1e-5, atol=1e-6)
    assert float(metrics["test_accuracy"]) == float((scores[:, 1:].argmax(-1).flatten() == classes).float().mean())
    at_zero = {name: torch.zeros_like(value) for name, value in params.items()}
    assert float(family.loss(at_zero, everything, {})) == pytest.approx(math.log(3))


@pytest.mark.parametrize("fields", [{"channels": (6, 8, 8)}, {"channels": (), "hidden": (16,)}])
def test_one_drawing_teaches_the_others(data_dir, fields):
    family = tasks.get("omniglot", data_dir=data_dir, num_queries=3, num_ways=4, **fields)
    batched, seeds = BatchedFamily(family), [task_seed("meta_test", i) for i in range(6)]
    stacked, params = batched.start("meta_test", seeds)
    before = batched.eval_metrics(params, stacked)["test_accuracy"].mean()
    square = torch.zeros_like(params)
    for step in range(40):
        losses, grads = batched.losses_and_grads(params, stacked, {})
        square = 0.9 * square + 0.1 * grads.square()
        params = params - 0.01 * grads / ((square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    after = batched.eval_metrics(params, stacked)["test_accuracy"].mean()
    assert losses.max() < 0.1
    assert after > 0.6 and after > before + 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_dir": ""}, "data_dir must name a folder with Omniglot's zip files; got ''"),
        ({"num_ways": 1}, "num_ways must be at least 2; got 1"),
        ({"num_shots": 0}, "num_shots must be at least 1; got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1; got 0"),
        ({"hidden": (3,)}, r"hidden is for an MLP, with channels=\(\); got \(3,\) and channels=\(16, 16, 16\)"),
        ({"channels": (0,)}, r"channels must name at least one layer, each of at least 1; got \(0,\)"),
        ({"norm": "group"}, "norm must be one of none, layer, batch; got 'group'"),
        ({"activation": "step"}, "activation must be one of .*; got 'step'"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("omniglot", **{"data_dir": "x", **fields})


def test_too_few_characters_or_drawings(data_dir, tmp_path):
    with pytest.raises(ValueError, match="at most the characters of the smallest split, 4 of the 20 in .*; got 5"):
        tasks.get("omniglot", data_dir=data_dir).load()
    with pytest.raises(ValueError, match=r"at most the drawings of a character, 4; got 1 \+ 5"):
        tasks.get("omniglot", data_dir=data_dir, num_ways=4).load()
    with pytest.raises(ValueError, match="task family 'omniglot' needs data_dir"):
        tasks.get("omniglot")
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder; it must hold Omniglot's zip files"):
        BatchedFamily(tasks.get("omniglot", data_dir=str(tmp_path)))
