"""Taking over saved state: what `LearnedOptimizer.load_state_dict` checks and converts, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from learned_opt import guarded
from learned_opt.coordinates import STEP, compute_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """What a parameter's state must be like.

    Attributes:
        param: the parameter.
        weights: identity of the learned weights that move it.
        dtypes: the tensors of state that they keep, by name, and how each is stored.
        guarded: whether the guard's memory is kept too.
    """

    param: torch.Tensor
    weights: str
    dtypes: Mapping[str, torch.dtype]
    guarded: bool


def check_weights(saved: dict[str, Any], mine: str) -> None:
    """Raise ValueError if a saved group was trained with other learned weights; the hash decides, not the name."""
    theirs = str(saved.get("weights", mine))
    if theirs.rpartition("@")[2] != mine.rpartition("@")[2]:
        raise ValueError(
            f"this state was saved under the learned weights {theirs}, but the optimizer runs {mine}; "
            "build it with the same exported file, or train on without the old state"
        )


def adopt_all(
    saved: dict[Any, Any], indices: Sequence[Any], owners: Sequence[Owner]
) -> defaultdict[Any, dict[str, Any]]:
    """The saved state by parameter, converted and copied; entries that belong to no parameter are kept as they are.

    Args:
        saved: state by index.
        indices: the indices of the parameters in the saved groups, in order.
        owners: what is known about each of these parameters here.

    Raises:
        ValueError: state of another optimizer or another model.
    """
    known = dict(zip(indices, owners))
    out: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for index, state in saved.items():
        if index not in known:
            out[index] = state
        elif state:
            out[known[index].param] = adopt(state, index, known[index])
    return out


def adopt(saved: dict[str, Any], index: Any, owner: Owner) -> dict[str, Any]:
    """A copy of one parameter's saved state, in its owner's dtype and on its device."""
    expected, optional = [*owner.dtypes, STEP], [*guarded.KEYS, guarded.ADAM_STEP]
    missing = [key for key in expected if key not in saved]
    unknown = [key for key in saved if key not in [*expected, *optional]]
    if missing or unknown:
        what = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}, which these weights do not keep"
        raise ValueError(
            f"the state of parameter {index} {what}: it was saved by another optimizer than {owner.weights}"
        )
    param = owner.param
    out = {key: _tensor(saved[key], key, index, param, dtype) for key, dtype in owner.dtypes.items()}
    out[STEP] = _number(saved[STEP])
    if owner.guarded:
        guarded.init_state(out, param, compute_dtype(param))
        if guarded.ADAM_STEP in saved:
            for key in guarded.KEYS:
                out[key] = _tensor(saved[key], key, index, param, out[key].dtype)
            out[guarded.ADAM_STEP] = _number(saved[guarded.ADAM_STEP])
    return out


def _number(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().cpu().reshape(()).clone()


def _tensor(value: Any, key: str, index: Any, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.shape != param.shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        raise ValueError(
            f"the state {key!r} of parameter {index} must be a tensor of the parameter's shape {tuple(param.shape)}; "
            f"got {got}: it belongs to another model"
        )
    if hasattr(param, "to_local") != hasattr(value, "to_local"):
        raise ValueError(
            f"parameter {index} and its state must both be sharded (DTensor) or both be plain tensors; load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    moved = value.detach().to(param.device, dtype)
    # A view of a larger block must not keep that block alive, and nobody else's tensor may be written to.
    return moved.clone(memory_format=torch.contiguous_format)
