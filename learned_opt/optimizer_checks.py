"""What `LearnedOptimizer` accepts; the messages say what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch

from learned_opt.guard import GuardConfig

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_settings(state_dtype: torch.dtype | None, chunk_size: int | None, guard: bool | GuardConfig) -> None:
    """Raise ValueError if an argument that holds for the whole optimizer is out of range."""
    if state_dtype is not None and state_dtype not in STATE_DTYPES:
        names = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"state_dtype must be None or one of {names}; got {state_dtype}")
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be None or a number of coordinates, at least 1; got {chunk_size!r}")
    if not isinstance(guard, (bool, GuardConfig)):
        raise ValueError(f"guard must be True, False or a GuardConfig; got {guard!r}")


def number_of(loss: object) -> float:
    """The loss as a number, or ValueError if it is not one."""
    try:
        return float(loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise ValueError(f"loss must be a number or a real tensor with one element; got {got}") from None


def check_group(values: dict[str, Any]) -> None:
    """Raise ValueError if the values of a parameter group are out of range."""
    lr = values["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element; got shape {tuple(lr.shape)}")
    if isinstance(lr, torch.Tensor) and lr.is_complex():
        raise ValueError(f"a tensor lr must be real; got {lr.dtype}")
    for name in ("lr", "weight_decay"):
        value = values[name]
        number = float(value) if isinstance(value, (int, float, torch.Tensor)) else math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be a finite number, at least 0; got {value!r}")
    if not isinstance(values["maximize"], bool):
        raise ValueError(f"maximize must be True or False; got {values['maximize']!r}")


def check_param(param: torch.Tensor, index: int) -> None:
    """Raise ValueError if a parameter, the one with this index in its group, cannot be trained."""
    if param.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        hint = "; pass torch.view_as_real of a complex parameter's data" if param.is_complex() else ""
        raise ValueError(f"parameter {index} of the group is {param.dtype}; parameters must be one of {names}{hint}")
    if param.layout != torch.strided:
        raise ValueError(f"parameter {index} of the group has layout {param.layout}; parameters must be dense")
