"""The basis in which a rule is given the gradient of a matrix.

A coordinatewise rule scales every coordinate by itself, so it matters which coordinates there are. Let G be a matrix's
gradient, and let U and V hold the eigenvectors of moving averages of G·Gᵀ and Gᵀ·G. A rule with a `Basis` is given
UᵀGV instead of G, and its update D is applied as U·D·Vᵀ. In these coordinates a matrix's curvature is nearly
diagonal, so that what scales coordinates apart scales directions apart. The averages are Shampoo's (Gupta, Koren and
Singer 2018, arXiv:1802.09568); Adam in their eigenvectors is SOAP (Vyas et al. 2024, arXiv:2409.11321), and here the
learned rule stands in Adam's place.

Eigenvectors are followed by orthogonal iteration: every few steps, U becomes the first factor of the QR decomposition
of (average)·U. Unlike in SOAP, it begins with U = 1 and with the very first gradient, needs no eigenvalue
decomposition, and keeps every column's sign, so that a coordinate stays the same coordinate. What the rule
remembers linearly of gradients (`UpdateRule.linear_state`) turns along.

A tensor of more than two dimensions is the matrix [first, all others]. The sides of a matrix that are longer than
`Basis.longest` stay as they are, and so does what has a single row or column, unless it has at most `Basis.vectors`
numbers: such a vector is a matrix of one column, of which the rows are turned. Functions here work on many matrices of
one shape at once, [..., rows, columns]; on a CPU with a C++ compiler, small ones of float32 go through a kernel of
their own (`learned_opt.rules.kernels.basis_native`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from learned_opt.rules.kernels import basis_native
from learned_opt.task import Tensors

SIDES = ("left", "right")
_SHIFT = 1e-4  # well above rounding: directions with hardly a gradient are the same on every machine, and stay put
_LARGE = 1e15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Basis:
    """Which sides of matrices are turned, and how their averages move.

    Attributes:
        longest: sides of at most so many rows or columns are turned; at least 2.
        decay: of the averages of G·Gᵀ and Gᵀ·G, in [0, 1).
        every: steps from one change of the basis to the next, at least 1.
        vectors: what has a single row or column, and at most so many numbers, is turned, too; 0 for none.
    """

    longest: int
    decay: float
    every: int
    vectors: int = 0

    def sides(self, shape: Sequence[int]) -> Sides | None:
        """How a tensor of this shape is turned; None if it is not."""
        if torch.compiler.is_compiling():  # which does not look into caches
            return _sides.__wrapped__(self.longest, self.vectors, tuple(shape))
        return _sides(self.longest, self.vectors, tuple(shape))

    def init(
        self, shapes: Sequence[Sequence[int]], num_sets: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensors:
        """The state of so many sets of tensors of these shapes that have seen no gradient.

        Returns:
            Zeros [num_sets, size, size], whose names begin with the number of the tensor.
        """
        out: Tensors = {}
        for place, shape in enumerate(shapes):
            sides = self.sides(shape)
            own = sides.init(num_sets, dtype=dtype, device=device) if sides else {}
            out |= {f"{place}.{name}": value for name, value in own.items()}
        return out


@dataclasses.dataclass(frozen=True)
class Sides:
    """A tensor as a matrix.

    Attributes:
        rows, columns: of the matrix.
        left, right: whether its rows, and its columns, are turned.
    """

    rows: int
    columns: int
    left: bool
    right: bool

    def as_matrices(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows · columns] as [..., rows, columns]."""
        return x.unflatten(-1, (self.rows, self.columns))

    @property
    def turned(self) -> list[tuple[str, int]]:
        """Name and length of every side that is turned."""
        named = zip(SIDES, (self.rows, self.columns), (self.left, self.right))
        return [(name, size) for name, size, is_turned in named if is_turned]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The names of the state of one such matrix, and their shapes."""
        return {f"{side}.{what}": (size, size) for side, size in self.turned for what in ("average", "vectors")}

    def init(self, *lead: int, dtype: torch.dtype, device: torch.device | str) -> Tensors:
        """The state of matrices that have seen no gradient: zeros [*lead, size, size]."""
        return {name: torch.zeros(*lead, *shape, dtype=dtype, device=device) for name, shape in self.shapes.items()}


@functools.lru_cache(maxsize=1024)
def _sides(longest: int, vectors: int, shape: tuple[int, ...]) -> Sides | None:
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if min(rows, columns) < 2:
        size = rows * columns
        return Sides(size, 1, left=True, right=False) if 2 <= size <= vectors else None
    left, right = (size <= longest for size in (rows, columns))
    return Sides(rows, columns, left, right) if left or right else None


@dataclasses.dataclass(frozen=True)
class Turn:
    """The vectors [..., rows, rows] and [..., columns, columns] of a basis; None for a side that is not turned."""

    left: torch.Tensor | None
    right: torch.Tensor | None

    def into(self, matrices: torch.Tensor) -> torch.Tensor:
        """[..., rows, columns] in this basis: UᵀGV."""
        if basis_native.usable(matrices, self.left, self.right):
            return basis_native.turn(matrices, self.left, self.right, back=False)
        found = _wide(matrices)
        if self.left is not None:
            found = _wide(self.left).mT @ found
        if self.right is not None:
            found = found @ _wide(self.right)
        return found.to(matrices.dtype)

    def gradients(self, matrices: torch.Tensor) -> torch.Tensor:
        """Gradients [..., rows, columns] in this basis, without what is rounding."""
        if basis_native.usable(matrices, self.left, self.right):
            return basis_native.turn(matrices, self.left, self.right, back=False, cleaned=True)
        return without_noise(self.into(matrices))

    def back(self, matrices: torch.Tensor) -> torch.Tensor:
        """What has these coordinates in this basis: U·D·Vᵀ."""
        if basis_native.usable(matrices, self.left, self.right):
            return basis_native.turn(matrices, self.left, self.right, back=True)
        found = _wide(matrices)
        if self.left is not None:
            found = _wide(self.left) @ found
        if self.right is not None:
            found = found @ _wide(self.right).mT
        return found.to(matrices.dtype)

    def of(self, sets: torch.Tensor) -> Turn:
        """Those of some of the matrices, by index along the first dimension."""
        return Turn(*(None if side is None else side.index_select(0, sets) for side in (self.left, self.right)))

    def since(self, before: Turn) -> Turn:
        """The turn that takes coordinates in the basis `before` to coordinates in this one."""

        def change(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
            return None if old is None or new is None else (_wide(old).mT @ _wide(new)).to(new.dtype)

        return Turn(change(before.left, self.left), change(before.right, self.right))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float64 where the device has it.

    A rule makes as large a step of a direction with hardly a gradient as of any other: what is weak must not be rounded
    like what is strong, or two ways to compute the same would part.
    """
    return x if x.device.type == "mps" else x.double()


