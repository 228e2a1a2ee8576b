"""Intervals and p values against scipy's, on figures taken down from it."""

import doctest

import numpy as np
import pytest

from evaluation import statistics


def test_docstring_examples():
    found = doctest.testmod(statistics)
    assert found.failed == 0 and found.attempted == 3


@pytest.mark.parametrize(("successes", "n", "low", "high"), [  # from scipy.stats.binomtest(...).proportion_ci("wilson")
    (0, 10, 0.0, 0.2775327998628892), (10, 10, 0.7224672001371107, 1.0), (5, 10, 0.236593090512564, 0.763406909487436),
    (1780, 2000, 0.8755323695259197, 0.9029723335947032), (0, 0, 0.0, 1.0),
])
def test_wilson(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=1e-12)


def outcomes(wins, losses, rest=0):
    return [1] * wins + [0] * losses + [1] * rest, [0] * wins + [1] * losses + [1] * rest


@pytest.mark.parametrize(("wins", "losses", "p"), [  # from scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue
    (5, 0, 0.0625), (30, 10, 0.0022214337732293643), (8, 3, 0.2265625), (600, 500, 0.0028195449914364284),
    (0, 0, 1.0), (7, 7, 1.0),
])
def test_mcnemar(wins, losses, p):
    one, other = outcomes(wins, losses, rest=9)
    assert statistics.mcnemar(one, other) == pytest.approx(p, rel=1e-9)
    assert statistics.mcnemar(other, one) == pytest.approx(p, rel=1e-9)


def test_paired_bootstrap():
    one, other = outcomes(30, 10, rest=60)
    found = statistics.paired_bootstrap(one, other)
    assert found == statistics.paired_bootstrap(np.array(one, bool), np.array(other, bool)), "one seed, one answer"
    assert found != statistics.paired_bootstrap(one, other, seed=1)
    assert found == pytest.approx((0.2, 0.08, 0.32), abs=0.011)  # scipy.stats.bootstrap, 200,000 resamples: 0.08, 0.32
    assert statistics.paired_bootstrap(other, one)[0] == pytest.approx(-0.2)


def test_statistics_refuse_other_rows():
    for wrong in ([1, 0], [1, 0, 2], []):
        with pytest.raises(AssertionError):
            statistics.mcnemar([1, 0, 1] if wrong else [], wrong)
    with pytest.raises(AssertionError):
        statistics.wilson(3, 2)
