"""Small convolutional networks on images, with and without normalization layers."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import Tensors
from tasks.activations import ACTIVATIONS
from tasks.data.images import check_dataset, load_split_images
from tasks.data.rows import RowSplit
from tasks.supervised import SupervisedFamily, check_network

NORMS = ("none", "layer", "batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConv(SupervisedFamily):
    """Cross-entropy of a convolutional classifier on mini-batches of square images, pixels in [0, 1].

    Every layer is a 3x3 convolution with padding, a normalization, an activation, and average pooling by 2 while the
    image is at least 2 pixels wide; then the mean over what is left of the image, and a linear layer. Reference: ln 10
    = 2.303 is the loss of a uniform guess; 0 is the infimum.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist".
        data_dir: folder with the data set's IDX files; see `tasks.image_mlp.ImageMLP`.
        meta_test_from: how rows are split; see `tasks.image_mlp.ImageMLP`.
        channels: of each layer, at least one.
        norm: "none"; "layer", over channels and pixels of each image; or "batch", per channel over the rows at hand,
            also in `eval_metrics`, so that no running statistics are kept. Both have a learned scale and shift per
            channel.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init_scale: weights are N(0, init_scale²/fan_in), biases 0; positive.
    """

    name: ClassVar[str] = "image_conv"
    dataset: str = "digits"
    data_dir: str = ""
    meta_test_from: int = 0
    channels: tuple[int, ...] = (8, 16)
    norm: str = "none"
    activation: str = "relu"
    init_scale: float = 1.4142135

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "channels", tuple(self.channels))
        check_dataset(self.dataset, self.data_dir)
        if not self.channels or any(c < 1 for c in self.channels):
            raise ValueError(f"channels must name at least one layer, each of at least 1; got {self.channels}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}")
        check_network((), self.activation, "fan_in", self.init_scale)
        if self.norm == "batch" and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 with norm='batch'; got {self.batch_size}")

    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        return load_split_images(self.dataset, self.data_dir, self.meta_test_from)

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        params: Tensors = {}
        fan_in = 1
        for i, width in enumerate(self.channels):
            scale = self.init_scale / math.sqrt(9 * fan_in)
            params[f"conv{i}"] = torch.randn(width, fan_in, 3, 3, generator=generator) * scale
            params[f"shift{i}"] = torch.zeros(width)
            if self.norm != "none":
                params[f"scale{i}"] = torch.ones(width)
            fan_in = width
        num_outputs = self.num_outputs()
        params["weight"] = torch.randn(fan_in, num_outputs, generator=generator) * (self.init_scale / math.sqrt(fan_in))
        params["bias"] = torch.zeros(num_outputs)
        return params

    def _normalize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        dims = (1, 2, 3) if self.norm == "layer" else (0, 2, 3)
        centered = x - x.mean(dims, keepdim=True)
        return centered * (centered.square().mean(dims, keepdim=True) + 1e-5).rsqrt() * scale[:, None, None]

    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(inputs.shape[-1])
        if side * side != inputs.shape[-1]:
            raise ValueError(f"image_conv needs square images; got {inputs.shape[-1]} pixels")
        x = inputs.reshape(-1, 1, side, side)
        for i in range(len(self.channels)):
            x = F.conv2d(x, params[f"conv{i}"], padding=1)
            if self.norm != "none":
                x = self._normalize(x, params[f"scale{i}"])
            x = ACTIVATIONS[self.activation](x + params[f"shift{i}"][:, None, None])
            if x.shape[-1] >= 2:
                x = F.avg_pool2d(x, 2)
        return x.mean((2, 3)) @ params["weight"] + params["bias"]
