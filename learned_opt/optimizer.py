"""`LearnedOptimizer`: an exported optimizer as a `torch.optim.Optimizer`.

The class is a shell: it finds parameters, gradients and state, and lets the same pure rule that was meta-trained
move them (`learned_opt.coordinates`). Where it differs from the optimizers of torch:

- `lr` multiplies what the rule proposes, and is 1 unless you have a reason. A group with lr 0 is frozen: neither its
  parameters nor its memory move, so that the dummy step of a distributed checkpoint leaves no trace.
- State is kept in float32 for parameters of lower precision, and comes back from `load_state_dict` to the bit.
- A group's "weights" names the learned weights and their hash; state of other weights is refused.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from learned_opt import artifact as artifacts
from learned_opt.artifact import Artifact
from learned_opt.coordinates import STEP, Blocks, Entry, Rates, StateLayout, default_chunk_size, local, step_entries
from learned_opt.task import Tensors

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)

Weights = str | os.PathLike[str] | Artifact


class LearnedOptimizer(torch.optim.Optimizer):
    """Trains a model with a learned update rule; takes the place of, say, `torch.optim.AdamW`.

    Args:
        params: parameters, named parameters, or groups of them, as for every optimizer of torch. Floating point, real.
            A group may override lr, weight_decay, maximize and weights.
        weights: the learned optimizer: the path of an exported file, the name of one that ships, "adam" for plain Adam
            at 1e-3, or an `Artifact`.
        lr: non-negative multiplier of the learned update; schedulers act on it.
        weight_decay: non-negative; a step first multiplies parameters by 1 − lr·weight_decay. AdamW at its defaults
            removes 1e-5 of a parameter per step, which is weight_decay=1e-5 here.
        maximize: climb the loss instead of descending it.
        state_dtype: how state is stored; by default float32 (float64 for float64 parameters). torch.bfloat16 halves it.
        chunk_size: coordinates per call of the rule, which bounds the memory of temporaries; None for as many as fit
            into a core's cache.

    Raises:
        ValueError: an argument out of range, or weights that cannot be used.
        FileNotFoundError: weights that name a file that does not exist.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: Weights = "compact",
        *,
        lr: float | torch.Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            names = ", ".join(map(str, STATE_DTYPES))
            raise ValueError(f"state_dtype must be None or one of {names}; got {state_dtype}")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"chunk_size must be None or a number of coordinates, at least 1; got {chunk_size!r}")
        self.state_dtype = state_dtype
        self.chunk_size = chunk_size
        self.artifacts: dict[str, Artifact] = {}
        self._forget_caches()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "weights": self._register(weights)}
        _check_group(defaults)
        super().__init__(params, defaults)

    def _forget_caches(self) -> None:
        self._layouts: dict[str, StateLayout] = {}
        self._thetas: dict[str, Tensors] = {}
        self._blocks = Blocks()
        self._incoming: dict[Any, Any] | None = None

    def _register(self, weights: Weights) -> str:
        artifact = artifacts.load(weights)
        self.artifacts[artifact.identity] = artifact
        return artifact.identity

    def _artifact(self, group: dict[str, Any]) -> Artifact:
        # Wrappers such as ZeroRedundancyOptimizer copy the group as the user wrote it over ours: a path, say.
        if group["weights"] not in self.artifacts:
            group["weights"] = self._register(group["weights"])
        return self.artifacts[group["weights"]]

    def _layout(self, group: dict[str, Any]) -> StateLayout:
        artifact = self._artifact(group)
        if artifact.identity not in self._layouts:
            self._layouts[artifact.identity] = StateLayout(artifact.rule)
        return self._layouts[artifact.identity]

    def _theta(self, group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensors:
        key = f"{group['weights']} {device} {dtype}"
        if key not in self._thetas:
            self._thetas[key] = {n: v.to(device, dtype) for n, v in self._artifact(group).theta.items()}
        return self._thetas[key]

    def _row_dtype(self, param: torch.Tensor) -> torch.dtype:
        return self.state_dtype or compute_dtype(param)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train; the group may override lr, weight_decay, maximize and weights.

        Raises:
            ValueError: values out of range, parameters that are not real floating point, or already optimized.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if "weights" in param_group:
                param_group["weights"] = self._register(param_group["weights"])
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for index, param in enumerate(params):
                _check_param(param, index)
        except ValueError:
            self.param_groups.pop()
            raise

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: list[torch.Tensor],
        steps: list[torch.Tensor],
        unpack: bool,
    ) -> None:
        """Collect the group's parameters that have a gradient, with their state, made on first sight.

        `torch.compile` runs this while it traces, and reads the lists; it needs tensors that share no memory.
        """
        layout = self._layout(group)
        if unpack:
            self._blocks.unpack(self.state)
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                self._init_state(state, layout, param)
            self._theta(group, param.device, compute_dtype(param))
            params.append(param)
            grads.append(param.grad)
            rows.extend(state[key] for key in layout.keys)
            steps.append(state[STEP])

    def _init_state(self, state: dict[str, Any], layout: StateLayout, param: torch.Tensor) -> None:
        dtype = self._row_dtype(param)
        for key in layout.keys:
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        state[STEP] = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: clears the gradients, evaluates the loss, calls backward and returns the loss.

        Returns:
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            rows: list[torch.Tensor] = []
            steps: list[torch.Tensor] = []
            self._init_group(group, params, grads, rows, steps, torch.compiler.is_compiling())
            if torch.compiler.is_compiling():
                self._step_traced(group, params, grads, rows, steps)
            else:
                work.append((group, params, [dense(p, g) for p, g in zip(params, grads)], steps))
        for group, params, grads, steps in work:
            self._step_group(group, params, grads, steps)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        steps: list[torch.Tensor],
    ) -> None:
        rates = Rates(float(group["lr"]), group["weight_decay"], group["maximize"])
        if rates.lr == 0:
            return
        layout, rule = self._layout(group), self._artifact(group).rule
        buckets: dict[tuple[torch.device, torch.dtype], list[Entry]] = defaultdict(list)
        scattered: list[tuple[torch.Tensor, torch.Tensor]] = []
        for param, grad, step in zip(params, grads, steps):
            here = local(param)
            if here.numel():
                flat = here.detach().reshape(-1)
                if not here.is_contiguous():
                    scattered.append((here, flat))
                entry = Entry(param, flat, grad.reshape(-1), self.state[param], float(step))
                buckets[here.device, compute_dtype(here)].append(entry)
        chunk_size = self.chunk_size or default_chunk_size(len(layout.keys))
        for (device, dtype), entries in buckets.items():
            theta = self._theta(group, device, dtype)
            with torch.autocast(device.type, enabled=False):
                step_entries(entries, self._blocks, rule, layout, theta, dtype, rates, chunk_size)
        for here, flat in scattered:
            here.copy_(flat.view(here.shape))
        if steps:
            torch._foreach_add_(steps, 1)

    def _step_traced(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: list[torch.Tensor],
        steps: list[torch.Tensor],
    ) -> None:
        """`_step_group` for `torch.compile`: no number leaves its tensor, and the rule is called once a parameter."""
        lr, decay = group["lr"], group["weight_decay"]
        if not isinstance(lr, torch.Tensor) and lr == 0:
            return
        layout, rule = self._layout(group), self._artifact(group).rule
        for k, (param, grad) in enumerate(zip(params, grads)):
            if param.numel() == 0:
                continue
            dtype = compute_dtype(param)
            of_param = rows[k * len(layout.keys) : (k + 1) * len(layout.keys)]
            old = (
                torch.cat([row.reshape(-1) for row in of_param] or [param.new_empty(0)])
                .to(dtype)
                .view(-1, param.numel())
            )
            step = steps[k].to(param.device, dtype).view(1) if layout.has_step else None
            flat_grad = grad.reshape(-1).to(dtype)
            flat_param = param.reshape(-1).to(dtype)
            theta = self._theta(group, param.device, dtype)
            with torch.autocast(param.device.type, enabled=False):
                update, state = rule.update(
                    theta, -flat_grad if group["maximize"] else flat_grad, flat_param, layout.to_rule(old, step)
                )
            new = layout.from_rule(state, param.numel())
            if isinstance(lr, torch.Tensor):
                new = torch.where(lr == 0, old, new)
            param.copy_((flat_param * (1 - lr * decay) + lr * update).view(param.shape))
            for row, value in zip(of_param, new.unbind(0)):
                row.copy_(value.view(param.shape))
        if steps:
            torch._foreach_add_(steps, (lr != 0).to(torch.float32) if isinstance(lr, torch.Tensor) else 1)

    def __getstate__(self) -> dict[str, Any]:
        self._blocks.unpack(self.state)
        public = {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "step"}
        return {**public, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self.__dict__.get("_incoming") is not None:
            state = {**state, "state": self._incoming}
        self._forget_caches()
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there, but our defaults are our arguments

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The state by parameter index, and the groups; state tensors have memory of their own and are not copied."""
        self._blocks.unpack(self.state)
        return super().state_dict()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer with the same weights over parameters of the same shapes; copies it.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: state of other weights, another optimizer or another model; nothing has been changed then.
        """
        # Torch would cast the state to the parameters' dtype. So a last pre-hook, which sees what the user's hooks have
        # made of the dictionary, keeps the state for __setstate__, and leaves torch the groups.
        handle = self.register_load_state_dict_pre_hook(_take_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming = None

    def _adopt(self, group: dict[str, Any], param: torch.Tensor, index: int, saved: dict[str, Any]) -> dict[str, Any]:
        """A copy of one parameter's saved state, in this optimizer's dtype and on the parameter's device."""
        layout = self._layout(group)
        expected = [*layout.keys, STEP]
        missing, unknown = [key for key in expected if key not in saved], [key for key in saved if key not in expected]
        if missing or unknown:
            what = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}, which these weights do not keep"
            raise ValueError(
                f"the state of parameter {index} {what}: it was saved by another optimizer than {group['weights']}"
            )
        out: dict[str, Any] = {}
        for key in layout.keys:
            value = saved[key]
            if not isinstance(value, torch.Tensor) or value.shape != param.shape:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else value
                raise ValueError(
                    f"the state {key!r} of parameter {index} must be a tensor of the parameter's shape "
                    f"{tuple(param.shape)}; got {got}: it belongs to another model"
                )
            if hasattr(param, "to_local") != hasattr(value, "to_local"):
                raise ValueError(
                    f"parameter {index} and its state must both be sharded (DTensor) or both be plain tensors; load "
                    "it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            moved = value.to(param.device, self._row_dtype(param))
            out[key] = moved.clone(memory_format=torch.contiguous_format) if moved is value else moved
        out[STEP] = torch.as_tensor(saved[STEP], dtype=torch.float32).detach().cpu().reshape(()).clone()
        return out


def _take_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Check a state dictionary and put its state, converted, aside; returns the dictionary without it."""
    assert isinstance(optimizer, LearnedOptimizer)
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return None  # torch says what is wrong
    new_groups = []
    for group, saved in zip(groups, saved_groups):
        mine = optimizer._artifact(group).identity
        theirs = saved.get("weights", mine)
        if str(theirs).rpartition("@")[2] != mine.rpartition("@")[2]:
            raise ValueError(
                f"this state was saved under the learned weights {theirs}, but the optimizer runs {mine}; "
                "build it with the same exported file, or train on without the old state"
            )
        values = {key: group[key] for key in optimizer.defaults}
        new_groups.append({**values, **saved, "weights": mine})
    ids = itertools.chain.from_iterable(g["params"] for g in saved_groups)
    owners = [(group, param) for group in groups for param in group["params"]]
    known = dict(zip(ids, owners))
    incoming: defaultdict[Any, Any] = defaultdict(dict)
    for index, saved in state_dict["state"].items():
        if index not in known:
            incoming[index] = saved
        elif saved:
            group, param = known[index]
            incoming[param] = optimizer._adopt(group, param, index, saved)
    optimizer._incoming = incoming
    return {**state_dict, "state": {}, "param_groups": new_groups}


def _check_group(values: dict[str, Any]) -> None:
    lr = values["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element; got shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay"):
        value = values[name]
        number = float(value) if isinstance(value, (int, float, torch.Tensor)) else math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be a finite number, at least 0; got {value!r}")
    if not isinstance(values["maximize"], bool):
        raise ValueError(f"maximize must be True or False; got {values['maximize']!r}")


def _check_param(param: torch.Tensor, index: int) -> None:
    if param.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        hint = "; pass torch.view_as_real of a complex parameter's data" if param.is_complex() else ""
        raise ValueError(f"parameter {index} of the group is {param.dtype}; parameters must be one of {names}{hint}")
    if param.layout != torch.strided:
        raise ValueError(f"parameter {index} of the group has layout {param.layout}; parameters must be dense")


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """What the rule computes in: float32, or float64 for float64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def dense(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of this process's part of a parameter, strided: what a sparse one leaves out is zero."""
    if hasattr(grad, "placements") and grad.placements != getattr(param, "placements", None):
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    grad = local(grad)
    return grad if grad.layout == torch.strided else grad.to_dense()