def turn_of(state: Tensors) -> Turn:
    """The basis of a state."""
    return Turn(state.get("left.vectors"), state.get("right.vectors"))


def observe(basis: Basis, sides: Sides, state: Tensors, matrices: torch.Tensor, *, overwrite: bool = False) -> Tensors:
    """Take gradients [rows, columns], or [sets, rows, columns], into the averages.

    Numbers that are not finite, or too large to be squared, count zero.

    Args:
        basis, sides: what is turned, and how.
        state: the averages.
        matrices: the gradients.
        overwrite: whether to write into the averages instead of making new tensors.

    Returns:
        The averages by name.
    """
    names = [f"{side}.average" for side in SIDES]
    left, right = (state.get(name) for name in names)
    if basis_native.usable(matrices, left, right):
        found = basis_native.observe(matrices, left, right, basis.decay, _LARGE, overwrite)
        return {name: value for name, value in zip(names, found) if value is not None}
    sound = _wide(torch.where(matrices.abs() < _LARGE, matrices, 0.0))
    product = torch.addmm if matrices.dim() == 2 else torch.baddbmm
    out: Tensors = {}
    for side, _ in sides.turned:
        name = f"{side}.average"
        one, other = (sound, sound.mT) if side == "left" else (sound.mT, sound)
        moved = product(_wide(state[name]), one, other, beta=basis.decay, alpha=1 - basis.decay)
        out[name] = state[name].copy_(moved) if overwrite else moved.to(matrices.dtype)
    return out


def refresh(sides: Sides, state: Tensors, first: torch.Tensor | bool) -> Tensors:
    """One step of orthogonal iteration.

    Args:
        sides: which.
        state: the averages, and the vectors so far.
        first: whether there are none so far, one value or [..., 1, 1]; the identity stands in for them then.

    Returns:
        The vectors, new tensors by name.
    """
    out: Tensors = {}
    for side, size in sides.turned:
        average, vectors = state[f"{side}.average"], state[f"{side}.vectors"]
        if basis_native.usable(average, vectors):
            sets = average.numel() // size**2
            fresh = first.expand(sets, 1, 1).flatten().tolist() if isinstance(first, torch.Tensor) else [first] * sets
            out[f"{side}.vectors"] = basis_native.refresh(average, vectors, fresh, _SHIFT)
            continue
        dtype, average, vectors = average.dtype, _wide(average), _wide(vectors)
        one = torch.eye(size, dtype=average.dtype, device=average.device)
        if isinstance(first, torch.Tensor):
            vectors = torch.where(first, one, vectors)
        elif first:
            vectors = one.expand_as(average)
        trace = average.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        # A little of what is there: directions that hardly any gradient had a part in stay where they are.
        power = (average / trace.clamp_min(torch.finfo(average.dtype).tiny)) @ vectors + _SHIFT * vectors
        found, triangle = torch.linalg.qr(power)
        signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(found.dtype)
        out[f"{side}.vectors"] = (found * signs[..., None, :]).to(dtype)
    return out


def without_noise(matrices: torch.Tensor) -> torch.Tensor:
    """The same, with zeros where nothing but rounding is left of the numbers that were turned.

    A rule divides by the size of what it sees: it would make whole steps of that.
    """
    sizes = matrices.abs()
    return torch.where(sizes < 8 * torch.finfo(matrices.dtype).eps * sizes.amax((-2, -1), keepdim=True), 0.0, matrices)
