"""The LSTM rule compiled for this machine's processor: `lstm_kernel.cpp`, built once for each configuration.

The first use of a configuration calls the C++ compiler that is found (the environment's CXX, else c++, g++ or clang++),
which takes a second or two; the library is kept in a cache folder and loaded from there ever after. It is used for
float32 on the CPU. Where there is no compiler, or the environment says LEARNED_OPT_NATIVE=0, plain torch does
the work: the same numbers to rounding, which tests hold it to.

LEARNED_OPT_CACHE names the cache folder; by default it is `learned_opt` in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from learned_opt.task import Tensors

_SOURCE = Path(__file__).with_name("lstm_kernel.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# From the fastest to what every compiler takes.
_MACHINE = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
_KINDS = {"given": 0, "normalized": 1, "log_and_sign": 2, "momenta": 3}


class NativeWarning(UserWarning):
    """A C++ compiler was found and failed: plain torch does the work, more slowly."""


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

    @functools.cached_property
    def packed(self) -> ctypes.Array[ctypes.c_float]:
        """The decays as the kernel reads them."""
        return (ctypes.c_float * len(self.betas))(*self.betas)


def enabled() -> bool:
    """Whether the environment allows compiled kernels."""
    return os.environ.get("LEARNED_OPT_NATIVE", "1") != "0"


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernel can work on these: plain float32 tensors on the CPU."""
    return enabled() and all(type(t) is torch.Tensor and t.is_cpu and t.dtype == torch.float32 for t in tensors)


def kernel(shape: Shape) -> LSTMKernel | None:
    """The kernel of this shape, built if need be; None where it cannot be had."""
    return _load(shape) if enabled() else None


@functools.cache
def _load(shape: Shape) -> LSTMKernel | None:
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        return LSTMKernel(shape, ctypes.CDLL(str(_built(compiler, shape))))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the LSTM kernel could not be built or loaded ({error}); plain torch does its work, more slowly. "
            "Set LEARNED_OPT_NATIVE=0 to leave it out without this warning",
            NativeWarning,
            stacklevel=3,
        )
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    return None


