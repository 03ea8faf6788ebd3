"""How good samples of a meta-gradient are: bias, variance and signal-to-noise ratio, with jackknife intervals.

Given independent samples g_1 … g_R of one estimator and f_1 … f_R of the reference, where g_r and f_r may share tasks,
products of means such as <E g, E f> are estimated by averages over pairs r ≠ s, which are unbiased: noise adds nothing
to them. Squared norms of plain means would count the noise as signal, and pairs r = s that of the shared tasks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist

import torch

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % confidence interval; all three are NaN where noise leaves it undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


UNDEFINED = Interval(value=math.nan, low=math.nan, high=math.nan)


def student_quantile(degrees: int, level: float = _LEVEL) -> float:
    """The two-sided quantile of Student's t, by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5).

    Args:
        degrees: of freedom, at least 3, where the expansion is within 1 %.
        level: of confidence, in (0, 1).
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def jackknife(
    statistic: Callable[[torch.Tensor], float],
    num_samples: int,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    logarithmic: bool = False,
) -> Interval:
    """A statistic of all samples, with an interval from leaving each of them out once.

    Args:
        statistic: maps the indices of the samples used, [k], to a number; NaN where undefined.
        num_samples: at least 4.
        low, high: the range that the statistic can have; all three numbers are kept within it.
        logarithmic: take the interval on the scale of logarithms if every value allows it.
    """
    everything = torch.arange(num_samples)
    value = statistic(everything)
    others = [statistic(everything[everything != i]) for i in range(num_samples)]
    if not all(map(math.isfinite, [value, *others])):
        return UNDEFINED
    logarithmic = logarithmic and min(value, *others) > 0
    at = math.log if logarithmic else float
    points = [at(v) for v in others]
    mean = sum(points) / num_samples
    error = math.sqrt(sum((p - mean) ** 2 for p in points) * (num_samples - 1) / num_samples)
    half = student_quantile(num_samples - 1) * error
    back = math.exp if logarithmic else float
    numbers = (value, back(at(value) - half), back(at(value) + half))
    return Interval(**{n: min(max(v, low), high) for n, v in zip(("value", "low", "high"), numbers)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """What samples of an estimator say about it.

    Attributes:
        cosine: between the estimator's mean and the reference's; 1 without bias, below 0 for a direction that raises
            the meta-loss.
        norm_ratio: length of the estimator's mean over the reference's; 1 without bias.
        projection: of the estimator's mean on the reference, over the reference's length: cosine times norm ratio;
            defined whatever the noise.
        variance: of one sample, the sum over theta of variances, over the squared length of the reference.
        signal_to_noise: squared length of the estimator's mean over the sum of variances of one sample.
    """

    cosine: Interval
    norm_ratio: Interval
    projection: Interval
    variance: Interval
    signal_to_noise: Interval


def quality(samples: torch.Tensor, reference: torch.Tensor) -> Quality:
    """Compare samples [R, num_theta] of an estimator with as many of the reference.

    R is at least 4, and sample r of both may share tasks.
    """
    count = len(samples)
    if count < 4 or samples.shape != reference.shape:
        raise ValueError(
            f"samples and reference must be alike, with at least 4 rows; got {tuple(samples.shape)}, "
            f"{tuple(reference.shape)}"
        )
    g, f = samples.double(), reference.double()
    gg, gf, ff = (a @ b.T for a, b in ((g, g), (g, f), (f, f)))

    def product(gram: torch.Tensor, rows: torch.Tensor) -> float:
        part = gram[rows][:, rows]
        n = len(rows)
        return float((part.sum() - part.trace()) / (n * (n - 1)))

    def spread(rows: torch.Tensor) -> float:
        return float(gg[rows, rows].mean()) - product(gg, rows)

    def ratio(a: float, b: float) -> float:
        return a / b if b > 0 else math.nan

    def squared_ratio(rows: torch.Tensor) -> float:
        return ratio(product(gg, rows), product(ff, rows))

    def cosine(rows: torch.Tensor) -> float:
        return ratio(product(gf, rows), math.sqrt(max(product(gg, rows), 0) * max(product(ff, rows), 0)))

    squared = jackknife(squared_ratio, count, low=0)
    root = (math.sqrt(v) for v in (squared.value, squared.low, squared.high))
    norm_ratio = UNDEFINED if math.isnan(squared.value) else Interval(**dict(zip(("value", "low", "high"), root)))
    return Quality(
        cosine=jackknife(cosine, count, low=-1, high=1),
        norm_ratio=norm_ratio,
        projection=jackknife(lambda rows: ratio(product(gf, rows), product(ff, rows)), count),
        variance=jackknife(lambda rows: ratio(spread(rows), product(ff, rows)), count, low=0, logarithmic=True),
        signal_to_noise=jackknife(lambda rows: ratio(product(gg, rows), spread(rows)), count, low=0, logarithmic=True),
    )
