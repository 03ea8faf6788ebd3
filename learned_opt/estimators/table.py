"""Estimators by name: those that stand alone, and the look-up that the combined ones share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from learned_opt.estimators.backprop import TruncatedBackprop
from learned_opt.estimators.base import Estimator
from learned_opt.estimators.es import TruncatedES
from learned_opt.estimators.nres import NRES
from learned_opt.estimators.pes import PES

SINGLE: dict[str, Callable[..., Estimator]] = {
    TruncatedBackprop.kind: TruncatedBackprop,
    TruncatedES.kind: TruncatedES,
    PES.kind: PES,
    NRES.kind: NRES,
}
"""Estimators that need no other."""


def make(table: Mapping[str, Callable[..., Estimator]], name: str, settings: Mapping[str, Any]) -> Estimator:
    """The estimator of this name in the table.

    Raises:
        ValueError: an unknown name (near matches are suggested), or settings it does not take.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sorted(table))}"
        raise ValueError(f"unknown estimator {name!r}; {hint}")
    try:
        return table[name](**settings)
    except TypeError as error:
        raise ValueError(f"estimator {name!r}: {error}") from None
