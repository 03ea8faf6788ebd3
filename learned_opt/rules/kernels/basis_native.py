"""Matrices in a basis, compiled for this machine's processor: `basis_kernel.cpp`, which is built when first needed.

It is used for matrices of float32 on the CPU with at most 2**14 numbers, where the time of plain torch goes into many
small operations. The numbers are those of `learned_opt.rules.basis` to rounding, which tests hold it to.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from learned_opt.rules.kernels import build, native
from learned_opt.rules.kernels import native_calls as calls

_SOURCE = Path(__file__).with_name("basis_kernel.cpp")
_MOST_NUMBERS = 2**14


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build.load(_SOURCE, [])
    if library is None:
        return None
    pointer, long, integer, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    library.basis_observe.argtypes = [
        *(pointer, long, long, long, long, ctypes.c_double, real),
        *(pointer, pointer, pointer, pointer, integer),
    ]
    library.basis_turn.argtypes = [
        *(pointer, long, long, long, long, long),
        *(pointer, pointer, integer, integer, pointer, integer),
    ]
    library.basis_refresh.argtypes = [pointer, pointer, long, long, pointer, ctypes.c_double, pointer, integer]
    return library


def usable(matrices: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernel can work on these matrices [..., rows, columns], with what else it is to read."""
    if not native.unrecorded(matrices, *(tensor for tensor in others if tensor is not None)):
        return False
    small = matrices.shape[-2] * matrices.shape[-1] <= _MOST_NUMBERS
    return small and matrices.numel() > 0 and _library() is not None


def _spaced(matrices: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The matrices as rows [..., rows · columns], equally far apart, copied if need be, and how far that is."""
    flat = matrices.flatten(-2)
    apart = calls.spacing(flat)
    return (flat, apart) if apart >= 0 else (flat.contiguous(), flat.shape[-1])


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def observe(
    matrices: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    decay: float,
    large: float,
    overwrite: bool,
) -> list[torch.Tensor | None]:
    """The averages of the two sides after these gradients; see `basis.observe`."""
    grads, spacing = _spaced(matrices)
    before = [None if side is None else side.contiguous() for side in (left, right)]
    after = before if overwrite else [None if side is None else torch.empty_like(side) for side in before]
    _run(
        "observe",
        *(grads.data_ptr(), spacing, *_sizes(matrices), decay, large),
        *(_address(before[0]), _address(after[0]), _address(before[1]), _address(after[1])),
    )
    if overwrite:
        for side, found in zip((left, right), after):
            if side is not None and found is not None and side is not found:
                side.copy_(found)
    return list(after)


def turn(
    matrices: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *, back: bool, cleaned: bool = False
) -> torch.Tensor:
    """Matrices [..., rows, columns] in the basis of vectors [sets, size, size] or [size, size], or back from there.

    With `cleaned`, without what is rounding. With sets of vectors, the dimension before the rows counts the sets.
    """
    x, spacing = _spaced(matrices)
    vectors = [None if side is None else side.contiguous() for side in (left, right)]
    sets = next((len(side) for side in vectors if side is not None and side.dim() == 3), 1)
    out = torch.empty(matrices.shape, dtype=x.dtype)
    _run(
        "turn",
        *(x.data_ptr(), spacing, *_sizes(matrices), sets, *map(_address, vectors)),
        *(int(back), int(cleaned), out.data_ptr()),
    )
    return out


def refresh(averages: torch.Tensor, vectors: torch.Tensor, first: Sequence[bool], shift: float) -> torch.Tensor:
    """One step of orthogonal iteration for one side [..., size, size]; see `basis.refresh`."""
    averages, vectors = averages.contiguous(), vectors.contiguous()
    number, size, _ = _sizes(averages)
    out = torch.empty_like(averages)
    _run("refresh", averages.data_ptr(), vectors.data_ptr(), number, size, bytes(first), shift, out.data_ptr())
    return out


def _sizes(matrices: torch.Tensor) -> tuple[int, int, int]:
    rows, columns = matrices.shape[-2:]
    return matrices.numel() // (rows * columns), rows, columns


def _run(name: str, *arguments: object) -> None:
    if getattr(_library(), f"basis_{name}")(*arguments, calls.threads()):
        raise MemoryError("no memory for turning matrices into their basis")
