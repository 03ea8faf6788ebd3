"""Imitation of a teacher on a share of the episodes, beside another estimator on the rest (Chen et al. 2020).

On the imitating episodes the auxiliary loss of a truncation is

    Σ |u_t(theta) − ū_t|² / Σ |ū_t|²

over its inner steps and coordinates, with u the updates of the rule and ū those of the teacher, which see the same
gradients and parameters: zero for a rule that does what the teacher does, one for a rule that does nothing. The
gradients and parameters along the way are constants, so its derivative is exact and needs no derivative of a task.
"off" policy, the teacher moves the parameters; "on" policy, the rule does, and the teacher says what it would have
done there.

The rule's state and the teacher's are carried from truncation to truncation, and reset with the episode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from learned_opt import rules
from learned_opt.estimators.antithetic import flatten, unflatten
from learned_opt.estimators.backprop import in_order_of_ids
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.sharded import mean_over_ranks, sharded, with_own_counts
from learned_opt.estimators.table import SINGLE, make
from learned_opt.particles import Particles, columns_of, join_states, select_state, start_particles
from learned_opt.rules.base import UpdateRule, fitting_chunk, slice_coordinates
from learned_opt.rules.context import TensorLayout, told
from learned_opt.segment import Run, Segment
from learned_opt.task import Tensors
from learned_opt.unroll import unroll

POLICIES = ("off", "on")


@dataclasses.dataclass
class ImitationState:
    """What both shares carry.

    Attributes:
        inner: the other estimator's state; None if every particle of this rank imitates.
        particles: the imitating ones, with the state of whoever moves the parameters; None if none of this rank does.
        follower: the rule state of the other one, tensors [..., P · num_parameters].
        some_rest, some_imitate: whether there are particles that do not imitate, and that do, on any rank.
    """

    inner: Any
    particles: Particles | None
    follower: Tensors
    some_rest: bool
    some_imitate: bool


class Imitation(Estimator):
    """Another estimator's meta-gradient plus `weight` times that of imitating a teacher.

    Args:
        teacher: name of the teacher's update rule.
        teacher_settings: its settings, for example `{"lr": 1e-3}` for "adam".
        teacher_theta: its meta-parameters; those it starts from by default, which is what "adam" and "sgd" need.
        policy: "off" (the teacher moves the parameters) or "on" (the rule does).
        share: of the episodes, in (0, 1]. Particles imitate in twos, chosen by their index in the whole run.
        weight: of the auxiliary loss, positive.
        estimator: name of the estimator on the other episodes; one of "backprop", "es", "pes", "nres".
        estimator_settings: its settings.
    """

    kind: ClassVar[str] = "imitation"
    spans_ranks: ClassVar[bool] = True

    def __init__(
        self,
        teacher: str = "adam",
        teacher_settings: Mapping[str, Any] | None = None,
        teacher_theta: Tensors | None = None,
        policy: str = "off",
        share: float = 0.3,
        weight: float = 1.0,
        estimator: str = "backprop",
        estimator_settings: Mapping[str, Any] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}; got {policy!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1]; got {share}")
        if not weight > 0:
            raise ValueError(f"weight must be positive; got {weight}")
        self.teacher: UpdateRule = rules.get(teacher, **(teacher_settings or {}))
        self.teacher_theta = teacher_theta or self.teacher.init_theta(torch.Generator().manual_seed(0))
        self.policy = policy
        self.share = share
        self.weight = weight
        self.inner = sharded(make(SINGLE, estimator, estimator_settings or {}))
        # The way that imitation takes is constant, so that initial parameters learn from the other episodes alone.
        self.trains_initial_params = share < 1

    def imitates(self, particle: int) -> bool:
        """Whether the particle with this index in the whole run imitates."""
        two = particle // 2
        return math.floor((two + 1) * self.share) > math.floor(two * self.share)

    def _leader(self, work: Workload) -> UpdateRule:
        return self.teacher if self.policy == "off" else work.rule

    def _follower(self, work: Workload) -> UpdateRule:
        return work.rule if self.policy == "off" else self.teacher

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> ImitationState:
        """Particles at the start of their first episode.

        Raises:
            ValueError: a rule or a teacher that takes parameters in a basis, on tasks that have such.
        """
        for who, rule in (("rule", work.rule), ("teacher", self.teacher)):
            if rule.turns(work.batched.shapes):
                raise ValueError(
                    f"imitation compares updates coordinate by coordinate, and {who} {rule.kind!r} takes parameters "
                    f"in a basis of its own; use another estimator, or a {who} without (basis=0)"
                )
        chosen = [i for i in ids if self.imitates(i)]
        rest = [i for i in ids if not self.imitates(i)]
        inner = self.inner.init(work, theta, rest) if rest else None
        mine = work.ranks.share(chosen, first=chosen[0]) if chosen else []
        if not mine:
            return ImitationState(inner, None, {}, bool(rest), bool(chosen))
        particles = start_particles(work.batched, self._leader(work), work.plan, mine)
        return ImitationState(inner, particles, self._fresh(work, len(mine)), bool(rest), True)

    def _fresh(self, work: Workload, num_particles: int) -> Tensors:
        return self._follower(work).init_state(
            num_particles * work.batched.num_parameters, dtype=work.batched.dtype, device=work.batched.device
        )

    def estimate(self, work: Workload, theta: Tensors, state: ImitationState) -> Estimate:
        inner = self.inner.estimate(work, theta, state.inner) if state.some_rest else None
        if not state.some_imitate:
            assert inner is not None
            return inner
        own = self._imitation(work, theta, state)
        if inner is None:
            return own
        inner = with_own_counts(mean_over_ranks([inner], work.ranks)[0][0], inner)
        own = with_own_counts(mean_over_ranks([own], work.ranks)[0][0], own)
        grads = own.grads
        return Estimate(
            grads={n: g + grads[n] for n, g in inner.grads.items()},
            meta_loss=inner.meta_loss,
            num_inner_steps=inner.num_inner_steps + own.num_inner_steps,
            num_invalid=inner.num_invalid + own.num_invalid,
            num_clipped=inner.num_clipped + own.num_clipped,
            metrics={**inner.metrics, **own.metrics},
        )

    def _imitation(self, work: Workload, theta: Tensors, state: ImitationState) -> Estimate:
        """The imitating particles' estimate: gradients of all ranks, everything else of this one."""
        reference = next(iter(theta.values()))
        if state.particles is None:
            total = {n: torch.zeros_like(v) for n, v in theta.items()}
            error = norm = reference.new_zeros(())
            losses = initial = reference.new_zeros(work.truncation, 0)
            valid = torch.ones_like(losses[0], dtype=torch.bool)
        else:
            total, error, norm, segment = self._imitate(work, theta, state, state.particles)
            losses, initial, valid = segment.losses, segment.initial, segment.valid
        meta_loss = work.meta_loss(losses, initial, valid, work.ranks.sum) if work.ranks.size > 1 else None
        if meta_loss is None:
            meta_loss = work.meta_loss(losses, initial, valid)
        error, norm, flat = (
            part.squeeze() if part.numel() == 1 else part
            for part in work.ranks.sum(torch.cat([error[None], norm[None], flatten(total)])).split(
                [1, 1, sum(v.numel() for v in total.values())]
            )
        )
        scale = 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        grads = {n: v * scale * self.weight for n, v in unflatten(flat.reshape(-1), theta).items()}
        return Estimate(
            grads={n: torch.zeros_like(g) if n in work.frozen else g for n, g in grads.items()},
            meta_loss=float(meta_loss),
            num_inner_steps=work.truncation * len(valid),
            num_invalid=int((~valid).sum()),
            num_clipped=work.meta_loss.num_clipped(losses, initial),
            metrics={"imitation_loss": float(error * scale)},
            weight=float(valid.sum()),
        )

    def _imitate(
        self, work: Workload, theta: Tensors, state: ImitationState, particles: Particles
    ) -> tuple[Tensors, torch.Tensor, torch.Tensor, Segment]:
        """(gradient of Σ|u − ū|², its value, Σ|ū|², the segment), advancing the state."""
        reference = next(iter(theta.values()))
        teacher_theta = {n: v.to(reference.device, reference.dtype) for n, v in self.teacher_theta.items()}
        leader_theta = teacher_theta if self.policy == "off" else theta
        segment = unroll(
            self._leader(work),
            leader_theta,
            work.batched,
            work.plan,
            particles,
            work.truncation,
            record="gradients",
            initial_params=work.initial_params(theta),
        )
        total = {n: torch.zeros_like(v) for n, v in theta.items()}
        follower = self._fresh(work, len(particles))
        error = torch.zeros((), dtype=reference.dtype, device=reference.device)
        norm = torch.zeros_like(error)
        for run in segment.runs:
            columns = torch.arange(len(particles), device=reference.device) if run.columns is None else run.columns
            kept = segment.valid[columns]
            end, run_error, run_norm = self._replay(
                work, theta, teacher_theta, state.follower, segment, run, columns, kept, total
            )
            error, norm = error + run_error, norm + run_norm
            if run.stop == work.truncation:
                at_start = torch.tensor([particles.steps[c] == 0 for c in columns.tolist()], device=reference.device)
                follower = _put(follower, end, columns[kept], ~at_start[kept], len(particles))
        state.follower = follower
        return total, error, norm, segment

    def _replay(
        self,
        work: Workload,
        theta: Tensors,
        teacher_theta: Tensors,
        carried: Tensors,
        segment: Segment,
        run: Run,
        columns: torch.Tensor,
        kept: torch.Tensor,
        total: Tensors,
    ) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
        """Replay teacher and rule over one run; adds to `total`.

        Returns:
            (the follower's state at its end, Σ|u − ū|², Σ|ū|²).
        """
        assert segment.inputs is not None
        grads = segment.inputs[run.start : run.stop, columns[kept]].flatten(1)
        leader_state = columns_of(run.rule_state, kept.nonzero().flatten(), len(columns))
        if run.start:
            follower_state = self._fresh(work, int(kept.sum()))
        else:
            follower_state = columns_of(carried, columns[kept], len(segment.valid))
        params = run.params[kept].reshape(-1)
        off = self.policy == "off"
        states = (follower_state, leader_state) if off else (leader_state, follower_state)
        ends: list[Tensors] = []
        error, norm = grads.new_zeros(()), grads.new_zeros(())
        leaves = {n: v.detach().requires_grad_() for n, v in theta.items()}
        chunk_size = max(1, fitting_chunk(work.rule) // 2)  # the graph of all steps is kept
        size = work.batched.num_parameters
        if work.rule.num_context or self.teacher.num_context:
            chunk_size = max(1, chunk_size // size) * size  # what such rules are told is of whole tensors
        for start in range(0, grads.shape[1], chunk_size):
            part = slice(start, min(start + chunk_size, grads.shape[1]))
            layout = TensorLayout(work.batched.sizes, (part.stop - part.start) // size)
            rule_state, teacher_state = (slice_coordinates(s, part.start, part.stop) for s in states)
            at, chunk_error = params[part], grads.new_zeros(())
            for grad in grads[:, part]:
                with torch.no_grad():
                    more = told(self.teacher, grad, teacher_state, layout)
                    goal, teacher_state = self.teacher.update(teacher_theta, grad, at, teacher_state, *more)
                    more = told(work.rule, grad, rule_state, layout)
                with torch.enable_grad():
                    update, rule_state = work.rule.update(leaves, grad, at, rule_state, *more)
                    chunk_error = chunk_error + (update - goal).square().sum()
                norm = norm + goal.square().sum()
                at = at + (goal if off else update.detach())
            out = torch.autograd.grad(chunk_error, list(leaves.values()), allow_unused=True)
            for name, value in zip(leaves, out):
                if value is not None:
                    total[name] += value
            error = error + chunk_error.detach()
            ends.append({n: v.detach() for n, v in (rule_state if off else teacher_state).items()})
        if not ends:
            return follower_state, error, norm
        return {n: torch.cat([e[n] for e in ends], dim=-1) for n in ends[0]}, error, norm

    def horizons(self, state: ImitationState) -> list[int]:
        own = [] if state.particles is None else list(state.particles.horizons)
        return own + ([] if state.inner is None else self.inner.horizons(state.inner))

    def state_dict(self, state: ImitationState) -> dict[str, Any]:
        return {
            "inner": None if state.inner is None else self.inner.state_dict(state.inner),
            "particles": None if state.particles is None else state.particles.state_dict(),
            "follower": dict(state.follower),
        }

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> ImitationState:
        particles, follower = saved["particles"], saved["follower"]
        if particles is not None and work.ranks.size > 1:
            columns = work.ranks.share(range(len(particles["ids"])), first=particles["ids"][0])
            mine = _without_follower(select_state(_with_follower(particles, follower), columns)) if columns else {}
            particles, follower = mine.get("particles"), mine.get("follower", {})
        return ImitationState(
            inner=None if saved["inner"] is None else self.inner.load_state_dict(work, saved["inner"]),
            particles=None
            if particles is None
            else Particles.from_state_dict(particles, work.batched, work.plan.split),
            follower={n: v.to(work.batched.device) for n, v in follower.items()},
            some_rest=saved["inner"] is not None,
            some_imitate=saved["particles"] is not None,
        )

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        present = [part for part in parts if part["particles"] is not None]
        merged: dict[str, Any] = {"inner": self.inner.merge([part["inner"] for part in parts])}
        if not present:
            return {**merged, "particles": None, "follower": {}}
        joined = join_states([_with_follower(part["particles"], part["follower"]) for part in present])
        return {**merged, **_without_follower(in_order_of_ids(joined))}


def _with_follower(particles: dict[str, Any], follower: Tensors) -> dict[str, Any]:
    """A `Particles.state_dict` that carries the follower's state beside the leader's."""
    both = {f"leader.{n}": v for n, v in particles["rule_state"].items()}
    return {**particles, "rule_state": {**both, **{f"follower.{n}": v for n, v in follower.items()}}}


def _without_follower(joined: dict[str, Any]) -> dict[str, Any]:
    """The inverse: {"particles": …, "follower": …}."""
    states: dict[str, Tensors] = {"leader": {}, "follower": {}}
    for name, value in joined["rule_state"].items():
        whose, _, rest = name.partition(".")
        states[whose][rest] = value
    return {"particles": {**joined, "rule_state": states["leader"]}, "follower": states["follower"]}


def _put(state: Tensors, values: Tensors, columns: torch.Tensor, which: torch.Tensor, num_particles: int) -> Tensors:
    """`state` [..., P · D] with the columns where `which` holds replaced by those of `values` [..., k · D]."""
    if not which.any():
        return state
    picked = columns_of(values, which.nonzero().flatten(), len(columns))
    count = int(which.sum())
    return {
        n: v.unflatten(-1, (num_particles, -1))
        .index_copy(-2, columns[which], picked[n].unflatten(-1, (count, -1)))
        .flatten(-2)
        for n, v in state.items()
    }
