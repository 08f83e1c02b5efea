# SPDX-License-Identifier: Apache-2.0
"""Episode metrics, against numbers worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmq_trl.metrics import EpisodeMetrics, load_metric, mean_interval, wilson_interval


def test_wilson_by_hand():
    # 8 of 10 with z = 1.959964: z² = 3.841459; scale = 1.384146; centre = (0.8 + 0.192073) / 1.384146 = 0.716740;
    # half = 1.959964 / 1.384146 * sqrt(0.016 + 0.00960365) = 1.416010 * 0.160012 = 0.226579
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=2e-6)
    assert high == pytest.approx(0.943318, abs=2e-6)
    # 0 of n: high = z² / (n + z²)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert wilson_interval(10, 10) == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)
    # 50 of 100 at 90 %: z² = 2.705543; half = z sqrt(n / 4 + z² / 4) / (n + z²)
    low, high = wilson_interval(50, 100, confidence=0.9)
    half = 1.644854 * math.sqrt(25 + 2.705543 / 4) / 102.705543
    assert (low, high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson_interval(n - successes, n)
    assert low == pytest.approx(1 - mirrored[1]) and high == pytest.approx(1 - mirrored[0])


@pytest.mark.parametrize("args", [(-1, 10), (11, 10), (0, -1), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson_refuses(args):
    with pytest.raises(ValueError, match="must lie"):
        wilson_interval(*args)


def test_mean_interval_by_hand():
    # values 1, 2, 3: mean 2, s = 1, half = 1.959964 / sqrt(3) = 1.131586
    assert mean_interval([1, 2, 3]) == (pytest.approx(0.868414, abs=1e-6), pytest.approx(3.131586, abs=1e-6))
    assert all(math.isnan(bound) for bound in mean_interval([1.0]))


def test_episode_metrics():
    results = load_metric().compute(returns=[1.0, -1.0, 0.0, 2.0], turns=[1, 2, 3, 4], valid=[1.0, 0.5, 1.0, 0.25])
    low, high = wilson_interval(2, 4)  # a return of 0 is no success
    return_low, return_high = mean_interval([1.0, -1.0, 0.0, 2.0])
    assert results == {
        "success_rate": 0.5,
        "success_rate_low": low,
        "success_rate_high": high,
        "mean_return": 0.5,
        "return_low": return_low,
        "return_high": return_high,
        "mean_turns": 2.5,
        "valid_rate": pytest.approx((1 + 1 + 3 + 1) / 10),
        "episodes": 4,
    }


def test_episode_metrics_in_batches_and_on_disk(tmp_path):
    metric = EpisodeMetrics(cache_dir=str(tmp_path))
    metric.add_batch(returns=[1.0], turns=[2], valid=[1.0])
    metric.add_batch(returns=[-1.0], turns=[2], valid=[0.0])
    results = metric.compute()
    assert results["success_rate"] == 0.5 and results["valid_rate"] == 0.5 and results["episodes"] == 2


def test_episode_metrics_refuses():
    with pytest.raises(ValueError, match="at least one episode"):
        load_metric()._compute(returns=[], turns=[], valid=[])
    with pytest.raises(ValueError, match=r"returns\[1\] is not finite"):
        load_metric().compute(returns=[0.0, math.nan], turns=[1, 1], valid=[1.0, 1.0])
