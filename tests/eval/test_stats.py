"""Standard errors against simulation and closed forms; paired changes against what they must equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.eval import stats


def test_equal_windows_reduce_to_the_ordinary_standard_error() -> None:
    nll = np.random.default_rng(0).normal(3.5, 0.4, 40)
    found = stats.ratio_mean(nll * 511, np.full(40, 511))
    assert found.value == pytest.approx(nll.mean())
    assert found.se == pytest.approx(nll.std(ddof=1) / math.sqrt(40), rel=1e-12)


def test_the_errors_cover_the_truth() -> None:
    draw = np.random.default_rng(1)
    covered = changed = 0
    for _ in range(400):
        tokens = draw.integers(100, 512, 30)
        hard = draw.normal(3.5, 0.5, 30)
        shift = draw.normal(0.01, 0.004, 30)
        base, ours = hard * tokens, (hard + shift) * tokens
        value = stats.perplexity(ours, tokens)
        assert value.se is not None
        covered += abs(math.log(value.value) - 3.51) < 2 * value.se / value.value
        change = stats.perplexity_change(ours, base, tokens)
        assert change.ratio.se is not None
        changed += abs(math.log(change.ratio.value) - 0.01) < 2 * change.ratio.se / change.ratio.value
    assert covered > 360
    assert changed > 360


def test_pairing_cancels_what_makes_a_window_hard() -> None:
    draw = np.random.default_rng(2)
    base = draw.normal(3.5, 0.5, 60) * 511
    ours = base + 511 * 0.0003 * (1 + draw.normal(0, 0.2, 60))
    alone = stats.perplexity(ours, [511] * 60)
    change = stats.perplexity_change(ours, base, [511] * 60)
    assert change.ratio.value == pytest.approx(1.0003, abs=3e-5)
    assert change.ratio.se is not None
    assert alone.se is not None
    assert change.ratio.se < 1e-3 * alone.se
    assert change.delta.value == pytest.approx(alone.value - stats.perplexity(base, [511] * 60).value, rel=1e-9)
    again = [
        draw.integers(0, 60, 60) for _ in range(2000)
    ]  # the bootstrap: its level is as uncertain as the perplexity's
    deltas = [np.exp(ours[rows].mean() / 511) - np.exp(base[rows].mean() / 511) for rows in again]
    assert change.delta.se == pytest.approx(np.std(deltas), rel=0.15)


def test_a_single_window_has_no_error() -> None:
    assert stats.perplexity([3.0], [1]).se is None
    assert stats.perplexity_change([3.0], [2.9], [1]).ratio.se is None
    assert stats.mean([1.0]).se is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_flips_account_for_the_whole_difference(pairs: list[tuple[bool, bool]]) -> None:
    ours, base = (np.array(column, float) for column in zip(*pairs, strict=True))
    change = stats.accuracy_change(ours, base)
    assert change.delta.value == pytest.approx((change.gained - change.lost) / len(pairs))
    assert change.delta.se == pytest.approx((ours - base).std(ddof=1) / math.sqrt(len(pairs)))


@pytest.mark.parametrize(("totals", "counts"), [([], []), ([1.0], [0]), ([1.0, 2.0], [1])])
def test_nonsense_is_refused(totals: list[float], counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"equally long|positive"):
        stats.ratio_mean(totals, counts)


def test_answers_to_other_questions_do_not_pair() -> None:
    with pytest.raises(ValueError, match="same questions"):
        stats.accuracy_change([1, 0], [1])
