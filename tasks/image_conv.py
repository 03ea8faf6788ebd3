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
    image is at least 2 pixels wide; then the mean over what is left of the image, and a linear layer. Parameters are
    "conv0" [channels, inputs, 3, 3], "shift0" [channels], with a normalization "scale0" [channels], and so on, then
    "weight" [channels, 10] and "bias" [10]. Reference: ln 10 = 2.303 is the loss of a uniform guess; 0 is the infimum.

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
        check_conv(self.channels, self.norm, self.activation, self.init_scale)
        if self.norm == "batch" and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 with norm='batch'; got {self.batch_size}")

    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        return load_split_images(self.dataset, self.data_dir, self.meta_test_from)

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return init_conv(self.channels, self.num_outputs(), self.norm, self.init_scale, generator)

    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(inputs.shape[-1])
        if side * side != inputs.shape[-1]:
            raise ValueError(f"image_conv needs square images; got {inputs.shape[-1]} pixels")
        return apply_conv(params, self.norm, self.activation, inputs.reshape(-1, 1, side, side))


def check_conv(channels: tuple[int, ...], norm: str, activation: str, init_scale: float) -> None:
    """Raise ValueError naming the first of these arguments that is out of range."""
    if not channels or any(c < 1 for c in channels):
        raise ValueError(f"channels must name at least one layer, each of at least 1; got {channels}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    check_network((), activation, "fan_in", init_scale)


def init_conv(
    channels: tuple[int, ...], num_outputs: int, norm: str, init_scale: float, generator: torch.Generator
) -> Tensors:
    """The parameters of a network as `ImageConv` describes it, in the order of its layers."""
    params: Tensors = {}
    fan_in = 1
    for i, width in enumerate(channels):
        scale = init_scale / math.sqrt(9 * fan_in)
        params[f"conv{i}"] = torch.randn(width, fan_in, 3, 3, generator=generator) * scale
        params[f"shift{i}"] = torch.zeros(width)
        if norm != "none":
            params[f"scale{i}"] = torch.ones(width)
        fan_in = width
    params["weight"] = torch.randn(fan_in, num_outputs, generator=generator) * (init_scale / math.sqrt(fan_in))
    params["bias"] = torch.zeros(num_outputs)
    return params


def apply_conv(params: Tensors, norm: str, activation: str, images: torch.Tensor) -> torch.Tensor:
    """What the network that `init_conv` made says to images [rows, 1, side, side]: [rows, outputs]."""
    x = images
    for i in range(sum(name.startswith("conv") for name in params)):
        x = F.conv2d(x, params[f"conv{i}"], padding=1)
        if norm != "none":
            x = _normalize(x, norm, params[f"scale{i}"])
        x = ACTIVATIONS[activation](x + params[f"shift{i}"][:, None, None])
        if x.shape[-1] >= 2:
            x = F.avg_pool2d(x, 2)
    return x.mean((2, 3)) @ params["weight"] + params["bias"]


def _normalize(x: torch.Tensor, norm: str, scale: torch.Tensor) -> torch.Tensor:
    dims = (1, 2, 3) if norm == "layer" else (0, 2, 3)
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + 1e-5).rsqrt() * scale[:, None, None]
