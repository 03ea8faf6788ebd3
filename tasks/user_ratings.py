"""Cold-start users: one task per user of a file of ratings, from which little is known of each."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors, check_split
from tasks.data.grouped import GroupedData
from tasks.data.ratings import read_ratings
from tasks.data.rows import draw_rows
from tasks.supervised import apply_mlp, check_network, init_mlp

_PRIOR_RATINGS = 5.0
_POWER_STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserRatings(TaskFamily):
    """Regularized squared error of one user's ratings, predicted from what is known of the items.

    A user's rating of item i is predicted as mᵢ + f(xᵢ): mᵢ is the item's mean rating (drawn to the mean of all ratings
    where there are few), xᵢ has mᵢ's difference from that mean and the item's factors, and f is the user's own network,
    by default linear: the user's half of a matrix factorization. Means and factors are computed once, from ratings that
    meta-train tasks train on and no others. A user belongs with all ratings to one split (60 % meta-train, 20 %
    meta-validation, 20 % meta-test), and a quarter of them is held out; `eval_metrics` reports the "test_loss" (squared
    error without penalty) on those. Parameters are those of `tasks.supervised.init_mlp`, by default "weight0" [1 +
    rank, 1] and "bias0" [1]. Reference: the "item_mean_loss" beside it is that of f = 0.

    Attributes:
        ratings_file: lines of user, item, rating and anything more, as in MovieLens' u.data, ratings.dat or
            ratings.csv (`tasks.data.ratings`).
        min_ratings: users with fewer are left out; at least 2.
        rank: factors per item; at least 1, at most the number of items.
        hidden: widths of the network's hidden layers.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init_scale: weights start at N(0, init_scale²/fan_in), biases at 0; positive.
        batch_size: ratings per mini-batch, drawn with replacement from the user's; at least 1.
        weight_decay: times ½ |parameters|²; at least 0.
    """

    name: ClassVar[str] = "user_ratings"
    ratings_file: str
    min_ratings: int = 8
    rank: int = 8
    hidden: tuple[int, ...] = ()
    activation: str = "tanh"
    init_scale: float = 0.1
    batch_size: int = 16
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_network(self.hidden, self.activation, "fan_in", self.init_scale)
        if not self.ratings_file:
            raise ValueError("ratings_file must name a file of ratings, such as MovieLens' u.data; got ''")
        for name, least in (("min_ratings", 2), ("rank", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be non-negative; got {self.weight_decay}")

    def load(self) -> tuple[GroupedData, torch.Tensor, torch.Tensor]:
        """(items and ratings grouped by user, item means [items], item features [items, 1 + rank]); cached."""
        return _load(self.ratings_file, self.min_ratings, self.rank)

    def shared_data(self) -> Tensors:
        data, means, features = self.load()
        return {"items": data.inputs, "ratings": data.targets, "item_means": means, "item_features": features}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        ranges = self.load()[0].ranges[check_split(split)]
        user = ranges[int(torch.randint(len(ranges), (), generator=generator))]
        return {**user.as_task(), "num_test": torch.tensor(user.num_test)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return init_mlp([1 + self.rank, *self.hidden, 1], "fan_in", self.init_scale, generator)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        return {"rows": draw_rows(task, num_steps, self.batch_size, generator)}

    def _predict(self, params: Tensors, task: Tensors, rows: torch.Tensor) -> torch.Tensor:
        """What the network adds to the item means of these rows."""
        return apply_mlp(params, self.activation, task["item_features"][task["items"][rows]])[:, 0]

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        rows = batch["rows"]
        wanted = task["ratings"][rows] - task["item_means"][task["items"][rows]]
        penalty = torch.stack([value.square().sum() for value in params.values()]).sum()
        return (self._predict(params, task, rows) - wanted).square().mean() + 0.5 * self.weight_decay * penalty

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" on ratings held out of the task, and the "item_mean_loss" of predicting the item means.

        Users hold out different numbers of ratings and are evaluated together, so short ones are padded with rows of
        their own that do not count.
        """
        index = torch.arange(self.load()[0].most_test, device=task["num_test"].device)
        rows = task["first_row"] + task["num_rows"] + index % task["num_test"]
        wanted = task["ratings"][rows] - task["item_means"][task["items"][rows]]

        def mean(errors: torch.Tensor) -> torch.Tensor:
            return torch.where(index < task["num_test"], errors.square(), 0.0).sum() / task["num_test"]

        return {"test_loss": mean(self._predict(params, task, rows) - wanted), "item_mean_loss": mean(wanted)}


@functools.lru_cache(maxsize=4)
def _load(ratings_file: str, min_ratings: int, rank: int) -> tuple[GroupedData, torch.Tensor, torch.Tensor]:
    ratings = read_ratings(ratings_file)
    if rank > len(ratings.item_names):
        raise ValueError(f"rank must be at most the number of items, {len(ratings.item_names)}; got {rank}")
    kept = torch.bincount(ratings.users)[ratings.users] >= min_ratings
    num_users = len(ratings.users[kept].unique())
    if num_users < 3:
        raise ValueError(
            f"{ratings_file} must have at least 3 users with min_ratings = {min_ratings} ratings or more, one for each "
            f"split; it has {num_users}. Lower min_ratings or use more data"
        )
    data = GroupedData(ratings.items[kept], ratings.ratings[kept], ratings.users[kept])
    means, features = _describe_items(data, len(ratings.item_names), rank)
    return data, means, features


def _describe_items(data: GroupedData, num_items: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(means [items], features [items, 1 + rank]) from the rows that meta-train tasks train on.

    The factors are the leading right singular vectors of what the means leave over (missing ratings count as 0), times
    √items; found by orthogonal iteration, for which the matrix stays sparse.
    """
    ranges = data.ranges["meta_train"]
    rows = torch.cat([torch.arange(r.train.start, r.train.stop) for r in ranges])
    users = torch.repeat_interleave(torch.arange(len(ranges)), torch.tensor([r.num_train for r in ranges]))
    items, ratings = data.inputs[rows], data.targets[rows].double()
    center = ratings.mean()
    counts = torch.bincount(items, minlength=num_items)
    offsets = torch.bincount(items, ratings - center, minlength=num_items) / (counts + _PRIOR_RATINGS)
    left = torch.sparse_coo_tensor(
        torch.stack([users, items]),
        ratings - center - offsets[items],
        (len(ranges), num_items),
        check_invariants=True,  # said explicitly, since torch warns of either choice when it is left open
    ).coalesce()
    factors = torch.randn(num_items, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_STEPS):
        factors = torch.linalg.qr(left.T @ (left @ factors)).Q
    features = torch.cat([offsets[:, None], factors * num_items**0.5], dim=1)
    return (center + offsets).float(), features.float()
