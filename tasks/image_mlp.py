"""Multilayer perceptrons on small images: digits from scikit-learn out of the box, MNIST and Fashion-MNIST from files or download."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors, check_split
from tasks.data.images import load_images, split_rows

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMLP(TaskFamily):
    """Cross-entropy of an MLP classifier on mini-batches of images.

    A task is a random initialization and a random order of mini-batches. Meta-train, meta-validation and meta-test tasks use
    disjoint rows of the data set (`tasks.data.images.split_rows`).

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist".
        data_dir: folder with the data set's IDX files; empty to use scikit-learn's copy or download.
        hidden: widths of the hidden layers, () for logistic regression.
        activation: one of `ACTIVATIONS`.
        batch_size: rows per mini-batch, drawn with replacement.
        init: "normal" (weights N(0, init_scale²), biases 0) or "fan_in" (weights N(0, init_scale²/fan_in), biases 0).
        init_scale: see init.
    """

    name: ClassVar[str] = "image_mlp"
    dataset: str = "digits"
    data_dir: str = ""
    hidden: tuple[int, ...] = (20,)
    activation: str = "sigmoid"
    batch_size: int = 64
    init: str = "normal"
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        if self.init not in ("normal", "fan_in"):
            raise ValueError(f"init must be normal or fan_in; got {self.init!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be at least 1; got {self.hidden}")
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {self.init_scale}")
        object.__setattr__(self, "hidden", tuple(self.hidden))

    def shared_data(self) -> Tensors:
        images, labels = load_images(self.dataset, self.data_dir)
        return {"images": images, "labels": labels}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        images, _ = load_images(self.dataset, self.data_dir)
        return {"rows": split_rows(len(images))[check_split(split)]}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        images, labels = load_images(self.dataset, self.data_dir)
        widths = [images.shape[1], *self.hidden, int(labels.max()) + 1]
        params: Tensors = {}
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
            scale = self.init_scale / (fan_in**0.5 if self.init == "fan_in" else 1.0)
            params[f"weight{i}"] = torch.randn(fan_in, fan_out, generator=generator) * scale
            params[f"bias{i}"] = torch.zeros(fan_out)
        return params

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        chosen = torch.randint(len(task["rows"]), (num_steps, self.batch_size), generator=generator)
        return {"rows": task["rows"].cpu()[chosen]}

    def logits(self, params: Tensors, images: torch.Tensor) -> torch.Tensor:
        """Class scores [rows, classes] of flattened images [rows, pixels]."""
        activate = ACTIVATIONS[self.activation]
        x = images @ params["weight0"] + params["bias0"]
        for i in range(1, len(self.hidden) + 1):
            x = activate(x) @ params[f"weight{i}"] + params[f"bias{i}"]
        return x

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        logits = self.logits(params, task["images"][batch["rows"]])
        return F.cross_entropy(logits, task["labels"][batch["rows"]])
