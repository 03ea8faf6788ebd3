"""The LSTM rule compiled for this machine's processor: `lstm_kernel.cpp`, built once for each configuration.

The first use of a configuration calls the C++ compiler, which takes a second or two; the library is kept and
loaded from there ever after (`learned_opt.rules.build`). It is used for float32 on the CPU. Where there is no compiler,
or the environment says LEARNED_OPT_NATIVE=0, plain torch does the work: the same numbers to rounding, which tests hold
it to. The numbers do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from learned_opt.rules import build
from learned_opt.task import Tensors

_SOURCE = Path(__file__).with_name("lstm_kernel.cpp")
_MOST_WEIGHTS = 2**16
"""Beyond so many weights a core's cache does not hold them, matrix products are all that counts, and torch is good at
those."""
_KINDS = {"given": 0, "normalized": 1, "log_and_sign": 2, "momenta": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernel is compiled for: sizes of the network, and what becomes of its output.

    Attributes:
        num_features, dense_units, num_layers, hidden_size: of the network; no dense layer with 0 units.
        output_tanh: whether the outputs pass through tanh.
        num_directions: 0 where the one output is the update; else how many directions the update is mixed from.
    """

    num_features: int
    dense_units: int
    num_layers: int
    hidden_size: int
    output_tanh: bool
    num_directions: int = 0

    def defines(self) -> list[str]:
        """The compiler's arguments."""
        values = {
            "FEATURES": self.num_features,
            "DENSE": self.dense_units,
            "LAYERS": self.num_layers,
            "HIDDEN": self.hidden_size,
            "OUTPUT_TANH": int(self.output_tanh),
            "DIRECTIONS": self.num_directions,
        }
        return [f"-D{name}={value}" for name, value in values.items()]

    @property
    def num_weights(self) -> int:
        """The numbers in the LSTM layers, each as wide as the widest."""
        widest = max(self.dense_units or self.num_features, self.hidden_size)
        return self.num_layers * 4 * self.hidden_size * (widest + self.hidden_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What turns gradients into the network's inputs; see `learned_opt.rules.features`.

    Attributes:
        kind: "normalized", "log_and_sign", "momenta", or "given": the inputs themselves (and directions, below them)
            are passed instead of gradients.
        betas: decays of the averages: one with "normalized", five with "momenta".
        eps: of "normalized" and "momenta".
        log_range: of "log_and_sign"; with directions, bound of the logarithm of a step.
    """

    kind: str
    betas: tuple[float, ...] = ()
    eps: float = 0.0
    log_range: float = 1.0


def enabled() -> bool:
    """Whether the environment allows compiled kernels."""
    return os.environ.get("LEARNED_OPT_NATIVE", "1") != "0"


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernel can work on these: plain float32 tensors on the CPU."""
    return enabled() and all(type(t) is torch.Tensor and t.is_cpu and t.dtype == torch.float32 for t in tensors)


def kernel(shape: Shape) -> LSTMKernel | None:
    """The kernel of this shape, built if need be; None where it cannot be had, or would not pay."""
    return _load(shape) if enabled() and shape.num_weights <= _MOST_WEIGHTS else None


@functools.cache
def _load(shape: Shape) -> LSTMKernel | None:
    library = build.load(_SOURCE, shape.defines())
    return None if library is None else LSTMKernel(shape, library)


def _threads() -> int:
    """How many threads the kernel may use: the numbers do not depend on it."""
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not live on in a forked process, which would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def flatten(theta: Tensors, names: Sequence[str], num_sets: int = 1) -> torch.Tensor:
    """The tensors of these names, in the kernel's order, as [num_sets, numbers]."""
    return torch.cat([theta[name].reshape(num_sets, -1) for name in names], 1)


def unflatten(flat: torch.Tensor, names: Sequence[str], theta: Tensors) -> Tensors:
    """The inverse of `flatten` for one set; zeros for whatever else is in theta."""
    parts = dict(zip(names, flat.split([theta[name].numel() for name in names])))
    return {n: parts[n].view_as(v) if n in parts else torch.zeros_like(v) for n, v in theta.items()}


class LSTMKernel:
    """The compiled functions of one shape; all tensors are float32 on the CPU."""

    def __init__(self, shape: Shape, library: ctypes.CDLL) -> None:
        self.shape = shape
        pointer, long, integer, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        self._step, self._backward = library.lstm_step, library.lstm_backward
        self._step.argtypes = [
            *(pointer, long, long, integer, pointer, pointer, pointer, pointer, integer, pointer, real, real),
            *(pointer, pointer, long, pointer, pointer, pointer, pointer, long, real, pointer, integer),
        ]
        self._backward.argtypes = [
            *(pointer, long, integer, integer, pointer, long, pointer, pointer, pointer, integer, pointer, real, real),
            *(pointer, pointer, pointer, long, pointer, long, integer, pointer, pointer, pointer, pointer, pointer),
            *(real, pointer, integer),
        ]
        self._step.restype = None
        self._pack = library.lstm_pack
        self._pack.argtypes, self._pack.restype = [pointer, long, pointer], None
        library.lstm_weights_size.restype = long
        self.weights_size = int(library.lstm_weights_size())
        self.theta_size = int(library.lstm_theta_size())

    def pack(self, flat: torch.Tensor) -> torch.Tensor:
        """Weights as `step` reads them, bytes [sets, …], from `flatten`'s [sets, theta_size]."""
        _check(flat)
        packed = torch.empty(len(flat), self.weights_size, dtype=torch.uint8)
        self._pack(flat.contiguous().data_ptr(), len(flat), packed.data_ptr())
        return packed

    def step(
        self, packed: torch.Tensor, inputs: Inputs, scale: float, grads: torch.Tensor, state: Tensors, after: Tensors
    ) -> torch.Tensor:
        """One step; "step" is only read.

        Args:
            packed: from `pack`.
            inputs: how gradients become inputs; not "given".
            scale: factor on the read-out.
            grads: [n], of equally many coordinates for every set, one set after the other.
            state: tensors [..., n].
            after: where the new state is written; may be `state` itself, or tensors that share no memory with it.

        Returns:
            The update [n].
        """
        sets, n = packed.shape[0], grads.shape[0]
        _check(grads, *state.values(), *after.values())
        grads = grads.contiguous()
        update = torch.empty_like(grads)
        before, spacing = _in_rows(state, n)
        target, target_spacing = (before, spacing) if after is state else _in_rows(after, n)
        averaging = "m" in state
        self._step(
            packed.data_ptr(),
            sets,
            n // sets,
            _KINDS[inputs.kind],
            grads.data_ptr(),
            *_averages(before),
            _packed(inputs.betas),
            inputs.eps,
            inputs.log_range,
            before["hidden"].data_ptr(),
            before["cell"].data_ptr(),
            spacing,
            target["m"].data_ptr() if averaging else None,
            target["v"].data_ptr() if averaging else None,
            target["hidden"].data_ptr(),
            target["cell"].data_ptr(),
            target_spacing,
            scale,
            update.data_ptr(),
            _threads(),
        )
        for name, value in target.items():
            if value is not after[name] and name != "step":
                after[name].copy_(value)
        return update

    def backward(
        self,
        flat: torch.Tensor,
        inputs: Inputs,
        scale: float,
        grads: torch.Tensor,
        state: Tensors,
        loss_grads: torch.Tensor,
    ) -> torch.Tensor:
        """`UpdateRule.backward`, as one flat vector [theta_size].

        Args:
            flat: [1, theta_size], from `flatten`.
            inputs, scale: as in `step`.
            grads, loss_grads: [steps, n].
            state: before the first step, tensors [..., n]; only read.
        """
        _check(flat, grads, loss_grads, *state.values())
        out = flat.new_empty(self.theta_size)
        grads, loss_grads = (t if t.stride(-1) == 1 else t.contiguous() for t in (grads, loss_grads))
        state, spacing = _in_rows(state, grads.shape[-1])
        self._run(flat, inputs, scale, grads, grads.stride(0), state, spacing, loss_grads, 1, None, out, None)
        return out

    def vjp(
        self,
        flat: torch.Tensor,
        inputs: Inputs,
        scale: float,
        rows: torch.Tensor,
        active: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_state: Tensors,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pull cotangents of one step's update and new hidden units and cells back.

        Args:
            flat, inputs, scale: as in `backward`.
            rows: the network's inputs, and below them the directions if there are any, [rows, n].
            active: [n], bool: the coordinates that may move.
            state: "hidden" and "cell" before the step.
            d_update: [n].
            d_state: cotangents of the new "hidden" and "cell", contiguous; overwritten with those of the old.

        Returns:
            Derivatives with respect to theta [theta_size] and rows [rows, n].
        """
        state = {name: state[name].contiguous() for name in ("hidden", "cell")}
        rows, d_update = rows.contiguous(), d_update.contiguous()
        _check(flat, rows, d_update, *state.values(), *d_state.values())
        out, d_rows = flat.new_empty(self.theta_size), torch.empty_like(rows)
        given = dataclasses.replace(inputs, kind="given")
        n = rows.shape[-1]
        self._run(flat, given, scale, rows[None], n, state, n, d_update[None], 0, (d_state, d_rows), out, active)
        return out, d_rows

    def _run(
        self,
        flat: torch.Tensor,
        inputs: Inputs,
        scale: float,
        grads: torch.Tensor,
        ld: int,
        state: Tensors,
        spacing: int,
        cotangents: torch.Tensor,
        summed: int,
        outward: tuple[Tensors, torch.Tensor] | None,
        out: torch.Tensor,
        active: torch.Tensor | None,
    ) -> None:
        averages = _averages(state)
        hidden = cell = d_rows = None
        if outward is not None:
            hidden, cell, d_rows = (t.data_ptr() for t in (outward[0]["hidden"], outward[0]["cell"], outward[1]))
        failed = self._backward(
            flat.data_ptr(),
            grads.shape[-1],
            grads.shape[0],
            _KINDS[inputs.kind],
            grads.data_ptr(),
            ld,
            *averages,
            _packed(inputs.betas),
            inputs.eps,
            inputs.log_range,
            active.data_ptr() if active is not None else None,
            state["hidden"].data_ptr(),
            state["cell"].data_ptr(),
            spacing,
            cotangents.data_ptr(),
            cotangents.stride(0),
            summed,
            *(hidden, cell, hidden, cell, d_rows),
            scale,
            out.data_ptr(),
            _threads(),
        )
        if failed:
            raise MemoryError(f"no memory for going back over {grads.shape[0]} steps of an LSTM rule")


@functools.cache
def _packed(decays: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    """The decays as the kernel reads them."""
    return (ctypes.c_double * len(decays))(*decays)


def _check(*tensors: torch.Tensor) -> None:
    """Raise TypeError unless the kernel can read all of these."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise TypeError(
                f"the LSTM kernel works on float32 tensors on the CPU; got {tensor.dtype} on {tensor.device}. Hold "
                "theta, gradients and state in one dtype on one device"
            )


def _in_rows(state: Tensors, n: int) -> tuple[Tensors, int]:
    """The state with all rows [n] contiguous and equally far apart, copied if need be, and how far that is."""
    spacings = {_spacing(value) for name, value in state.items() if name != "step"} - {0}
    if len(spacings) > 1 or -1 in spacings:
        return {name: value.contiguous() for name, value in state.items()}, n
    if "step" in state and not state["step"].is_contiguous():
        state = {**state, "step": state["step"].contiguous()}
    return state, spacings.pop() if spacings else n


def _spacing(tensor: torch.Tensor) -> int:
    """From one row of [..., n] to the next; 0 where there is one row only, −1 if rows lie otherwise."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return -1
    num_rows, spacing = 1, 0
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1])):
        if size > 1:
            spacing = spacing or stride
            if stride != spacing * num_rows or stride == 0:
                return -1
            num_rows *= size
    return spacing


def _averages(state: Tensors) -> tuple[int | None, int | None, int | None, int]:
    """Addresses of the moving averages and the step count, and whether one count is shared by all coordinates."""
    if "m" not in state:
        return None, None, None, 0
    step = state["step"]
    return state["m"].data_ptr(), state["v"].data_ptr(), step.data_ptr(), int(step.numel() == 1)
