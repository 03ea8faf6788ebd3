"""Files of ratings, and the family of cold-start users on them."""

from __future__ import annotations

import pytest
import torch

import tasks
from learned_opt.task import SPLITS, draw_task, task_seed
from tasks.data.ratings import read_ratings
from tests.task_files import write_ratings

LINES = [("7", "b", 4.0), ("3", "a", 3.5), ("7", "a", 1.0), ("9", "c", 5.0)]


@pytest.mark.parametrize("header", [(), ("userId", "movieId", "rating")])
@pytest.mark.parametrize("rest", [(), ("964982703",)])
@pytest.mark.parametrize("separator", ["\t", "::", ","])
def test_every_public_format(tmp_path, separator, rest, header):
    rows = ([(*header, *(["timestamp"] if rest else []))] if header else []) + [(*line, *rest) for line in LINES]
    path = tmp_path / "ratings"
    path.write_text("\n".join(separator.join(map(str, row)) for row in rows) + "\n\n", encoding="utf-8")
    read = read_ratings(path)
    assert (read.user_names, read.item_names) == (("7", "3", "9"), ("b", "a", "c"))
    assert read.users.tolist() == [0, 1, 0, 2]
    assert read.items.tolist() == [0, 1, 1, 2]
    assert read.ratings.tolist() == [4.0, 3.5, 1.0, 5.0] and read.ratings.dtype == torch.float32


