"""What the compiled kernel is called with: the types of its functions' arguments, and where tensors lie in memory."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from learned_opt.rules.context import Context, TensorLayout
from learned_opt.task import Tensors

NETWORK_STATE = ("hidden", "cell", "log_size")
"""Rows of a rule's state that belong to the network; the others are what its inputs are computed from."""
Addresses = tuple[int | None, int | None, int | None]


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions of `lstm_kernel.cpp` take and return."""
    pointer, long, integer, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    three = (pointer, pointer, pointer)  # the averages with the step count, or what is of `NETWORK_STATE`
    numbers = (real,) * 8  # `native_shape.Inputs.numbers`
    library.lstm_step.argtypes = [
        *(pointer, long, long, integer, pointer, *three, integer, pointer, *numbers),
        *(*three, long, pointer, pointer, *three, long, pointer, long, pointer, real, pointer, integer),
    ]
    library.lstm_backward.argtypes = [
        *(pointer, long, integer, integer, pointer, long, *three, integer, pointer, *numbers),
        *(pointer, *three, long, pointer, long, integer, *three, *three, pointer),
        *(pointer, long, pointer, real, pointer, integer),
    ]
    library.lstm_pack.argtypes = [pointer, long, pointer]
    library.lstm_context.argtypes = [
        *(*three, long, pointer, integer, *(ctypes.c_double,) * 3, real),
        *(pointer, long, pointer, integer),
    ]
    library.lstm_agreement.argtypes = [pointer, long, *(ctypes.c_double,) * 3, pointer]
    library.lstm_normalized_back.argtypes = [
        *(pointer, pointer, pointer, pointer, ctypes.c_double, real, long),
        *(pointer, pointer, pointer, pointer, pointer, integer),
    ]
    for returns_nothing in ("step", "pack", "context", "agreement", "normalized_back"):
        getattr(library, f"lstm_{returns_nothing}").restype = None
    library.lstm_weights_size.restype = long


def threads() -> int:
    """How many threads the kernel may use: the numbers do not depend on it."""
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not live on in a forked process, which would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def packed(betas: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    """Decays as the kernel reads them."""
    return (ctypes.c_double * len(betas))(*betas)


def check(*tensors: torch.Tensor) -> None:
    """Raise TypeError unless the kernel can read all of these."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise TypeError(
                f"the LSTM kernel works on float32 tensors on the CPU; got {tensor.dtype} on {tensor.device}. Hold "
                "theta, gradients and state in one dtype on one device"
            )


def in_rows(state: Tensors, n: int) -> tuple[Tensors, int]:
    """The state with all rows [n] contiguous and equally far apart, copied if need be, and how far that is.

    Raises:
        TypeError: tensors that the kernel cannot read.
    """
    check(*state.values())
    spacings = {spacing(value) for name, value in state.items() if name != "step"} - {0}
    if len(spacings) > 1 or -1 in spacings:
        return {name: value.contiguous() for name, value in state.items()}, n
    if "step" in state and not state["step"].is_contiguous():
        state = {**state, "step": state["step"].contiguous()}
    return state, spacings.pop() if spacings else n


def spacing(tensor: torch.Tensor) -> int:
    """From one row of [..., n] to the next; 0 where there is one row only, −1 if rows lie otherwise."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return -1
    num_rows, distance = 1, 0
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1])):
        if size > 1:
            distance = distance or stride
            if stride != distance * num_rows or stride == 0:
                return -1
            num_rows *= size
    return distance


@functools.lru_cache(maxsize=64)
def bounds(layout: TensorLayout) -> torch.Tensor:
    """Where every tensor begins, int64 [tensors + 1]."""
    sizes = torch.tensor(layout.sizes * layout.repeats, dtype=torch.int64, device="cpu")
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def told(context: Context | None) -> tuple[int | None, int, int | None, tuple[torch.Tensor, ...]]:
    """Address of the values, number of tensors, address of the index, and what must live while they are used."""
    if context is None:
        return None, 0, None, ()
    check(context.values)
    values, index = context.values.contiguous(), context.index
    return values.data_ptr(), values.shape[-1], None if index is None else index.data_ptr(), (values,)


def network(state: Tensors) -> Addresses:
    """Addresses of what there is of `NETWORK_STATE`."""
    hidden, cell, log_size = (state[name].data_ptr() if name in state else None for name in NETWORK_STATE)
    return hidden, cell, log_size


def averages(state: Tensors) -> tuple[int | None, int | None, int | None, int]:
    """Addresses of the moving averages and the step count, and whether one count is shared by all coordinates."""
    if "m" not in state:
        return None, None, None, 0
    step = state["step"]
    return state["m"].data_ptr(), state["v"].data_ptr(), step.data_ptr(), int(step.numel() == 1)
