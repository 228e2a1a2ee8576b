"""How sure are we? In: rows of 0 and 1. Out: intervals and p values. Nothing here knows what was measured."""

import numpy as np
import scipy  # scipy.stats is loaded where it is used


def wilson(successes, n):
    """(low, high): the 95 % interval of a proportion after Wilson (1927); it stays inside 0..1 even at 0 % and 100 %.

    >>> "%.3f %.3f" % wilson(0, 10)
    '0.000 0.278'
    """
    assert 0 <= successes <= n, "between 0 and n successes"
    return tuple(map(float, scipy.stats.binomtest(successes, n).proportion_ci(method="wilson"))) if n else (0.0, 1.0)


def paired_bootstrap(a, b, seed=0, draws=10_000):
    """(difference, low, high) of the success rates a - b, two systems on the same rows; 95 % percentile bootstrap.

    A row's difference is -1, 0 or 1, so drawing n rows with replacement is one multinomial draw of three counts.

    >>> paired_bootstrap([1, 1, 1, 1], [1, 1, 1, 1])
    (0.0, 0.0, 0.0)
    """
    difference = paired(a, b)
    n = len(difference)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(n, shares, size=draws)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def mcnemar(a, b):
    """Two-sided p of the exact McNemar test: are the rows that only one system gets right split like fair coin flips?

    >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    0.0625
    """
    difference = paired(a, b)
    unlike = int(np.abs(difference).sum())
    return float(scipy.stats.binomtest(int((difference == 1).sum()), unlike).pvalue) if unlike else 1.0


def paired(a, b):
    """a - b, row by row, of two equally long lists of 0 and 1."""
    a, b = np.asarray(a, dtype=int), np.asarray(b, dtype=int)
    assert a.shape == b.shape and a.ndim == 1 and a.size, "the same rows, at least one"
    assert np.isin([a, b], (0, 1)).all(), "only 0 and 1"
    return a - b
