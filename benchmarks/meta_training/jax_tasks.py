"""The task families of the speed workloads, written for JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.meta_training.workloads import parameter_shapes
from learned_opt.task import TaskFamily
from tasks.image_conv import ImageConv
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class JaxTask:
    """A task family: one task at a time, to be vectorized.

    Attributes:
        shapes: of the parameters, in the order in which they are flattened.
        start: key -> (constants, parameters).
        loss: (parameters, constants, rows [batch]) -> scalar.
        batch_size: rows per batch; 0 for a family without batches.
        first_row, num_rows: the rows that meta-train tasks learn from.
    """

    shapes: dict[str, tuple[int, ...]]
    start: Callable[[Any], tuple[Arrays, Arrays]]
    loss: Callable[[Arrays, Arrays, Any], Any]
    batch_size: int = 0
    first_row: int = 0
    num_rows: int = 1

    @property
    def num_parameters(self) -> int:
        """Parameters of one task."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def unflatten(self, flat: Any) -> Arrays:
        """Named parameters from [num_parameters]."""
        cuts = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1].tolist()
        parts = jnp.split(flat, cuts)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def flatten(self, params: Arrays) -> Any:
        """The inverse of `unflatten`."""
        return jnp.concatenate([params[name].ravel() for name in self.shapes])

    def loss_and_grad(self, flat: Any, constants: Arrays, rows: Any) -> tuple[Any, Any]:
        """The loss and its gradient, at parameters [num_parameters]."""
        value, grads = jax.value_and_grad(self.loss)(self.unflatten(flat), constants, rows)
        return value, self.flatten(grads)


def jax_task(family: TaskFamily) -> JaxTask:
    """This family for JAX.

    Raises:
        ValueError: a family that has not been written for JAX.
    """
    shapes = parameter_shapes(family)
    if isinstance(family, Quadratic):
        return _quadratic(family, shapes)
    if isinstance(family, ImageMLP | ImageConv):
        return _images(family, shapes)
    raise ValueError(f"{family.name} has not been written for JAX; use image_mlp, image_conv or quadratic")


def _quadratic(family: Quadratic, shapes: dict[str, tuple[int, ...]]) -> JaxTask:
    def start(key: Any) -> tuple[Arrays, Arrays]:
        w, y, theta = jax.random.split(key, 3)
        constants = {"w": jax.random.normal(w, (family.dim, family.dim)), "y": jax.random.normal(y, (family.dim,))}
        return constants, {"theta": jax.random.normal(theta, (family.dim,))}

    def loss(params: Arrays, constants: Arrays, rows: Any) -> Any:
        return jnp.square(constants["w"] @ params["theta"] - constants["y"]).sum()

    return JaxTask(shapes, start, loss)


def _images(family: ImageMLP | ImageConv, shapes: dict[str, tuple[int, ...]]) -> JaxTask:
    images, targets, split = family.load()
    rows_of = split.ranges["meta_train"]
    inputs, classes = jnp.asarray(images.numpy()), jnp.asarray(targets.numpy(), jnp.int32)
    forward = _mlp(family) if isinstance(family, ImageMLP) else _conv(family)

    def start(key: Any) -> tuple[Arrays, Arrays]:
        params = {}
        for (name, shape), part in zip(shapes.items(), jax.random.split(key, len(shapes))):
            if isinstance(family, ImageMLP):
                scale = family.init_scale / (math.sqrt(shape[0]) if family.init == "fan_in" else 1.0)
            else:
                scale = family.init_scale / math.sqrt(math.prod(shape[1:]) if len(shape) == 4 else shape[0])
            random = len(shape) > 1
            params[name] = jax.random.normal(part, shape) * scale if random else jnp.zeros(shape)
        return {}, params

    def loss(params: Arrays, constants: Arrays, rows: Any) -> Any:
        scores = forward(params, inputs[rows])
        chosen = jnp.take_along_axis(scores, classes[rows][:, None], 1)[:, 0]
        return (jax.nn.logsumexp(scores, -1) - chosen).mean()

    return JaxTask(shapes, start, loss, family.batch_size, rows_of.first, rows_of.num_train)


def _mlp(family: ImageMLP) -> Callable[[Arrays, Any], Any]:
    activate = {"sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "tanh": jnp.tanh}[family.activation]

    def forward(params: Arrays, x: Any) -> Any:
        x = x @ params["weight0"] + params["bias0"]
        for i in range(1, len(family.hidden) + 1):
            x = activate(x) @ params[f"weight{i}"] + params[f"bias{i}"]
        return x

    return forward


def _convolve(x: Any, kernel: Any) -> Any:
    """[rows, height, width, in] by [out, in, 3, 3], padded: one matrix product of patches.

    A third of the time of XLA's own convolution on these small images, forward and back.
    """
    rows, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(patches, -1).reshape(-1, 9 * channels)
    return (columns @ kernel.transpose(2, 3, 1, 0).reshape(9 * channels, -1)).reshape(rows, height, width, -1)


def _conv(family: ImageConv) -> Callable[[Arrays, Any], Any]:
    if family.norm != "none" or family.activation != "relu":
        raise ValueError("image_conv has been written for JAX with norm='none' and activation='relu' alone")

    def forward(params: Arrays, x: Any) -> Any:
        side = math.isqrt(x.shape[-1])
        x = x.reshape(-1, side, side, 1)
        for i in range(len(family.channels)):
            x = _convolve(x, params[f"conv{i}"])
            x = jax.nn.relu(x + params[f"shift{i}"])
            if x.shape[1] >= 2:
                rows, height, width, channels = x.shape
                x = x[:, : height // 2 * 2, : width // 2 * 2]
                x = x.reshape(rows, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        return x.mean((1, 2)) @ params["weight"] + params["bias"]

    return forward
