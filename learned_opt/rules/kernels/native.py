"""The LSTM rule compiled for this machine's processor: `lstm_kernel.cpp`, built once for each configuration.

The first use of a configuration calls the C++ compiler, which takes a second or two; the library is kept and
loaded from there ever after (`learned_opt.rules.kernels.build`). It is used for float32 on the CPU. Where there is no
compiler, or the environment says LEARNED_OPT_NATIVE=0, plain torch does the work: the same numbers to rounding, which
tests hold it to. The numbers do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from learned_opt.rules.context import Context, TensorLayout
from learned_opt.rules.features import NUM_CONTEXT, NUM_MOMENTA
from learned_opt.rules.kernels import build
from learned_opt.rules.kernels import native_calls as calls
from learned_opt.rules.kernels.native_shape import Inputs, Shape
from learned_opt.task import Tensors

_SOURCE = Path(__file__).with_name("lstm_kernel.cpp")
_MOST_WEIGHTS = 2**16
"""Beyond so many weights a core's cache does not hold them, matrix products are all that counts, and torch is good at
those."""
_KINDS = {"given": 0, "normalized": 1, "log_and_sign": 2, "momenta": 3}


def enabled() -> bool:
    """Whether the environment allows compiled kernels."""
    return os.environ.get("LEARNED_OPT_NATIVE", "1") != "0"


def usable(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel can work on these: plain tensors of this dtype on the CPU."""
    return all(type(t) is torch.Tensor and t.is_cpu and t.dtype == dtype for t in tensors) and enabled()


