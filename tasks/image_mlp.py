"""Multilayer perceptrons on small images: scikit-learn's digits; MNIST and Fashion-MNIST by file or download."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from learned_opt.task import Tensors
from tasks.data.images import check_dataset, load_split_images
from tasks.data.rows import RowSplit
from tasks.supervised import MLP_NORMS, SupervisedFamily, apply_mlp, check_network, init_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMLP(SupervisedFamily):
    """Cross-entropy of an MLP classifier on mini-batches of images, pixels in [0, 1].

    A task is a random initialization and a random order of mini-batches. Meta-train, meta-validation and meta-test
    tasks use disjoint rows of the data set (`tasks.data.rows.split_rows`). Reference: ln 10 = 2.303 is the loss of a
    uniform guess; 0 is the infimum. Parameters are those of `tasks.supervised.init_mlp`.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist".
        data_dir: folder with the data set's IDX files; empty to use scikit-learn's copy or download.
        meta_test_from: 0 for a fixed random split of the rows; otherwise rows keep their order and those from this
            number on are meta-test, for example 8000 of the 10,000 rows of MNIST's t10k files.
        hidden: widths of the hidden layers, () for logistic regression.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" (weights N(0, init_scale²), biases 0) or "fan_in" (weights N(0, init_scale²/fan_in), biases 0).
        init_scale: see init.
        norm: "none", or "layer" for layer normalization before every activation, with a learned gain and shift per
            unit; it needs a hidden layer.
    """

    name: ClassVar[str] = "image_mlp"
    dataset: str = "digits"
    data_dir: str = ""
    meta_test_from: int = 0
    hidden: tuple[int, ...] = (20,)
    activation: str = "sigmoid"
    init: str = "normal"
    init_scale: float = 0.1
    norm: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_dataset(self.dataset, self.data_dir)
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        if self.norm not in MLP_NORMS:
            raise ValueError(f"norm must be one of {', '.join(MLP_NORMS)}; got {self.norm!r}")
        if self.norm != "none" and not self.hidden:
            raise ValueError(
                f"norm must be none without hidden layers, which are what it normalizes; got {self.norm!r}"
            )

    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        return load_split_images(self.dataset, self.data_dir, self.meta_test_from)

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        images, _, _ = self.load()
        widths = [images.shape[1], *self.hidden, self.num_outputs()]
        return init_mlp(widths, self.init, self.init_scale, generator, self.norm)

    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        return apply_mlp(params, self.activation, inputs)
