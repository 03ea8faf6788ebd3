"""Few-shot classification of handwritten characters that no other split has seen (Vinyals et al., 2016)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool2d

from learned_opt.task import SPLITS, TaskFamily, Tensors, check_split
from tasks.data.omniglot import SIDE, load_omniglot
from tasks.data.rows import SPLIT_SHARES
from tasks.image_conv import apply_conv, check_conv, init_conv
from tasks.supervised import (
    apply_mlp,
    check_judge,
    check_label_noise,
    check_network,
    cross_entropy,
    init_mlp,
    with_noise,
)

SIDES = (28, 14, 7)
_NOISY = "noisy.classes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(TaskFamily):
    """Cross-entropy of a classifier on a few drawings of each of a few characters: N-way, K-shot.

    A task draws `num_ways` characters, and of each `num_shots` drawings to learn from and `num_queries` others. The
    loss is that of the former (the support), all at every step; `eval_metrics` reports the "test_loss" and the
    "test_accuracy" on the latter. A character belongs to one split: one fixed permutation deals 60 % of them to
    meta-train, 20 % to meta-validation and 20 % to meta-test. Reference: ln num_ways is the loss of a uniform guess and
    1/num_ways its accuracy; 0 is the infimum of the loss.

    Attributes:
        data_dir: folder with Omniglot's zip files (`tasks.data.omniglot`).
        num_ways: characters per task; at least 2.
        num_shots: drawings of each to learn from; at least 1.
        num_queries: held-out drawings of each; at least 1. A character has 20 drawings in all.
        side: of the square images in pixels: 28, or 14 or 7 for averages over squares of pixels.
        rotated: whether each character of a task is turned by 0, 90, 180 or 270 degrees, which makes four of one.
        channels: of the layers of a convolutional network (`tasks.image_conv.ImageConv`); () for an MLP.
        norm: of the convolutional network, "none", "layer" or "batch": over the support, or the queries, at hand.
        hidden: widths of the MLP's hidden layers; only without channels.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init_scale: weights are N(0, init_scale²/fan_in), biases 0; positive.
        judge: which drawings the meta-loss is of: "support", or "query" for what few-shot learning is after.
        label_noise: share of the support's classes that are replaced by uniformly drawn ones, anew at every step, in
            [0, 1]; the queries keep theirs.
    """

    name: ClassVar[str] = "omniglot"
    data_dir: str
    num_ways: int = 5
    num_shots: int = 1
    num_queries: int = 5
    side: int = SIDE
    rotated: bool = False
    channels: tuple[int, ...] = (16, 16, 16)
    norm: str = "batch"
    hidden: tuple[int, ...] = ()
    activation: str = "relu"
    init_scale: float = 1.4142135
    judge: str = "support"
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channels", "hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.data_dir:
            raise ValueError("data_dir must name a folder with Omniglot's zip files; got ''")
        check_judge(self.judge)
        check_label_noise(self.label_noise)
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(map(str, SIDES))}; got {self.side}")
        for name, least in (("num_ways", 2), ("num_shots", 1), ("num_queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.channels and self.hidden:
            raise ValueError(f"hidden is for an MLP, with channels=(); got {self.hidden} and channels={self.channels}")
        if self.channels:
            check_conv(self.channels, self.norm, self.activation, self.init_scale)
        check_network(self.hidden, self.activation, "fan_in", self.init_scale)

    def load(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(images [characters, drawings, pixels], per split the numbers of its characters); cached.

        Raises:
            ValueError: too few characters or drawings for such tasks, or what `load_omniglot` raises.
        """
        images, splits = _load(self.data_dir)
        fewest = min(len(numbers) for numbers in splits.values())
        if fewest < self.num_ways:
            raise ValueError(
                f"num_ways must be at most the characters of the smallest split, {fewest} of the {len(images)} in "
                f"{self.data_dir}; got {self.num_ways}"
            )
        if self.num_shots + self.num_queries > images.shape[1]:
            raise ValueError(
                f"num_shots + num_queries must be at most the drawings of a character, {images.shape[1]}; got "
                f"{self.num_shots} + {self.num_queries}"
            )
        return images, splits

    def shared_data(self) -> Tensors:
        images = self.load()[0]
        if self.side < SIDE:
            rows = images.reshape(-1, 1, SIDE, SIDE)
            images = avg_pool2d(rows, SIDE // self.side).reshape(*images.shape[:-1], self.side**2)
        pixels = torch.arange(self.side**2).view(self.side, self.side)
        turned = torch.stack([torch.rot90(pixels, turn).flatten() for turn in range(4)])
        return {"images": images, "turned": turned}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        images, splits = self.load()
        numbers = splits[check_split(split)]
        chosen = numbers[torch.randperm(len(numbers), generator=generator)[: self.num_ways]]
        used = self.num_shots + self.num_queries
        drawings = torch.stack(
            [torch.randperm(images.shape[1], generator=generator)[:used] for _ in range(self.num_ways)]
        )
        task = {"characters": chosen, "drawings": drawings}
        if self.rotated:
            task["turns"] = torch.randint(4, (self.num_ways,), generator=generator)
        return task

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        if self.channels:
            return init_conv(self.channels, self.num_ways, self.norm, self.init_scale, generator)
        return init_mlp([self.side**2, *self.hidden, self.num_ways], "fan_in", self.init_scale, generator)

    def rows(self, task: Tensors, drawings: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(images [rows, pixels], classes [rows]) of these drawings of every character of the task."""
        which = task["drawings"][:, drawings]
        images = task["images"][task["characters"][:, None], which]
        if self.rotated:
            pixels = task["turned"][task["turns"]]
            images = images.gather(-1, pixels[:, None].expand(images.shape))
        classes = torch.arange(self.num_ways, device=which.device).repeat_interleave(which.shape[1])
        return images.flatten(0, 1), classes

    def outputs(self, params: Tensors, images: torch.Tensor) -> torch.Tensor:
        """Scores [rows, num_ways] of images [rows, pixels]."""
        if self.channels:
            return apply_conv(params, self.norm, self.activation, images.reshape(-1, 1, self.side, self.side))
        return apply_mlp(params, self.activation, images)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        if not self.label_noise:
            return {}
        classes = torch.arange(self.num_ways).repeat_interleave(self.num_shots).expand(num_steps, -1)
        # The dot keeps wrappers from taking the classes alone for a mini-batch of rows.
        return {_NOISY: with_noise(classes, self.num_ways, self.label_noise, generator)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        images, classes = self.rows(task, slice(0, self.num_shots))
        classes = batch.get(_NOISY, classes)
        return cross_entropy(self.outputs(params, images), classes)

    def _query_rows(self, task: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows(task, slice(self.num_shots, self.num_shots + self.num_queries))

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        if self.judge == "support":
            return None
        images, classes = self._query_rows(task)
        return cross_entropy(self.outputs(params, images), classes)

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" and the "test_accuracy", in [0, 1], on the query drawings."""
        images, classes = self._query_rows(task)
        scores = self.outputs(params, images)
        accuracy = (scores.argmax(-1) == classes).to(scores.dtype).mean()
        return {"test_loss": cross_entropy(scores, classes), "test_accuracy": accuracy}


@functools.lru_cache(maxsize=2)
def _load(data_dir: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = load_omniglot(data_dir).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first = round(len(images) * SPLIT_SHARES[0])
    second = first + round(len(images) * SPLIT_SHARES[1])
    return images, dict(zip(SPLITS, (order[:first], order[first:second], order[second:])))
