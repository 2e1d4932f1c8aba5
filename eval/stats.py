"""Means, differences and their standard errors: pure functions on arrays.

A perplexity is a ratio estimate, exp(sum of losses / sum of tokens) over windows. Its error, and that of a difference
of two models read on the same windows, come from the linearised residuals (Cochran, Sampling Techniques, ch. 6):

    m = sum n_i / sum t_i        r_i = n_i - m t_i        se(m)^2 = W/(W-1) * sum r_i^2 / (sum t_i)^2

The paired form puts the difference of the residuals in their place: what makes a window hard cancels, so that a
change of 0.01 % shows although each perplexity is known to 2 % only. Windows count as independent; overlapping
contexts and neighbours in one book make that slightly optimistic, which the report says.

Legend: W windows; n_i loss of a window in nats, t_i its scored tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; ``se`` is None where one sample cannot tell it."""

    value: float
    se: float | None


def ratio_mean(totals: ArrayLike, counts: ArrayLike) -> Estimate:
    """sum(totals) / sum(counts) with its standard error over the W clusters; both of shape [W]."""
    n, t = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    if n.shape != t.shape or n.ndim != 1 or not len(n) or t.sum() <= 0:
        raise ValueError(f"totals {n.shape} and counts {t.shape} must be equally long rows with a positive count")
    mean = float(n.sum() / t.sum())
    return Estimate(mean, _cluster_se(n - mean * t, t))


def perplexity(nll: ArrayLike, tokens: ArrayLike) -> Estimate:
    """exp of the mean loss a token, from the losses [W] in nats and the scored tokens [W] of every window."""
    mean = ratio_mean(nll, tokens)
    value = math.exp(mean.value)
    return Estimate(value, None if mean.se is None else value * mean.se)


@dataclass(frozen=True)
class PerplexityChange:
    """How a model's perplexity differs from a baseline's on the same windows."""

    ratio: Estimate
    delta: Estimate


def perplexity_change(nll: ArrayLike, baseline_nll: ArrayLike, tokens: ArrayLike) -> PerplexityChange:
    """Paired ratio and difference of two perplexities; all of shape [W], losses in nats."""
    n, b, t = (np.asarray(values, np.float64) for values in (nll, baseline_nll, tokens))
    mean, base = ratio_mean(n, t).value, ratio_mean(b, t).value
    own, other = math.exp(mean), math.exp(base)
    shift = ratio_mean(n - b, t)
    ratio = math.exp(shift.value)
    delta_se = _cluster_se(own * (n - mean * t) - other * (b - base * t), t)
    return PerplexityChange(
        Estimate(ratio, None if shift.se is None else ratio * shift.se), Estimate(own - other, delta_se)
    )


def mean(values: ArrayLike) -> Estimate:
    """Mean and standard error (sample standard deviation / sqrt n) of a row."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"a row of values is needed, not shape {x.shape}")
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None)


@dataclass(frozen=True)
class AccuracyChange:
    """A model's answers against a baseline's to the same questions.

    delta: difference of the means. gained: wrong before, right now; lost: right before, wrong now.
    """

    delta: Estimate
    gained: int
    lost: int


def accuracy_change(values: ArrayLike, baseline: ArrayLike) -> AccuracyChange:
    """Paired difference of two rows of per-question scores, and the answers that flipped in each direction."""
    x, b = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if x.shape != b.shape:
        raise ValueError(f"{x.shape} and {b.shape} are not answers to the same questions")
    return AccuracyChange(mean(x - b), int((x > b).sum()), int((x < b).sum()))


def _cluster_se(residuals: np.ndarray, counts: np.ndarray) -> float | None:
    clusters = len(residuals)
    if clusters < 2:
        return None
    return float(math.sqrt(clusters / (clusters - 1) * float((residuals**2).sum())) / counts.sum())
