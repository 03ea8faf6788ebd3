"""The meta-loss: one scalar from the losses along an unroll.

Losses of different tasks live on different scales, so each is normalized by its own task's initial loss before the
mean is taken. With w_{t,p} the derivative of the meta-loss with respect to the loss of particle p after step t, the
first-order meta-gradient only needs w (`MetaLoss.weights`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch

Total = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks of a run; the identity for one process."""

NORMALIZATIONS = ("log", "ratio", "none", "log_mean")
AVERAGES = ("mean", "final")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaLoss:
    """How losses along an unroll become one number.

    Attributes:
        normalization: "log" is log(f/f₀), which asks for the same relative progress at every scale of the loss; "ratio"
            is f/f₀; "none" is f itself. "log" and "ratio" are for losses bounded below by zero: log(f/f₀) is floored at
            f/f₀ = `floor`. "log_mean" is the logarithm of the mean of f over particles, step by step: it lowers the
            mean over tasks, which a few hard ones make up, at every stage of the unroll alike. It is for tasks of one
            scale whose particles restart together (`HorizonSchedule.random_offsets` off), and needs an estimator that
            differentiates.
        average: "mean" over the steps of the truncation, or its "final" step alone.
        clip: f/f₀ above this counts as this (its gradient is zero); "none" and "log_mean" clip f itself, relative to
            max(|f₀|, 1).
        floor: smallest f/f₀ told apart by "log".
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    normalization: str = "log"
    average: str = "mean"
    clip: float = 1e3
    floor: float = 1e-12

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}; got {self.normalization!r}")
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}; got {self.average!r}")
        if not self.clip > 1:
            raise ValueError(f"clip must be greater than 1; got {self.clip}")
        if not 0 < self.floor < 1:
            raise ValueError(f"floor must lie strictly between 0 and 1; got {self.floor}")

    def normalize(self, losses: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Normalized losses, of the broadcast shape of `losses` and `initial` (the losses at step 0, non-zero).

        With "log_mean" the last dimension, particles, has become 1.
        """
        if self.normalization == "log_mean":
            return self._clipped(losses, initial).mean(-1, keepdim=True).clamp_min(torch.finfo(losses.dtype).tiny).log()
        if self.normalization == "none":
            return self._clipped(losses, initial)
        ratio = (losses / initial.abs().clamp_min(torch.finfo(losses.dtype).tiny)).clamp_max(self.clip)
        return ratio.clamp_min(self.floor).log() if self.normalization == "log" else ratio

    def _clipped(self, losses: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        return torch.minimum(losses, self.clip * initial.abs().clamp_min(1))

    @property
    def couples_particles(self) -> bool:
        """Whether one particle's share depends on the losses of the others, on whatever rank they are."""
        return self.normalization == "log_mean"

    def per_particle(self, losses: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Meta-losses [..., particles] from losses [..., steps, particles] and initial losses that broadcast.

        Raises:
            ValueError: the normalization is "log_mean", which has no value per particle.
        """
        if self.normalization == "log_mean":
            raise ValueError(
                "normalization 'log_mean' has no value per particle, which this estimator needs; "
                "choose log, ratio or none"
            )
        values = self.normalize(losses, initial)
        return values[..., -1, :] if self.average == "final" else values.mean(-2)

    def __call__(
        self, losses: torch.Tensor, initial: torch.Tensor, valid: torch.Tensor | None = None, total: Total | None = None
    ) -> torch.Tensor:
        """The mean over (valid) particles; zero where none is valid.

        Args:
            losses: [steps, particles], after each step.
            initial: [steps, particles] or [particles], the losses at the start of the episode that each step belongs
                to.
            valid: [particles] mask; the values of the others may be non-finite.
            total: sums a tensor over ranks. With "log_mean" the value is then that of all ranks' particles; otherwise
                it is of these particles all the same, and ranks average theirs by how many are valid.
        """
        if self.normalization == "log_mean":
            if total is not None:
                kept = torch.ones_like(losses[0], dtype=torch.bool) if valid is None else valid
                return self._log_mean(losses[:, kept], initial.expand_as(losses)[:, kept], total)
            if valid is not None:
                if not valid.any():
                    return losses.new_zeros(()) * losses.nan_to_num().sum()
                losses, initial = losses[:, valid], initial.expand_as(losses)[:, valid]
            values = self.normalize(losses, initial)
            return values[-1].mean() if self.average == "final" else values.mean()
        if valid is None:
            return self.per_particle(losses, initial).mean()
        losses = torch.where(valid, losses, 1.0)
        initial = torch.where(valid, initial, 1.0)
        return (self.per_particle(losses, initial) * valid).sum() / valid.sum().clamp_min(1)

    def _log_mean(self, losses: torch.Tensor, initial: torch.Tensor, total: Total) -> torch.Tensor:
        """The "log_mean" of all ranks' particles; differentiated, these give their rank's part of a mean over ranks."""
        here = self._clipped(losses, initial).sum(-1)
        everywhere = total(torch.cat([here.detach(), here.new_tensor([losses.shape[1]])]))
        if not everywhere[-1]:
            return here.sum() * 0.0
        # Ranks average what comes of this by their numbers of particles; here the parts of a sum are to be added.
        share = everywhere[-1] / max(losses.shape[1], 1)
        sums = everywhere[:-1] + (here - here.detach()) * share
        values = (sums / everywhere[-1]).clamp_min(torch.finfo(losses.dtype).tiny).log()
        return values[-1] if self.average == "final" else values.mean()

    def along(self, losses: torch.Tensor, initial: torch.Tensor, total: Total) -> torch.Tensor:
        """The mean normalized loss of all ranks' particles after each step, [steps], in float64; arguments as above."""
        log_mean = self.normalization == "log_mean"
        values = self._clipped(losses, initial) if log_mean else self.normalize(losses, initial)
        sums = total(torch.cat([values.double().sum(-1), values.new_tensor([losses.shape[1]]).double()]))
        mean = sums[:-1] / sums[-1]
        return mean.clamp_min(torch.finfo(losses.dtype).tiny).log() if log_mean else mean

    def weights(
        self, losses: torch.Tensor, initial: torch.Tensor, valid: torch.Tensor, total: Total | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(meta-loss, its derivative with respect to `losses` [steps, particles]); `total` as above."""
        leaf = losses.detach().requires_grad_()
        with torch.enable_grad():
            value = self(leaf, initial, valid, total)
            (weights,) = torch.autograd.grad(value, leaf)
        return value.detach(), torch.where(valid, weights, 0.0)

    def num_clipped(self, losses: torch.Tensor, initial: torch.Tensor) -> int:
        """How many losses are above the clip or not finite."""
        bound = self.clip * (
            initial.abs().clamp_min(1) if self.normalization in ("none", "log_mean") else initial.abs()
        )
        return int((~(losses <= bound)).sum())
