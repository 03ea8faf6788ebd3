"""Comparing learned and hand-designed optimizers: tuned baselines, numbers with intervals, pictures."""

from learned_opt.evaluation.baselines import BASELINES, DEFAULT_BASELINES, Baseline, Tuning, half_decades, tune
from learned_opt.evaluation.compare import EvaluationConfig, Learned, compare
from learned_opt.evaluation.metrics import Interval, bootstrap
from learned_opt.evaluation.results import Comparison, Curve, Result, Scores
from learned_opt.evaluation.runs import Runs, run_rule, run_torch_optimizer

__all__ = [
    "BASELINES",
    "DEFAULT_BASELINES",
    "Baseline",
    "Comparison",
    "Curve",
    "EvaluationConfig",
    "Interval",
    "Learned",
    "Result",
    "Runs",
    "Scores",
    "Tuning",
    "bootstrap",
    "compare",
    "half_decades",
    "run_rule",
    "run_torch_optimizer",
    "tune",
]
