# SPDX-License-Identifier: Apache-2.0
"""Metrics of played episodes, with intervals.

Contents: `wilson_interval`, `mean_interval`, `EpisodeMetrics` (an `evaluate` metric), `load_metric`.

An episode succeeds when its undiscounted return is positive (RL4VLM's rule).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import numpy as np


def _z(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927).

    With p = successes / n and z the normal quantile, centre (p + z²/2n) / (1 + z²/n) and half-width
    z / (1 + z²/n) * sqrt(p (1 - p) / n + z²/4n²).

    >>> tuple(round(x, 4) for x in wilson_interval(8, 10))
    (0.4902, 0.9433)

    Returns:
        (low, high), both in [0, 1]; (0, 1) when n is 0.

    Raises:
        ValueError: successes outside 0..n, or a confidence outside (0, 1).
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of {n}.")
    z = _z(confidence)
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval of a mean: mean ± z * s / sqrt(n), s with n - 1 degrees of freedom; NaN when n < 2."""
    array = np.asarray(values, dtype=np.float64)
    z = _z(confidence)
    if array.size < 2:
        return math.nan, math.nan
    half = z * float(array.std(ddof=1)) / math.sqrt(array.size)
    mean = float(array.mean())
    return mean - half, mean + half


class EpisodeMetrics(evaluate.Metric):
    """Success rate, return, turns and valid-response rate of played episodes. Loads with no download.

    `compute(returns=[...], turns=[...], valid=[...])`, one entry per episode: the undiscounted return, the number of
    turns, and the fraction of valid responses. `confidence` may be given to `compute` (default 0.95). Gives
    `success_rate` with Wilson's interval (`success_rate_low`, `success_rate_high`), `mean_return` with a normal
    interval (`return_low`, `return_high`; NaN for a single episode), `mean_turns`, `valid_rate` (over all turns) and
    `episodes`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Success rate, return, turns and valid-response rate of played episodes, with intervals.",
            citation="",
            inputs_description="returns: undiscounted returns; turns: numbers of turns; valid: fractions of valid "
            "responses; one entry per episode.",
            features=datasets.Features(
                {
                    "returns": datasets.Value("float64"),
                    "turns": datasets.Value("int64"),
                    "valid": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, returns: Sequence[float], turns: Sequence[int], valid: Sequence[float], confidence: float = 0.95
    ) -> dict[str, float]:
        values = np.asarray(returns, dtype=np.float64)
        lengths = np.asarray(turns, dtype=np.float64)
        fractions = np.asarray(valid, dtype=np.float64)
        n = int(values.size)
        if n == 0:
            raise ValueError("EpisodeMetrics needs at least one episode.")
        if not np.isfinite(values).all():
            raise ValueError(f"returns[{int(np.flatnonzero(~np.isfinite(values))[0])}] is not finite.")
        successes = int((values > 0).sum())
        low, high = wilson_interval(successes, n, confidence)
        return_low, return_high = mean_interval(values, confidence)
        total = float(lengths.sum())
        return {
            "success_rate": successes / n,
            "success_rate_low": low,
            "success_rate_high": high,
            "mean_return": float(values.mean()),
            "return_low": return_low,
            "return_high": return_high,
            "mean_turns": float(lengths.mean()),
            "valid_rate": float((fractions * lengths).sum() / total) if total else 0.0,
            "episodes": n,
        }


def load_metric(**kwargs: Any) -> EpisodeMetrics:
    """An `EpisodeMetrics` that keeps its data in memory; `kwargs` go to `evaluate.Metric`."""
    return EpisodeMetrics(**{"keep_in_memory": True, **kwargs})
