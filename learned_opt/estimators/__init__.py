"""Meta-gradient estimators, one file each, chosen by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from learned_opt.estimators.backprop import TruncatedBackprop
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.es import TruncatedES
from learned_opt.estimators.nres import NRES
from learned_opt.estimators.pes import PES

__all__ = ["ESTIMATORS", "NRES", "PES", "Estimate", "Estimator", "TruncatedBackprop", "TruncatedES", "Workload", "get"]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    TruncatedBackprop.kind: TruncatedBackprop,
    TruncatedES.kind: TruncatedES,
    PES.kind: PES,
    NRES.kind: NRES,
}
"""A new estimator is one file and one line here."""


def get(name: str, **settings: Any) -> Estimator:
    """The estimator of this name.

    Raises:
        ValueError: an unknown name (near matches are suggested), or settings it does not take.
    """
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name, ESTIMATORS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sorted(ESTIMATORS))}"
        raise ValueError(f"unknown estimator {name!r}; {hint}")
    try:
        return ESTIMATORS[name](**settings)
    except TypeError as error:
        raise ValueError(f"estimator {name!r}: {error}") from None
