"""What tests of rules share that are told of whole parameter tensors: made-up context, and the real one by hand."""

from __future__ import annotations

import numpy as np
import torch

from learned_opt.rules import UpdateRule, slice_coordinates
from learned_opt.rules.context import Context
from learned_opt.task import Tensors


def told(rule: UpdateRule, n: int, num_steps: int | None = None, seed: int = 7) -> Context | None:
    """Made-up context of three tensors; nothing for a rule that takes none."""
    if not rule.num_context:
        return None
    generator = torch.Generator().manual_seed(seed)
    steps = () if num_steps is None else (num_steps,)
    values = torch.randn(*steps, rule.num_context, 3, generator=generator)
    shares = sum(rule.settings()[name] > 0 for name in ("loudness", "clip", "relative_eps"))  # the last rows
    if shares:
        values[..., -shares:, :] = values[..., -shares:, :].sigmoid()
    return Context(values, torch.randint(3, (n,), generator=generator, dtype=torch.int32).sort().values)


def in_dtype(context: Context | None, dtype: torch.dtype) -> Context | None:
    return None if context is None else Context(context.values.to(dtype), context.index)


def rows_of(context: Context | None, n: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """What `update` takes for it, behind its other arguments."""
    return () if context is None else (context.rows(n).to(dtype),)


def arguments(context: Context | None) -> tuple[Context, ...]:
    """What `backward` takes for it, behind its other arguments."""
    return () if context is None else (context,)


def agreement_by_hand(rule: UpdateRule, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
    """The context [4 to 8] of a mixture's one tensor: cosines, written as they are defined, and lengths."""
    c = rule.settings()
    average, recent = (
        beta * v + (1 - beta) * grads**2 for beta, v in zip((c["square"], c["recent_square"]), state["v"])
    )
    bound = c["square_ratio"] * recent
    square = torch.where((grads != 0) & (recent != 0) & ~(average < bound), bound, average)
    seen = square > 0
    vectors = [vector[seen] / square[seen].sqrt() for vector in (grads, *state["m"])]
    most = (recent[seen] / square[seen]).sqrt()
    fade = lambda x: torch.where(x.abs() > most, most**2 / torch.where(x == 0, 1.0, x), x)  # noqa: E731
    now, first, second, third = *vectors[:2], *(fade(vector) for vector in vectors[2:])
    both, all_three = first + second, first + second + third
    cosines = []
    for one, other in ((now, first), (now, both), (now, all_three), (first, all_three)):
        norms = one.norm() * other.norm()
        cosines.append(one @ other / norms if norms > 0 else torch.zeros_like(norms))
    if c["signal"] and now.norm() > 0:
        age = state["step"][seen] if state["step"].numel() > 1 else state["step"]
        cosines.append((third / (1 - c["slow"] ** age.clamp_min(1))).norm() / now.norm())
    elif c["signal"]:
        cosines.append(torch.zeros_like(cosines[0]))
    values = torch.stack(cosines)
    told = 10 * values / (1 + 10 * values.abs())
    if c["loudness"]:
        heard = now[now != 0]
        loudness = c["loudness"] * (heard**2).mean() if len(heard) else told.new_zeros(())
        told = torch.cat([told, loudness.clamp_max(1)[None]])
    if c["clip"]:
        before = state["v"][1].sum() / (1 - c["recent_square"] ** state["step"].max().clamp_min(1))
        length, most = grads.norm(), c["clip"] * before.sqrt()
        told = torch.cat([told, (most / length if length > most > 0 else torch.ones_like(length))[None]])
    if c["relative_eps"]:
        largest = state["v"][2]
        squares = largest[largest != 0]
        root = squares.mean().sqrt() if len(squares) else told.new_zeros(())
        told = torch.cat([told, c["relative_eps"] * root[None]])
    return told


def update_by_hand(
    rule: UpdateRule, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors, sizes: list[int]
) -> tuple[torch.Tensor, Tensors]:
    """`rule.update` on tensors of these sizes, one after another, each alone and told of itself."""
    if not rule.num_context:
        return rule.update(theta, grads, params, state)
    updates, states, start = [], [], 0
    for size in sizes:
        stop = start + size
        mine, grad = slice_coordinates(state, start, stop), grads[start:stop]
        rows = agreement_by_hand(rule, grad, mine)[:, None].expand(-1, size)
        update, after = rule.update(theta, grad, params[start:stop], mine, rows)
        updates.append(update)
        states.append(after)
        start = stop
    assert start == len(grads)
    return torch.cat(updates), {name: torch.cat([s[name] for s in states], -1) for name in states[0]}


class BasesByHand:
    """The bases of tensors of these shapes, one matrix and one column at a time, in NumPy and float64."""

    def __init__(self, rule: UpdateRule, shapes: list[tuple[int, ...]]) -> None:
        self.rule, self.shapes, self.step = rule, shapes, 0
        self.known: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def before(self, grads: torch.Tensor, state: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Flat gradients and rule state as the rule is to see them in the step that comes."""
        settings = self.rule.settings()
        grads, state = grads.clone(), {name: value.clone() for name, value in state.items()}
        for k, (start, stop) in enumerate(self._places()):
            rows, longest = self.shapes[k][0], settings["basis"]
            if min(rows, (stop - start) // rows) < 2:
                rows, longest = stop - start, settings["basis_vectors"]
                if not 2 <= rows <= longest:
                    continue
            matrix = grads[start:stop].numpy().reshape(rows, -1).astype(np.float64)
            turns = []
            for side, own in (("left", matrix), ("right", matrix.T)):
                size = len(own)
                average, vectors = self.known.get((k, side), (np.zeros((size, size)), np.eye(size)))
                old = vectors
                average = settings["basis_decay"] * average + (1 - settings["basis_decay"]) * own @ own.T
                if size <= longest and self.step % settings["basis_every"] == 0:
                    vectors = _gram_schmidt(average / max(np.trace(average), 1e-300) @ vectors + 1e-4 * vectors)
                self.known[k, side] = average, vectors
                turns.append((old, vectors))
            (old_u, u), (old_v, v) = turns
            seen = u.T @ matrix @ v
            seen[np.abs(seen) < 8 * torch.finfo(grads.dtype).eps * np.abs(seen).max()] = 0
            grads[start:stop] = torch.as_tensor(seen.reshape(-1))
            if self.step:
                for row in state["m"]:
                    remembered = row[start:stop].numpy().reshape(matrix.shape)
                    row[start:stop] = torch.as_tensor((u.T @ old_u @ remembered @ old_v.T @ v).reshape(-1))
        self.step += 1
        return grads, state

    def after(self, update: torch.Tensor) -> torch.Tensor:
        """The update that the rule made, in the tensors' own coordinates; differentiable."""
        parts = []
        for k, (start, stop) in enumerate(self._places()):
            part = update[start:stop]
            if (k, "left") in self.known:
                u, v = (torch.as_tensor(self.known[k, side][1]).to(update.dtype) for side in ("left", "right"))
                part = (u @ part.reshape(len(u), -1) @ v.T).reshape(-1)
            parts.append(part)
        return torch.cat(parts)

    def _places(self) -> list[tuple[int, int]]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes]).tolist()
        return list(zip([0, *ends[:-1]], ends))


def _gram_schmidt(columns: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span, one by one, what the first, second, … columns span; twice, for accuracy."""
    for _ in range(2):
        done: list[np.ndarray] = []
        for column in columns.T:
            for other in done:
                column = column - other * (other @ column)
            done.append(column / np.linalg.norm(column))
        columns = np.stack(done, 1)
    return columns


def step_by_hand(
    rule: UpdateRule,
    theta: Tensors,
    grads: torch.Tensor,
    params: torch.Tensor,
    state: Tensors,
    shapes: list[tuple[int, ...]],
    bases: BasesByHand | None,
) -> tuple[torch.Tensor, Tensors]:
    """`update_by_hand` in bases kept by hand, if the rule has any; they are constants to autograd."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    if bases is None:
        return update_by_hand(rule, theta, grads, params, state, sizes)
    constant = {name: state[name].detach() for name in rule.linear_state}
    seen, turned = bases.before(grads.detach(), constant)
    update, after = update_by_hand(rule, theta, seen, params, {**state, **turned}, sizes)
    return bases.after(update), after


def bases_by_hand(rule: UpdateRule, shapes: list[tuple[int, ...]]) -> BasesByHand | None:
    return BasesByHand(rule, shapes) if rule.basis else None


def loud(theta: Tensors, generator: torch.Generator) -> Tensors:
    """Theta whose growth, if it has any, hears all of its inputs and of the network."""
    if "output.skip" not in theta:
        return theta
    weight, skip = theta["output.weight"].clone(), theta["output.skip"]
    weight[-1] = torch.randn(weight[-1].shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return {
        **theta,
        "output.weight": weight,
        "output.skip": torch.randn(skip.shape, generator=generator, dtype=torch.float64).to(skip.dtype),
    }
