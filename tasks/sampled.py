"""Sampled architectures: drawn activation, initialization scale, batch size, depth and width.

A family has one shape, so that its tasks run as one program. What does not change the shape is drawn per task, by
`SampledMLP`; depth and width are drawn once, by `sample_families`, which makes a family of every drawn shape. All tasks
of one shape are then batched together, and a meta-trainer that is given the families goes from shape to shape.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors
from tasks.activations import ACTIVATIONS
from tasks.data.images import check_dataset, load_split_images
from tasks.data.rows import RowSplit
from tasks.supervised import SupervisedFamily, apply_mlp, check_network, init_mlp

SHAPE_FIELDS = ("hidden", "channels")
"""The fields that `depth` and `width` fill, whichever a family has."""
_DRAWS_PER_FAMILY = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledMLP(SupervisedFamily):
    """Cross-entropy of an MLP classifier on images, whose activation, initialization and batch size are the task's own.

    A task draws its activation uniformly from `activations`, the scale of its initial weights (N(0, scale²/fan_in),
    biases 0) log-uniformly from `init_scales`, and its rows per mini-batch log-uniformly from `least_batch_size` to
    `batch_size`. Every activation is computed for every task and one of them used, and `batch_size` rows are computed
    of which the task's own count, so a step costs the same for all. Parameters are those of
    `tasks.supervised.init_mlp`. Reference: ln 10 = 2.303 is the loss of a uniform guess; 0 is the infimum.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist".
        data_dir: folder with the data set's IDX files; see `tasks.image_mlp.ImageMLP`.
        meta_test_from: how rows are split; see `tasks.image_mlp.ImageMLP`.
        hidden: widths of the hidden layers, the same for all tasks; at least one.
        activations: some of `tasks.activations.ACTIVATIONS`, none twice.
        init_scales: least and largest scale, positive.
        least_batch_size: at least 1, at most `batch_size`.
    """

    name: ClassVar[str] = "image_mlp_sampled"
    dataset: str = "digits"
    data_dir: str = ""
    meta_test_from: int = 0
    hidden: tuple[int, ...] = (20,)
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    init_scales: tuple[float, float] = (0.5, 2.0)
    least_batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "activations", "init_scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_dataset(self.dataset, self.data_dir)
        if not self.hidden:
            raise ValueError("hidden must name at least one layer, whose activation can be drawn; got ()")
        if not self.activations or len(set(self.activations)) < len(self.activations):
            raise ValueError(f"activations must name at least one, and none twice; got {self.activations}")
        for activation in self.activations:
            check_network(self.hidden, activation, "fan_in", 1.0)
        if len(self.init_scales) != 2 or not 0 < self.init_scales[0] <= self.init_scales[1] < math.inf:
            raise ValueError(f"init_scales must be two positive numbers, the least first; got {self.init_scales}")
        if not 1 <= self.least_batch_size <= self.batch_size:
            raise ValueError(
                f"least_batch_size must lie between 1 and batch_size ({self.batch_size}); got {self.least_batch_size}"
            )

    def load(self) -> tuple[torch.Tensor, torch.Tensor, RowSplit]:
        return load_split_images(self.dataset, self.data_dir, self.meta_test_from)

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        task = super().sample_task(split, generator)
        activation = torch.randint(len(self.activations), (), generator=generator)
        scale, size = (float(u) for u in torch.rand(2, generator=generator, dtype=torch.float64))
        least, most = self.init_scales
        batch_rows = _between(self.least_batch_size, self.batch_size, size)
        return {
            **task,
            "activation": activation,
            "init_scale": torch.tensor(least * (most / least) ** scale),
            "batch_rows": torch.tensor(batch_rows),
        }

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        images, _, _ = self.load()
        widths = [images.shape[1], *self.hidden, self.num_outputs()]
        return init_mlp(widths, "fan_in", float(task["init_scale"]), generator)

    def outputs(self, params: Tensors, task: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        def activate(x: torch.Tensor) -> torch.Tensor:
            y = ACTIVATIONS[self.activations[0]](x)
            for i, name in enumerate(self.activations[1:], start=1):
                y = torch.where(task["activation"] == i, ACTIVATIONS[name](x), y)
            return y

        return apply_mlp(params, activate, inputs)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        targets = batch["targets"] if "targets" in batch else task["targets"][batch["rows"]]
        scores = self.outputs(params, task, task["inputs"][batch["rows"]])
        losses = scores.logsumexp(-1) - scores.gather(-1, targets[:, None])[:, 0]
        counts = torch.arange(self.batch_size, device=losses.device) < task["batch_rows"]
        return torch.where(counts, losses, 0.0).sum() / task["batch_rows"]


def sample_families(
    name: str, ranges: Mapping[str, Sequence[Any]], num: int, seed: int, **config: Any
) -> dict[str, TaskFamily]:
    """Families of one name with sampled fields, for example MLPs of different depth and width.

    Args:
        name: a name in `tasks.FAMILIES`.
        ranges: what to draw. "depth": (least, most) layers, uniform; "width": (least, most) of each layer, log-uniform,
            which must come with "depth" and fill the family's field `hidden` or `channels`. Any other key is a field
            of the family, drawn uniformly from the given choices.
        num: how many different families; at least 1.
        seed: of the draws, non-negative; the same seed, the same families.
        **config: the fields that are not drawn.

    Returns:
        What was drawn, such as "32-8" or "32-8 activation=relu", -> family, in the order drawn.

    Raises:
        ValueError: an unknown name or field, a range that is none, or ranges with fewer than `num` different draws.
    """
    import tasks  # the table of names holds this module's class, so it is complete only after this import

    for argument, value in (("num", num), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{argument} must be an integer; got {value!r}")
    if num < 1:
        raise ValueError(f"num must be at least 1; got {num}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    tasks.get(name, **config)  # names and fields are wrong here or nowhere
    field = next((f for f in SHAPE_FIELDS if f in inspect.signature(tasks.FAMILIES[name]).parameters), None)
    _check_ranges(name, ranges, field, config)
    choices = {key: list(values) for key, values in ranges.items() if key not in ("depth", "width")}
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    families: dict[str, TaskFamily] = {}
    for _ in range(_DRAWS_PER_FAMILY * num):
        drawn: dict[str, Any] = {key: values[int(uniform() * len(values))] for key, values in choices.items()}
        label = [f"{key}={value}" for key, value in drawn.items()]
        if field is not None and "depth" in ranges:
            least, most = ranges["width"]
            depth = int(ranges["depth"][0] + uniform() * (ranges["depth"][1] - ranges["depth"][0] + 1))
            drawn[field] = tuple(_between(least, most, uniform()) for _ in range(depth))
            label.insert(0, "-".join(map(str, drawn[field])))
        families.setdefault(" ".join(label), tasks.get(name, **config, **drawn))
        if len(families) == num:
            return families
    raise ValueError(f"ranges must allow num = {num} different draws; they gave {len(families)}. Widen them")


def _check_ranges(name: str, ranges: Mapping[str, Sequence[Any]], field: str | None, config: Mapping[str, Any]) -> None:
    if not ranges:
        raise ValueError("ranges is empty; name at least one thing to draw, such as depth and width")
    for key in ranges:
        if key in config or (key == "depth" and field in config):
            raise ValueError(f"{field if key == 'depth' else key} is both given and drawn; leave out one of them")
    if ("depth" in ranges) != ("width" in ranges):
        raise ValueError(f"depth and width are drawn together; got only {'depth' if 'depth' in ranges else 'width'}")
    if "depth" in ranges and field is None:
        raise ValueError(f"task family {name!r} has no {' or '.join(SHAPE_FIELDS)}, which depth and width would fill")
    for key in ("depth", "width"):
        pair = ranges.get(key, (1, 1))
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(v, int) for v in pair)
            or not 1 <= pair[0] <= pair[1]
        ):
            raise ValueError(f"{key} must be two integers of at least 1, the least first; got {pair}")
    for key, values in ranges.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{key} must be a list of choices; got {values!r}")


def _between(least: int, most: int, uniform: float) -> int:
    """An integer in [least, most], log-uniform for a uniform number in [0, 1)."""
    return min(most, int(least * ((most + 1) / least) ** uniform))
