"""What families that learn from the rows of a shared data set have in common.

A subclass says where its rows come from (`load`), what its network is (`init_params`, `outputs`), and nothing else.
Tasks of one split train on that split's training rows; `eval_metrics` reports the loss, and for classes the accuracy,
on rows of the split that no task trains on.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors, check_split
from tasks.activations import ACTIVATIONS, Activation
from tasks.data.rows import RowSplit, draw_rows, test_rows

INITS = ("normal", "fan_in")
MLP_NORMS = ("none", "layer")
JUDGES = ("support", "query")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFamily(TaskFamily):
    """Loss of a network on mini-batches of rows: cross-entropy for integer targets, mean squared error for others.

    Attributes:
        batch_size: rows per mini-batch, drawn with replacement; at least 1.
        label_noise: share of the rows of each mini-batch whose class is replaced by a uniformly drawn one, in [0, 1];
            held-out rows keep theirs. Only for integer targets.
    """

    batch_size: int = 64
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")
        check_label_noise(self.label_noise)

    @abstractmethod
    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        """(inputs [rows, …], targets [rows, …], split), in the split's order; cached by whoever implements it."""

    @abstractmethod
    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        """What the network says to inputs [rows, …]: [rows, classes], or of the targets' shape."""

    def num_outputs(self) -> int:
        """Classes, or numbers per target."""
        _, targets, _ = self.load()
        if targets.is_floating_point():
            return targets[0].numel()
        return int(targets.max()) + 1

    def shared_data(self) -> Tensors:
        inputs, targets, _ = self.load()
        return {"inputs": inputs, "targets": targets}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        _, targets, rows = self.load()
        if self.label_noise and targets.is_floating_point():
            raise ValueError(f"label_noise needs integer targets, which {self.describe()} has not; set it to 0")
        return rows.ranges[check_split(split)].as_task()

    def draw_rows(self, task: Tensors, num_steps: int, generator: torch.Generator) -> torch.Tensor:
        """The row numbers [num_steps, batch_size] of mini-batches."""
        return draw_rows(task, num_steps, self.batch_size, generator)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        rows = self.draw_rows(task, num_steps, generator)
        if not self.label_noise:
            return {"rows": rows}
        _, targets, _ = self.load()
        return {"rows": rows, "targets": with_noise(targets[rows], self.num_outputs(), self.label_noise, generator)}

    def row_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss over rows."""
        if targets.is_floating_point():
            return F.mse_loss(outputs, targets)
        return cross_entropy(outputs, targets)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        targets = batch["targets"] if "targets" in batch else task["targets"][batch["rows"]]
        return self.row_loss(self.outputs(params, task, task["inputs"][batch["rows"]]), targets)

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" and, for classes, the "test_accuracy" in [0, 1], on the rows held out of the task."""
        _, _, split = self.load()
        rows = test_rows(task, split.num_test)
        targets = task["targets"][rows]
        outputs = self.outputs(params, task, task["inputs"][rows])
        metrics = {"test_loss": self.row_loss(outputs, targets)}
        if not targets.is_floating_point():
            metrics["test_accuracy"] = (outputs.argmax(-1) == targets).to(outputs.dtype).mean()
        return metrics


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of scores [rows, classes] and classes [rows].

    The log of the summed exponentials minus the target's score: the number that `F.cross_entropy` gives, and batched
    over tasks several times faster, since its log-softmax and masked mean are separate passes.
    """
    return (scores.logsumexp(-1) - scores.gather(-1, targets[:, None])[:, 0]).mean()


def check_label_noise(share: float) -> None:
    """Raise ValueError unless the share of noisy labels lies in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise must lie in [0, 1]; got {share}")


def with_noise(classes: torch.Tensor, num_classes: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """The classes, this share of them (in expectation) replaced by uniformly drawn ones, which may be the same."""
    random = torch.randint(num_classes, classes.shape, generator=generator)
    return torch.where(torch.rand(classes.shape, generator=generator) < share, random, classes)


def check_judge(judge: str) -> None:
    """Raise ValueError unless the rows that judge a few-shot task are one of `JUDGES`."""
    if judge not in JUDGES:
        raise ValueError(f"judge must be one of {', '.join(JUDGES)}; got {judge!r}")


def check_network(hidden: tuple[int, ...], activation: str, init: str, init_scale: float) -> None:
    """Raise ValueError naming the first of these arguments that is out of range."""
    if any(not isinstance(width, int) or width < 1 for width in hidden):
        raise ValueError(f"hidden widths must be at least 1; got {tuple(hidden)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if not init_scale > 0:
        raise ValueError(f"init_scale must be positive; got {init_scale}")


def init_mlp(
    widths: list[int], init: str, init_scale: float, generator: torch.Generator, norm: str = "none"
) -> Tensors:
    """Weights and biases of an MLP: "weight0" [widths[0], widths[1]], "bias0" [widths[1]], "weight1" and so on.

    Args:
        widths: inputs, hidden layers, outputs.
        init: "normal" (weights N(0, init_scale²), biases 0) or "fan_in" (weights N(0, init_scale²/fan_in), biases 0).
        init_scale: see init.
        generator: the source of randomness.
        norm: one of `MLP_NORMS`. "layer" adds for every hidden layer a gain "scale0" [widths[1]], 1, and a shift
            "shift0" [widths[1]], 0, and so on; the weights are those drawn without.
    """
    params: Tensors = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        scale = init_scale / (fan_in**0.5 if init == "fan_in" else 1.0)
        params[f"weight{i}"] = torch.randn(fan_in, fan_out, generator=generator) * scale
        params[f"bias{i}"] = torch.zeros(fan_out)
        if norm == "layer" and i < len(widths) - 2:
            params[f"scale{i}"], params[f"shift{i}"] = torch.ones(fan_out), torch.zeros(fan_out)
    return params


def apply_mlp(params: Tensors, activation: str | Activation, inputs: torch.Tensor) -> torch.Tensor:
    """Outputs [rows, widths[-1]] of the MLP that `init_mlp` made, its activation given by name or as a function.

    Layers with a gain are normalized over their units before the activation (Ba, Kiros and Hinton, 2016).
    """
    activate = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    x = inputs @ params["weight0"] + params["bias0"]
    for i in range(1, sum(name.startswith("weight") for name in params)):
        if f"scale{i - 1}" in params:
            x = F.layer_norm(x, x.shape[-1:]) * params[f"scale{i - 1}"] + params[f"shift{i - 1}"]
        x = activate(x) @ params[f"weight{i}"] + params[f"bias{i}"]
    return x