def unrecorded(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """`usable`, and neither torch.compile nor autograd is to see what is done with them."""
    if torch.compiler.is_compiling() or not usable(*tensors, dtype=dtype):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def kernel(shape: Shape) -> LSTMKernel | None:
    """The kernel of this shape, built if need be; None where it cannot be had, or would not pay."""
    return _load(shape) if enabled() and shape.num_weights <= _MOST_WEIGHTS else None


@functools.cache
def _load(shape: Shape) -> LSTMKernel | None:
    library = build.load(_SOURCE, shape.defines())
    return None if library is None else LSTMKernel(shape, library)


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
        calls.declare(library)
        self._step, self._backward, self._pack = library.lstm_step, library.lstm_backward, library.lstm_pack
        self._context, self._normalized_back = library.lstm_context, library.lstm_normalized_back
        self._agreement = library.lstm_agreement
        self._tells_signal = shape.num_context > NUM_CONTEXT
        self.weights_size = int(library.lstm_weights_size())
        self.theta_size = int(library.lstm_theta_size())

    def pack(self, flat: torch.Tensor) -> torch.Tensor:
        """Weights as `step` reads them, bytes [sets, …], from `flatten`'s [sets, theta_size]."""
        calls.check(flat)
        packed = torch.empty(len(flat), self.weights_size, dtype=torch.uint8)
        self._pack(flat.contiguous().data_ptr(), len(flat), packed.data_ptr())
        return packed

    def step(
        self,
        packed: torch.Tensor,
        inputs: Inputs,
        scale: float,
        grads: torch.Tensor,
        state: Tensors,
        after: Tensors,
        context: Context | None = None,
        checked: tuple[Tensors, int] | None = None,
    ) -> torch.Tensor:
        """One step; "step" is only read.

        Args:
            packed: from `pack`.
            inputs: how gradients become inputs; not "given".
            scale: factor on the read-out.
            grads: [n], of equally many coordinates for every set, one set after the other.
            state: tensors [..., n].
            after: where the new state is written; may be `state` itself, or tensors that share no memory with it.
            context: of the coordinates' tensors, for a shape with `num_context`; zeros by default.
            checked: what `in_rows` said of `state`, where `after` is `state`, to save looking at it again.

        Returns:
            The update [n].
        """
        sets, n = packed.shape[0], grads.shape[0]
        calls.check(grads)
        grads = grads.contiguous()
        update = torch.empty_like(grads)
        before, spacing = checked or calls.in_rows(state, n)
        target, target_spacing = (before, spacing) if after is state else calls.in_rows(after, n)
        averaging, told = "m" in state, calls.told(context)
        self._step(
            packed.data_ptr(),
            sets,
            n // sets,
            _KINDS[inputs.kind],
            grads.data_ptr(),
            *calls.averages(before),
            calls.packed(inputs.betas),
            *inputs.numbers,
            *calls.network(before),
            spacing,
            target["m"].data_ptr() if averaging else None,
            target["v"].data_ptr() if averaging else None,
            *calls.network(target),
            target_spacing,
            *told[:3],
            scale,
            update.data_ptr(),
            calls.threads(),
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
        context: Context | None = None,
    ) -> torch.Tensor:
        """`UpdateRule.backward`, as one flat vector [theta_size].

        Args:
            flat: [1, theta_size], from `flatten`.
            inputs, scale: as in `step`.
            grads, loss_grads: [steps, n].
            state: before the first step, tensors [..., n]; only read.
            context: of every step.
        """
        calls.check(flat, grads, loss_grads)
        out = flat.new_empty(self.theta_size)
        grads, loss_grads = (t if t.stride(-1) == 1 else t.contiguous() for t in (grads, loss_grads))
        state, spacing = calls.in_rows(state, grads.shape[-1])
        self._run(flat, inputs, scale, grads, grads.stride(0), state, spacing, loss_grads, 1, None, out, None, context)
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
            state: what there is of `NETWORK_STATE`, before the step.
            d_update: [n].
            d_state: cotangents of what is new of `NETWORK_STATE`, contiguous; overwritten with those of the old.

        Returns:
            Derivatives with respect to theta [theta_size] and rows [rows, n].
        """
        state = {name: state[name].contiguous() for name in calls.NETWORK_STATE if name in state}
        rows, d_update = rows.contiguous(), d_update.contiguous()
        calls.check(flat, rows, d_update, *state.values(), *d_state.values())
        out, d_rows = flat.new_empty(self.theta_size), torch.empty_like(rows)
        given = dataclasses.replace(inputs, kind="given")
        n = rows.shape[-1]
        self._run(flat, given, scale, rows[None], n, state, n, d_update[None], 0, (d_state, d_rows), out, active)
        return out, d_rows

    def whole_vjp(
        self,
        flat: torch.Tensor,
        inputs: Inputs,
        scale: float,
        grads: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_state: Tensors,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pull cotangents of one step's update and new state back, through the network and its normalized inputs.

        Args:
            flat, inputs, scale: as in `backward`; inputs of kind "normalized".
            grads, d_update: [n].
            state: before the step, with a step count for every coordinate.
            d_state: cotangents of the new state, contiguous; overwritten with those of the old.

        Returns:
            Derivatives with respect to theta [theta_size] and grads [n].
        """
        n = grads.shape[0]
        state = {name: value.contiguous() for name, value in state.items()}
        grads, d_update = grads.contiguous(), d_update.contiguous()
        calls.check(flat, grads, d_update, *state.values(), *d_state.values())
        out, d_rows, d_grads = flat.new_empty(self.theta_size), grads.new_empty(2, n), torch.empty_like(grads)
        self._run(flat, inputs, scale, grads[None], n, state, n, d_update[None], 0, (d_state, d_rows), out, None)
        self._normalized_back(
            grads.data_ptr(),
            *calls.averages(state)[:3],
            inputs.betas[0],
            inputs.eps,
            n,
            d_rows.data_ptr(),
            *(d_state[name].data_ptr() for name in ("m", "v", "step")),
            d_grads.data_ptr(),
            calls.threads(),
        )
        return out, d_grads

    def context_sums(self, grads: torch.Tensor, state: Tensors, inputs: Inputs, layout: TensorLayout) -> torch.Tensor:
        """The sums of `features.agreement_terms`, `clip_terms` and `largest_terms`, float64 [10 to 16, tensors].

        Args:
            grads: [n].
            state: with "m" [3, n], "v" [2 or 3, n] and "step" [n] or [1], which is the same all over a tensor.
            inputs: of kind "momenta".
            layout: of the n coordinates.
        """
        calls.check(grads)
        rows, spacing = calls.in_rows({"m": state["m"], "v": state["v"]}, grads.shape[0])
        bounds = calls.bounds(layout)
        num_sums = 10 + 2 * (self._tells_signal + self.shape.clips + self.shape.rests)
        sums = grads.new_empty(num_sums, len(bounds) - 1, dtype=torch.float64)
        grads, step = grads.contiguous(), state["step"].contiguous()
        self._context(
            *(grads.data_ptr(), rows["m"].data_ptr(), rows["v"].data_ptr(), spacing),
            *(step.data_ptr(), int(step.numel() == 1), inputs.betas[NUM_MOMENTA - 1]),
            *(*inputs.betas[NUM_MOMENTA:], inputs.square_ratio),
            *(bounds.data_ptr(), len(bounds) - 1, sums.data_ptr(), calls.threads()),
        )
        return sums

    def agreement(
        self, sums: torch.Tensor, loudness: float = 0.0, clip: float = 0.0, relative_eps: float = 0.0
    ) -> torch.Tensor:
        """`features.agreement` of such sums and, below it, what gradients are multiplied by and what is added.

        That is `features.clip_factor`, and `features.largest_root` times `relative_eps`: float64 [4 to 8, tensors].
        """
        num_rows = max(NUM_CONTEXT, self.shape.num_context) + self.shape.clips + self.shape.rests
        out = sums.new_empty(num_rows, sums.shape[1])
        self._agreement(sums.contiguous().data_ptr(), sums.shape[1], loudness, clip, relative_eps, out.data_ptr())
        return out

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
        context: Context | None = None,
    ) -> None:
        averages, told = calls.averages(state), calls.told(context)
        around: calls.Addresses = (None, None, None)
        d_rows = None
        if outward is not None:
            around, d_rows = calls.network(outward[0]), outward[1].data_ptr()
        failed = self._backward(
            flat.data_ptr(),
            grads.shape[-1],
            grads.shape[0],
            _KINDS[inputs.kind],
            grads.data_ptr(),
            ld,
            *averages,
            calls.packed(inputs.betas),
            *inputs.numbers,
            active.data_ptr() if active is not None else None,
            *calls.network(state),
            spacing,
            cotangents.data_ptr(),
            cotangents.stride(0),
            summed,
            *(*around, *around, d_rows),
            *told[:3],
            scale,
            out.data_ptr(),
            calls.threads(),
        )
        if failed:
            raise MemoryError(f"no memory for going back over {grads.shape[0]} steps of an LSTM rule")
