"""`LearnedOptimizer`: an exported optimizer as a `torch.optim.Optimizer`.

The class is a shell: it finds parameters, gradients and state, and lets the same pure rule that was meta-trained
move them (`learned_opt.coordinates`). Where it differs from the optimizers of torch:

- `lr` multiplies what the rule proposes, and is 1 unless you have a reason. A group with lr 0 is frozen: neither its
  parameters nor its memory move, so that the dummy step of a distributed checkpoint leaves no trace.
- State is kept in float32 for parameters of lower precision, and comes back from `load_state_dict` to the bit.
- A group's "weights" names the learned weights and their hash; state of other weights is refused.
- A rule that is told of whole tensors (`learned_opt.rules.context`) is told of every parameter, of all its parts where
  it is sharded as a DTensor. A wrapper that flattens parameters or cuts plain tensors makes other tensors of them.
- On a GPU with Triton, an LSTM without guard steps in one kernel, once that has been found to agree with the rule. The
  environment variable LEARNED_OPT_FUSED=0 turns it off (`learned_opt.rules.kernels.fused`).
- On a CPU with a C++ compiler, an LSTM steps in a kernel that is compiled when it is first used;
  LEARNED_OPT_NATIVE=0 turns it off (`learned_opt.rules.kernels.native`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from learned_opt import artifact as artifacts
from learned_opt import guard as guards
from learned_opt import guarded, optimizer_state, parameter_basis, traced
from learned_opt.artifact import Artifact
from learned_opt.blocks import Blocks, local
from learned_opt.coordinates import (
    STEP,
    Entry,
    Program,
    Rates,
    StateLayout,
    compute_dtype,
    default_chunk_size,
    dense,
)
from learned_opt.guard import GuardConfig, Watch
from learned_opt.optimizer_checks import check_group, check_param, check_settings, number_of
from learned_opt.rules.inplace import Scratch, prepare
from learned_opt.task import Tensors

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
        chunk_size: coordinates per call of the rule, which bounds the memory of temporaries and changes no number;
            None for as many as fit into a core's cache; on a GPU, into 256 MiB.
        guard: whether to guard against ruin, at 12 more bytes a parameter; see `learned_opt.guard`, and pass the loss
            to `step`. Not for sharded parameters and compiled steps.

    Attributes:
        watch: what the guard has seen and done; None without one.

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
        guard: bool | GuardConfig = False,
    ) -> None:
        check_settings(state_dtype, chunk_size, guard)
        self.guard = (guard if isinstance(guard, GuardConfig) else GuardConfig()) if guard else None
        self.watch = Watch() if guard else None
        self.state_dtype = state_dtype
        self.chunk_size = chunk_size
        self.artifacts: dict[str, Artifact] = {}
        self._forget_caches()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "weights": self._register(weights)}
        check_group(defaults)
        super().__init__(params, defaults)

    def _forget_caches(self) -> None:
        self._layouts: dict[str, StateLayout] = {}
        self._thetas: dict[str, Tensors] = {}
        self._prepared: dict[int, Scratch] = {}  # by the id of one of these thetas
        self._blocks, self._bases = Blocks(), Blocks()
        self._incoming: dict[Any, Any] | None = None

    def _unpack(self) -> None:
        """Give every state tensor memory of its own."""
        self._blocks.unpack(self.state)
        self._bases.unpack(self.state)

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
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for index, param in enumerate(params):
                check_param(param, index)
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
        compiling: bool,
    ) -> None:
        """Collect the group's parameters that have a gradient, with their state, made on first sight.

        `torch.compile` runs this while it traces, and reads the lists: it alone needs rows, which share no memory.
        """
        if compiling:
            self._unpack()
        for param in group["params"]:
            if param.grad is None:
                continue
            if self.guard is not None and hasattr(param, "to_local"):
                raise ValueError("the guard does not support sharded parameters (DTensor); build the optimizer without")
            state = self.state[param]
            if not state:
                self._init_state(state, group, param)
            self._theta(group, param.device, compute_dtype(param))
            params.append(param)
            grads.append(param.grad)
            if compiling:
                rows.extend(state[key] for key in self._state_dtypes(group, param))
            steps.append(state[STEP])

    def _state_dtypes(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.dtype]:
        """The tensors of a parameter's state, and how each is stored."""
        rule_state = dict.fromkeys(self._layout(group).keys, self.state_dtype or compute_dtype(param))
        basis = parameter_basis.keys_of(self._artifact(group).rule, param)
        return rule_state | dict.fromkeys(basis, compute_dtype(param))  # a bfloat16 is too coarse for a basis

    def _init_state(self, state: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> None:
        for key, dtype in self._state_dtypes(group, param).items():
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        state[STEP] = torch.zeros((), dtype=torch.float32)
        if self.guard is not None:
            guarded.init_state(state, param, compute_dtype(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | torch.Tensor | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: clears the gradients, evaluates the loss, calls backward and returns the loss.
            loss: the loss that the gradients belong to, for the guard; a closure gives it anyway.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: a guarded step is to be compiled.
            ValueError: the guard is given a loss that is not one number; nothing has been changed then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        compiling = torch.compiler.is_compiling()
        if compiling and self.guard is not None:
            raise RuntimeError("a guarded step cannot be compiled; leave optimizer.step() out of torch.compile")
        work = []
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            rows: list[torch.Tensor] = []
            steps: list[torch.Tensor] = []
            self._init_group(group, params, grads, rows, steps, compiling)
            if compiling:
                self._step_traced(group, params, grads, rows, steps)
            elif float(group["lr"]) != 0:
                work.append((group, params, [dense(p, g) for p, g in zip(params, grads)], steps))
        if work and self.guard is not None:
            self._step_guarded(work, result if closure is not None else loss)
            return result
        for group, params, grads, steps in work:
            for entries, program in self._programs(group, params, grads, steps):
                parameter_basis.step(program, entries, self._blocks, self._bases)
                _put_back(entries)
            if steps:
                torch._foreach_add_(steps, 1)
        return result

    def _programs(
        self, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], steps: Sequence[Any]
    ) -> list[tuple[list[Entry], Program]]:
        """The parameters as coordinates, by device and computing dtype, each with what to run on them."""
        buckets: dict[tuple[torch.device, torch.dtype], list[Entry]] = defaultdict(list)
        sharded: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        elsewhere: dict[tuple[torch.device, torch.dtype], list[Entry]] = defaultdict(list)
        for param, grad, step in zip(params, grads, steps):
            here = local(param).detach()
            bucket = here.device, compute_dtype(here)
            if hasattr(param, "placements"):
                sharded[bucket].append(param)
                buckets[bucket]  # also where all that is here is empty: the others wait for it
            entry = Entry(param, here.reshape(-1), grad.reshape(-1), self.state[param], float(step))
            if here.numel():
                buckets[bucket].append(entry)
            elif hasattr(param, "placements"):
                elsewhere[bucket].append(entry)
        rule, layout = self._artifact(group).rule, self._layout(group)
        rates = Rates(float(group["lr"]), group["weight_decay"], group["maximize"])
        out = []
        for (device, dtype), entries in buckets.items():
            size = self.chunk_size or default_chunk_size(len(layout.keys), device.type)
            theta = self._theta(group, device, dtype)
            if id(theta) not in self._prepared:
                self._prepared[id(theta)] = prepare(rule, theta)
            others = sharded[device, dtype], elsewhere[device, dtype]
            out.append((entries, Program(rule, layout, theta, dtype, rates, size, self._prepared[id(theta)], *others)))
        return out

    def _step_guarded(self, work: Sequence[Any], loss: float | torch.Tensor | None) -> None:
        assert self.guard is not None and self.watch is not None
        value = None
        if loss is not None:
            value = number_of(loss) * (-1 if self.param_groups[0]["maximize"] else 1)
            before, learned = self.watch.num_fallbacks, self.watch.learned
            action = self.watch.observe(value, self.guard)
            for param, state in self.state.items():
                if guarded.ACCEPTED not in state:
                    continue
                if action != "go on":
                    (guarded.accept if action == "accept" else guarded.restore)(param, state)
                if learned and not self.watch.learned:
                    guarded.restart_adam(state)
            if self.watch.num_fallbacks > before == 0:
                guards.announce()
            if action == "restore":
                return  # The gradients belong to the point that was left.
        learned = self.watch.learned
        proposals = [
            pair for group, params, grads, steps in work for pair in self._programs(group, params, grads, steps)
        ]
        if guarded.step(
            proposals,
            lambda entries, program: parameter_basis.propose(program, entries, self._blocks, self._bases),
            self.watch,
            self.guard,
            value,
        ):
            for entries, _ in proposals:
                _put_back(entries)
            for _, _, _, steps in work:
                if steps and learned:
                    torch._foreach_add_(steps, 1)

    def _step_traced(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: list[torch.Tensor],
        steps: list[torch.Tensor],
    ) -> None:
        lr, decay, maximize = group["lr"], group["weight_decay"], group["maximize"]
        if not isinstance(lr, torch.Tensor) and lr == 0:
            return
        layout, rule = self._layout(group), self._artifact(group).rule
        start = 0
        for k, (param, grad) in enumerate(zip(params, grads)):
            stop = start + len(self._state_dtypes(group, param))
            mine, start = rows[start:stop], stop
            if param.numel():
                theta = self._theta(group, param.device, compute_dtype(param))
                traced.step_param(
                    param, grad, mine, steps[k], rule, layout, theta, lr=lr, weight_decay=decay, maximize=maximize
                )
        if steps:
            torch._foreach_add_(steps, (lr != 0).to(torch.float32) if isinstance(lr, torch.Tensor) else 1)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
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
        self._unpack()
        if self.watch is not None:
            self.param_groups[0]["guard"] = self.watch.dumps()
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


def _take_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Check a state dictionary and put its state, converted, aside; returns the dictionary without it."""
    assert isinstance(optimizer, LearnedOptimizer)
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return None  # torch says what is wrong
    new_groups, owners = [], []
    for group, saved in zip(groups, saved_groups):
        mine = optimizer._artifact(group).identity
        optimizer_state.check_weights(saved, mine)
        values = {key: group[key] for key in optimizer.defaults}
        new_groups.append({**values, **saved, "weights": mine})
        guarded_too = optimizer.guard is not None
        for p in group["params"]:
            dtypes = optimizer._state_dtypes(group, p)
            owners.append(optimizer_state.Owner(param=p, weights=mine, dtypes=dtypes, guarded=guarded_too))
    watch = new_groups[0].pop("guard", None)
    indices = [index for saved in saved_groups for index in saved["params"]]
    optimizer._incoming = optimizer_state.adopt_all(state_dict["state"], indices, owners)
    if optimizer.watch is not None and watch is not None:
        optimizer.watch = Watch.loads(watch)
    return {**state_dict, "state": {}, "param_groups": new_groups}


def _put_back(entries: Iterable[Entry]) -> None:
    """Write the result into parameters whose memory is not one stretch, of which the entries hold copies."""
    for entry in entries:
        here = local(entry.key).detach()
        if not here.is_contiguous():
            here.copy_(entry.param.view(here.shape))
