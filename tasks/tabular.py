"""Small networks on real tables, each task with its own features and rows: one model per customer, ward or site."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from learned_opt.task import Tensors, check_split
from tasks.data.rows import RowSplit
from tasks.data.tabular import TABLES, load_table
from tasks.supervised import SupervisedFamily, apply_mlp, check_network, init_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(SupervisedFamily):
    """Loss of an MLP on a random subset of a real table's features and rows.

    Cross-entropy for the classes of breast_cancer (2), wine (3) and digits (10), mean squared error of the standardized
    target for diabetes. A task draws which features it sees, which of its split's rows it trains on, and its
    initial parameters, which are those of `tasks.supervised.init_mlp`. Reference: a uniform guess has the log of the
    number of classes, predicting the mean of diabetes about 1; 0 is the infimum. Sources: Wolberg, Street and
    Mangasarian, 1993 (breast cancer); Forina et al., 1991 (wine); Efron et al., 2004 (diabetes); Alpaydin and Kaynak,
    1998 (digits); all as scikit-learn ships them.

    Attributes:
        dataset: one of `tasks.data.tabular.TABLES`.
        num_features: features per task, without repetition; 0 for half of the table's, rounded up.
        num_rows: rows a task trains on, without repetition; 0 for half of the smallest split's training rows.
        hidden: widths of the hidden layers, () for a linear model.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" or "fan_in"; see `tasks.supervised.init_mlp`.
        init_scale: see init.
    """

    name: ClassVar[str] = "tabular"
    dataset: str = "breast_cancer"
    num_features: int = 0
    num_rows: int = 0
    batch_size: int = 16
    hidden: tuple[int, ...] = (16,)
    activation: str = "tanh"
    init: str = "fan_in"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.dataset not in TABLES:
            raise ValueError(f"dataset must be one of {', '.join(TABLES)}; got {self.dataset!r}")
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        for name in ("num_features", "num_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be non-negative; got {getattr(self, name)}")

    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        return load_table(self.dataset)

    def _sizes(self) -> tuple[int, int]:
        """(features, rows) of a task."""
        inputs, _, split = self.load()
        fewest = min(rows.num_train for rows in split.ranges.values())
        if self.num_features > inputs.shape[1]:
            raise ValueError(
                f"num_features must be at most {inputs.shape[1]} for {self.dataset}; got {self.num_features}"
            )
        if self.num_rows > fewest:
            raise ValueError(f"num_rows must be at most {fewest} for {self.dataset}; got {self.num_rows}")
        return self.num_features or (inputs.shape[1] + 1) // 2, self.num_rows or fewest // 2

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        inputs, _, rows = self.load()
        num_features, num_rows = self._sizes()
        ours = rows.ranges[check_split(split)]
        own = ours.first + torch.randperm(ours.num_train, generator=generator)[:num_rows]
        columns = torch.randperm(inputs.shape[1], generator=generator)[:num_features]
        return {**super().sample_task(split, generator), "own_rows": own, "columns": columns.sort().values}

    def draw_rows(self, task: Tensors, num_steps: int, generator: torch.Generator) -> torch.Tensor:
        own = task["own_rows"].cpu()
        return own[torch.randint(len(own), (num_steps, self.batch_size), generator=generator)]

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        widths = [len(task["columns"]), *self.hidden, self.num_outputs()]
        return init_mlp(widths, self.init, self.init_scale, generator)

    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        return apply_mlp(params, self.activation, inputs[:, task["columns"]])