def test_quoted_fields_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(b'\xef\xbb\xbf"user","item","rating"\r\n"u 1","x",2\r\n"u 2","x",3\r\n')
    read = read_ratings(path)
    assert read.user_names == ("u 1", "u 2") and read.item_names == ("x",) and read.ratings.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have lines of user, item and rating, separated by tabs, '::' or commas; its first is ''"),
        (b"<!doctype html>\n", "separated by tabs, '::' or commas; its first is '<!doctype html>'"),
        (b"PK\x03\x04\xff\xfe", "is not a text file in UTF-8; unpack it if it is an archive"),
        (b"user,item,rating\n", "has no ratings"),
        (b"1,2,3\n1,3\n", "line 2: expected user, item and rating; got '1,3'"),
        (b"1,2,3\n1,,3\n", "line 2: expected user, item and rating; got '1,,3'"),
        (b"1,2,3\n1,3,good\n", "line 2: the rating must be a finite number; got 'good'"),
        (b"1,2,nan\n", "line 1: the rating must be a finite number; got 'nan'"),
        (b"1,2,3\n\n1,3,4\n1,2,5\n", "line 4: user 1 rated item 2 already in line 1; keep one of them"),
        (b"1\t2\t3\t4\n2,3,4,5\n", "line 2: expected user, item and rating; got '2,3,4,5'"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "u.data"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_ratings(path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a file; give one such as MovieLens' u.data"):
        read_ratings(tmp_path / "nowhere")


def test_users_belong_to_one_split_and_their_ratings_to_them(tmp_path):
    path = write_ratings(tmp_path / "u.data")
    family, raw = tasks.get("user_ratings", ratings_file=str(path), rank=3), read_ratings(path)
    data, _, _ = family.load()
    assert [data.num_groups(split) for split in SPLITS] == [9, 3, 3]
    assert sorted(user for split in SPLITS for user in data.labels[split]) == list(range(15))
    for split in SPLITS:
        for user, rows in zip(data.labels[split], data.ranges[split]):
            mine = slice(rows.first, rows.first + rows.num_train + rows.num_test)
            got = set(zip(data.inputs[mine].tolist(), data.targets[mine].tolist()))
            assert got == {(int(i), float(r)) for u, i, r in zip(raw.users, raw.items, raw.ratings) if u == user}


def test_items_are_described_by_what_meta_train_trains_on_alone(tmp_path):
    path = write_ratings(tmp_path / "u.data")
    family, raw = tasks.get("user_ratings", ratings_file=str(path), rank=3), read_ratings(path)
    data, means, features = family.load()
    matrix = torch.full((9, 20), float("nan"), dtype=torch.float64)
    for number, rows in enumerate(data.ranges["meta_train"]):
        matrix[number, data.inputs[rows.train]] = data.targets[rows.train].double()
    center, known = matrix.nanmean(), matrix.isfinite()
    offsets = (matrix - center).nansum(0) / (known.sum(0) + 5)
    torch.testing.assert_close(means, (center + offsets).float())
    torch.testing.assert_close(features[:, 0], offsets.float())
    _, _, right = torch.linalg.svd((matrix - center - offsets).nan_to_num(0))
    overlap = right[:3] @ features[:, 1:].double() / 20**0.5  # the same vectors up to sign and order
    torch.testing.assert_close(overlap.abs().round(), torch.eye(3, dtype=torch.float64))
    assert len(raw.item_names) == 20


def test_loss_and_metrics_in_closed_form(tmp_path):
    path = write_ratings(tmp_path / "u.data", separator="::")
    family = tasks.get("user_ratings", ratings_file=str(path), rank=2, weight_decay=0.3, batch_size=4)
    data, means, features = family.load()
    for split in SPLITS:
        task, params = draw_task(family, split, task_seed(split, 0))
        everything = {**task, **family.shared_data()}
        params = {"weight0": torch.tensor([[0.5], [-1.0], [0.25]]), "bias0": torch.tensor([0.2])}
        rows = family.sample_batches(task, 1, torch.Generator().manual_seed(0))["rows"][0]
        predicted = means + features @ params["weight0"][:, 0] + 0.2
        items, wanted = data.inputs, data.targets
        squared = (predicted[items[rows]] - wanted[rows]).square().mean()
        penalty = 0.15 * (0.25 + 1.0 + 0.0625 + 0.04)
        torch.testing.assert_close(family.loss(params, everything, {"rows": rows}), squared + penalty)
        held_out = int(task["first_row"] + task["num_rows"]) + torch.arange(int(task["num_test"]))
        assert not set(held_out.tolist()) & set(rows.tolist())
        metrics = family.eval_metrics(params, everything)
        torch.testing.assert_close(
            metrics["test_loss"], (predicted[items[held_out]] - wanted[held_out]).square().mean()
        )
        torch.testing.assert_close(
            metrics["item_mean_loss"], (means[items[held_out]] - wanted[held_out]).square().mean()
        )


def test_the_factors_help_with_users_never_seen(tmp_path):
    """The file has two tastes: fitted to their training ratings, meta-test users are predicted beyond item means."""
    path = write_ratings(tmp_path / "u.data", num_users=60)
    family = tasks.get("user_ratings", ratings_file=str(path), rank=1)
    shared, gains = family.shared_data(), []
    for user in family.load()[0].ranges["meta_test"]:
        task = {**user.as_task(), "num_test": torch.tensor(user.num_test), **shared}
        rows = torch.arange(user.train.start, user.train.stop)
        x = torch.cat([shared["item_features"][shared["items"][rows]], torch.ones(len(rows), 1)], 1)
        y = shared["ratings"][rows] - shared["item_means"][shared["items"][rows]]
        solution = torch.linalg.solve(x.T @ x + 0.05 * len(rows) / 2 * torch.eye(3), x.T @ y)
        metrics = family.eval_metrics({"weight0": solution[:2, None], "bias0": solution[2:]}, task)
        gains.append(float(metrics["item_mean_loss"] - metrics["test_loss"]))
    assert sum(gains) / len(gains) > 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratings_file": ""}, "ratings_file must name a file of ratings, such as MovieLens' u.data; got ''"),
        ({"min_ratings": 1}, "min_ratings must be at least 2; got 1"),
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"weight_decay": -1.0}, "weight_decay must be non-negative; got -1.0"),
        ({"activation": "step"}, "activation must be one of"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("user_ratings", **{"ratings_file": "u.data", **fields})


def test_the_file_must_be_named():
    with pytest.raises(ValueError, match="task family 'user_ratings' needs ratings_file; see the description of its"):
        tasks.get("user_ratings")


def test_files_that_are_too_small(tmp_path):
    path = write_ratings(tmp_path / "u.data")
    with pytest.raises(ValueError, match="rank must be at most the number of items, 20; got 21"):
        tasks.get("user_ratings", ratings_file=str(path), rank=21).load()
    with pytest.raises(ValueError, match="at least 3 users with min_ratings = 12 ratings or more.*it has 0. Lower"):
        tasks.get("user_ratings", ratings_file=str(path), min_ratings=12).load()
