"""Meta-gradient estimators, one file each, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from learned_opt.estimators.backprop import TruncatedBackprop
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.comparison import Comparison, compare
from learned_opt.estimators.es import TruncatedES
from learned_opt.estimators.imitation import Imitation
from learned_opt.estimators.mix import InverseVarianceMix
from learned_opt.estimators.nres import NRES
from learned_opt.estimators.pes import PES
from learned_opt.estimators.table import SINGLE, make

__all__ = [
    "ESTIMATORS",
    "NRES",
    "PES",
    "Comparison",
    "Estimate",
    "Estimator",
    "Imitation",
    "InverseVarianceMix",
    "TruncatedBackprop",
    "TruncatedES",
    "Workload",
    "compare",
    "get",
]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    **SINGLE,
    InverseVarianceMix.kind: InverseVarianceMix,
    Imitation.kind: Imitation,
}
"""A new estimator is one file and one line, here or in `table.SINGLE`."""


def get(name: str, **settings: Any) -> Estimator:
    """The estimator of this name.

    Raises:
        ValueError: an unknown name (near matches are suggested), or settings it does not take.
    """
    return make(ESTIMATORS, name, settings)