def cache_folder() -> Path:
    """Where built libraries are kept."""
    chosen = os.environ.get("LEARNED_OPT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learned_opt"


def _built(compiler: str, shape: Shape) -> Path:
    """The path of the library, which is compiled unless it is there already."""
    key = hashlib.sha256(_SOURCE.read_bytes())
    for part in (compiler, _version(compiler), _processor(), *_FLAGS, *shape.defines()):
        key.update(part.encode() + b"\0")
    target = cache_folder() / f"lstm-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for machine in _MACHINE:
            made = Path(folder) / "lstm.so"
            command = [compiler, *_FLAGS, *machine, *shape.defines(), str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                # Processes that build at the same time each put the same library in place, whole.
                os.replace(made, target)
                return target
            reason = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit status {done.returncode}"
    raise RuntimeError(f"{compiler}: {reason}")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def _processor() -> str:
    """What tells processors apart: a library built on one must not run on another that shares the cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


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
            *(pointer, pointer, pointer, pointer, pointer, pointer, real, pointer, integer),
        ]
        self._backward.argtypes = [
            *(pointer, long, integer, integer, pointer, long, pointer, pointer, pointer, integer, pointer, real, real),
            *(pointer, pointer, pointer, long, pointer, long, integer, pointer, pointer, pointer, pointer, pointer),
            *(real, pointer, integer),
        ]
        self.theta_size = int(library.lstm_theta_size())

    def step(
        self, flat: torch.Tensor, inputs: Inputs, scale: float, grads: torch.Tensor, state: Tensors, after: Tensors
    ) -> torch.Tensor:
        """One step; "step" is only read.

        Args:
            flat: [sets, theta_size], from `flatten`.
            inputs: how gradients become inputs; not "given".
            scale: factor on the read-out.
            grads: [n], of equally many coordinates for every set, one set after the other.
            state: contiguous tensors [..., n].
            after: where the new state is written; may be `state` itself.

        Returns:
            The update [n].
        """
        sets, n = flat.shape[0], grads.shape[0]
        update = torch.empty_like(grads)
        averaging = "m" in state
        failed = self._step(
            flat.data_ptr(),
            sets,
            n // sets,
            _KINDS[inputs.kind],
            grads.data_ptr(),
            *_averages(state),
            inputs.packed,
            inputs.eps,
            inputs.log_range,
            state["hidden"].data_ptr(),
            state["cell"].data_ptr(),
            after["m"].data_ptr() if averaging else None,
            after["v"].data_ptr() if averaging else None,
            after["hidden"].data_ptr(),
            after["cell"].data_ptr(),
            scale,
            update.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the step of an LSTM rule")
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
            flat, inputs, scale: as in `step_`, with one set.
            grads, loss_grads: [steps, n] with contiguous rows.
            state: before the first step, tensors [..., n] with contiguous rows; only read.
        """
        out = flat.new_empty(self.theta_size)
        self._run(flat, inputs, scale, grads, grads.stride(0), state, loss_grads, 1, None, out, None)
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
            state: "hidden" and "cell" before the step, contiguous.
            d_update: [n].
            d_state: cotangents of the new "hidden" and "cell", contiguous; overwritten with those of the old.

        Returns:
            Derivatives with respect to theta [theta_size] and rows [rows, n].
        """
        out, d_rows = flat.new_empty(self.theta_size), torch.empty_like(rows)
        given = dataclasses.replace(inputs, kind="given")
        n = rows.shape[-1]
        self._run(flat, given, scale, rows[None], n, state, d_update[None], 0, (d_state, d_rows), out, active)
        return out, d_rows

    def _run(
        self,
        flat: torch.Tensor,
        inputs: Inputs,
        scale: float,
        grads: torch.Tensor,
        ld: int,
        state: Tensors,
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
            inputs.packed,
            inputs.eps,
            inputs.log_range,
            active.data_ptr() if active is not None else None,
            state["hidden"].data_ptr(),
            state["cell"].data_ptr(),
            state["hidden"].stride(-2),
            cotangents.data_ptr(),
            cotangents.stride(0),
            summed,
            *(hidden, cell, hidden, cell, d_rows),
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for going back over {grads.shape[0]} steps of an LSTM rule")


def _averages(state: Tensors) -> tuple[int | None, int | None, int | None, int]:
    """Addresses of the moving averages and the step count, and whether one count is shared by all coordinates."""
    if "m" not in state:
        return None, None, None, 0
    step = state["step"]
    return state["m"].data_ptr(), state["v"].data_ptr(), step.data_ptr(), int(step.numel() == 1)


RowsOf = Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, Tensors, torch.Tensor]]
"""(gradients [n], averages) to (the kernel's rows [rows, n], new averages, mask [n] of what may move), in torch."""


def pull_back(
    kernel: LSTMKernel,
    names: Sequence[str],
    inputs: Inputs,
    scale: float,
    rows_of: RowsOf,
    theta: Tensors,
    grads: torch.Tensor,
    params: torch.Tensor,
    state: Tensors,
    d_update: torch.Tensor,
    d_state: Tensors,
) -> tuple[Tensors, torch.Tensor, torch.Tensor, Tensors]:
    """`UpdateRule.vjp` by a kernel: the network is the kernel's, the few numbers a coordinate before it autograd's.

    Args:
        kernel, inputs, scale: what the rule runs with.
        names: the rule's weights in theta.
        rows_of: computes the network's inputs.
        theta, grads, params, state, d_update, d_state: as in `UpdateRule.vjp`.
    """
    grads = grads.detach().requires_grad_()
    averages = {n: v.detach().requires_grad_() for n, v in state.items() if n not in ("hidden", "cell")}
    with torch.enable_grad():
        rows, after, active = rows_of(grads, averages)
    d_before = {name: d_state[name] for name in ("hidden", "cell")}
    flat, d_rows = kernel.vjp(flatten(theta, names), inputs, scale, rows.detach(), active, state, d_update, d_before)
    d_grads, *d_averages = torch.autograd.grad(
        [rows, *after.values()],
        [grads, *averages.values()],
        [d_rows, *(d_state[name] for name in after)],
        allow_unused=True,
        materialize_grads=True,
    )
    d_all = {**d_before, **dict(zip(averages, d_averages))}
    return unflatten(flat, names, theta), d_grads, torch.zeros_like(params), {name: d_all[name] for name in state}
