"""Matrix factorization of ratings, one model per site, many of its users hardly seen; generated with known factors."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation(TaskFamily):
    """Regularized squared error of predicted ratings.

    The loss is the mean over a mini-batch of (r − μ − bᵤ − cᵢ − pᵤ · qᵢ)² plus a penalty. A task is one site: true
    factors of variance 1/√rank, so that their products have variance 1, and biases N(0, 0.3²) give every user's
    rating of every item, with noise N(0, noise²). The site has seen `num_ratings` of them, none twice; users differ
    in how many are theirs, about as 1/k for the k-th most active one, so many are cold starts. `eval_metrics` reports
    the "test_loss" (squared error without penalty) on as many other ratings. Parameters are "mean" [], "user_bias"
    [num_users], "item_bias" [num_items], "users" [num_users, rank] and "items" [num_items, rank]. Source of the model:
    Koren, Bell and Volinsky, 2009. Reference: noise² is the expected loss
    of the true factors, about 1.18 + noise² that of predicting the mean.

    Attributes:
        num_users: at least 1.
        num_items: at least 1.
        rank: length of the factors, true and learned; at least 1.
        num_ratings: that the site has seen; at least 1, at most half of all pairs of users and items.
        batch_size: ratings per mini-batch, drawn with replacement; at least 1.
        noise: standard deviation of the ratings' noise; at least 0.
        weight_decay: times the batch's mean of ½ (|pᵤ|² + |qᵢ|² + bᵤ² + cᵢ²); at least 0.
        init_scale: factors start at N(0, init_scale²), biases at 0; positive.
    """

    name: ClassVar[str] = "recommendation"
    num_users: int = 100
    num_items: int = 50
    rank: int = 2
    num_ratings: int = 800
    batch_size: int = 64
    noise: float = 0.3
    weight_decay: float = 0.05
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_users", "num_items", "rank", "num_ratings", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if 2 * self.num_ratings > self.num_users * self.num_items:
            raise ValueError(
                f"num_ratings must be at most half of num_users · num_items = {self.num_users * self.num_items}, since "
                f"as many are held out; got {self.num_ratings}"
            )
        for name in ("noise", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be non-negative; got {getattr(self, name)}")
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {self.init_scale}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * scale

        scale = self.rank**-0.25
        factors = normal(self.num_users, self.rank, scale=scale) @ normal(self.num_items, self.rank, scale=scale).T
        truth = factors + normal(self.num_users, 1, scale=0.3) + normal(1, self.num_items, scale=0.3)
        activity = 1 / (1 + torch.randperm(self.num_users, generator=generator).float())
        weights = activity.repeat_interleave(self.num_items)
        # Drawn without repetition, heavy ones come first: shuffled, so that those held out are like those seen.
        drawn = torch.multinomial(weights, 2 * self.num_ratings, generator=generator)
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        users, items = drawn // self.num_items, drawn % self.num_items
        ratings = truth[users, items] + normal(len(drawn), scale=self.noise)
        return {"users": users, "items": items, "ratings": ratings}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {
            "mean": torch.zeros(()),
            "user_bias": torch.zeros(self.num_users),
            "item_bias": torch.zeros(self.num_items),
            "users": torch.randn(self.num_users, self.rank, generator=generator) * self.init_scale,
            "items": torch.randn(self.num_items, self.rank, generator=generator) * self.init_scale,
        }

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        return {"seen": torch.randint(self.num_ratings, (num_steps, self.batch_size), generator=generator)}

    def _errors(self, params: Tensors, task: Tensors, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(squared errors, penalties) of the ratings with these numbers."""
        users, items = task["users"][which], task["items"][which]
        p, q = params["users"][users], params["items"][items]
        b, c = params["user_bias"][users], params["item_bias"][items]
        errors = (task["ratings"][which] - params["mean"] - b - c - (p * q).sum(-1)).square()
        return errors, 0.5 * (p.square().sum(-1) + q.square().sum(-1) + b.square() + c.square())

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        errors, penalties = self._errors(params, task, batch["seen"])
        return errors.mean() + self.weight_decay * penalties.mean()

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" on ratings that the site has not seen."""
        unseen = torch.arange(self.num_ratings, 2 * self.num_ratings, device=task["users"].device)
        return {"test_loss": self._errors(params, task, unseen)[0].mean()}
