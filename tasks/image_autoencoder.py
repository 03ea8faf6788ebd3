"""Autoencoders of small images, plain and variational."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors, check_split
from tasks.data.images import check_dataset, load_split_images
from tasks.data.rows import draw_rows, test_rows
from tasks.supervised import apply_mlp, check_network, init_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageAutoencoder(TaskFamily):
    """Reconstruction of images, pixels in [0, 1], through a narrow code: mean binary cross-entropy per pixel.

    Encoder and decoder are MLPs with mirrored hidden layers. With `variational`, the encoder says mean and log variance
    of a Gaussian code, the decoder sees a draw from it, and the loss is the negative evidence lower bound divided by
    the number of pixels (Kingma and Welling, 2014). `eval_metrics` reports the "test_loss" on rows held out of the
    tasks, where the code is its mean. Parameters are those of `tasks.supervised.init_mlp` for each of the two, named
    "encoder.weight0" and so on; a variational encoder has twice the code's length of outputs. Reference: ln 2 = 0.693
    per pixel is the loss of a decoder that says one half everywhere; since pixels are shades, the infimum is the mean
    entropy of the pixels and not 0.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist".
        data_dir: folder with the data set's IDX files; see `tasks.image_mlp.ImageMLP`.
        meta_test_from: how rows are split; see `tasks.image_mlp.ImageMLP`.
        batch_size: rows per mini-batch, drawn with replacement; at least 1.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        code: length of the code; at least 1.
        variational: see above.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" or "fan_in"; see `tasks.supervised.init_mlp`.
        init_scale: see init.
    """

    name: ClassVar[str] = "image_autoencoder"
    dataset: str = "digits"
    data_dir: str = ""
    meta_test_from: int = 0
    batch_size: int = 64
    hidden: tuple[int, ...] = (32,)
    code: int = 8
    variational: bool = False
    activation: str = "tanh"
    init: str = "fan_in"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_dataset(self.dataset, self.data_dir)
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        for name in ("batch_size", "code"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def _images(self) -> torch.Tensor:
        return load_split_images(self.dataset, self.data_dir, self.meta_test_from)[0]

    def shared_data(self) -> Tensors:
        return {"inputs": self._images()}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        _, _, rows = load_split_images(self.dataset, self.data_dir, self.meta_test_from)
        return rows.ranges[check_split(split)].as_task()

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        pixels = self._images().shape[1]
        encoder = [pixels, *self.hidden, self.code * (2 if self.variational else 1)]
        decoder = [self.code, *reversed(self.hidden), pixels]
        return {
            f"{part}.{name}": value
            for part, widths in (("encoder", encoder), ("decoder", decoder))
            for name, value in init_mlp(widths, self.init, self.init_scale, generator).items()
        }

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        batches = {"rows": draw_rows(task, num_steps, self.batch_size, generator)}
        if self.variational:
            batches["noise"] = torch.randn(num_steps, self.batch_size, self.code, generator=generator)
        return batches

    def _apply(self, part: str, params: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        own = {name.removeprefix(f"{part}."): value for name, value in params.items() if name.startswith(f"{part}.")}
        return apply_mlp(own, self.activation, inputs)

    def _loss(self, params: Tensors, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        code = self._apply("encoder", params, images)
        divergence = torch.zeros((), dtype=code.dtype, device=code.device)
        if self.variational:
            code, log_variance = code.chunk(2, dim=-1)
            divergence = 0.5 * (code.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / images.shape[-1]
            if noise is not None:
                code = code + noise * (0.5 * log_variance).exp()
        return F.binary_cross_entropy_with_logits(self._apply("decoder", params, code), images) + divergence

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self._loss(params, task["inputs"][batch["rows"]], batch.get("noise"))

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" on the rows held out of the task."""
        _, _, split = load_split_images(self.dataset, self.data_dir, self.meta_test_from)
        return {"test_loss": self._loss(params, task["inputs"][test_rows(task, split.num_test)], None)}
