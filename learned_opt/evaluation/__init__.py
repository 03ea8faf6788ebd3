"""Comparing learned and hand-designed optimizers: tuned baselines, numbers with intervals, pictures."""

from learned_opt.evaluation.aggregate import Total, interquartile_mean, stratified_bootstrap, totals
from learned_opt.evaluation.baselines import BASELINES, DEFAULT_BASELINES, Baseline, Tuning, find, half_decades, tune
from learned_opt.evaluation.cache import RunCache
from learned_opt.evaluation.compare import EvaluationConfig, Learned, compare
from learned_opt.evaluation.metrics import Interval, bootstrap
from learned_opt.evaluation.results import Comparison, Cost, Curve, Result, Scores
from learned_opt.evaluation.runs import Runs, run_rule, run_torch_optimizer

__all__ = [
    "BASELINES",
    "DEFAULT_BASELINES",
    "Baseline",
    "Comparison",
    "Cost",
    "Curve",
    "EvaluationConfig",
    "Interval",
    "Learned",
    "Result",
    "RunCache",
    "Runs",
    "Scores",
    "Total",
    "Tuning",
    "bootstrap",
    "compare",
    "find",
    "half_decades",
    "interquartile_mean",
    "run_rule",
    "run_torch_optimizer",
    "stratified_bootstrap",
    "totals",
    "tune",
]
