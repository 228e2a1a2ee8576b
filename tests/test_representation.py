"""Figures about encodings, on matrices of which one knows the answer."""

import numpy as np
import pytest
from conftest import toy_decoder

import data
import representation
from jepa import LLMJEPA

RANDOM = np.random.default_rng(0)


def test_effective_rank():
    assert representation.effective_rank(np.eye(4) - 0.25) == pytest.approx(3)  # centred: three equal directions
    assert representation.effective_rank(np.ones((9, 4))) == 1.0
    line = np.outer(np.arange(9.0), [1, 2, 3])
    assert representation.effective_rank(line) == pytest.approx(1.0, abs=1e-6)
    uneven = np.diag([3.0, 1.0, 0.0])[[0, 0, 1, 1]] * np.array([[1], [-1], [1], [-1]])  # singular values 3 and 1, times
    share = np.array([0.75, 0.25])  # the square root of 2
    assert representation.effective_rank(uneven) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_retrieval_counts_ranks_and_ties_against_the_query():
    query = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert representation.retrieval(query, 5 * query) == (1.0, 1.0)
    swapped = representation.retrieval(query, query[[1, 0, 2]])  # ranks 3, 3 and 1
    assert swapped == (pytest.approx(1 / 3), pytest.approx((1 / 3 + 1 / 3 + 1) / 3))
    same = np.ones((4, 2))
    assert representation.retrieval(same, same) == (0.0, 0.25)  # a collapse finds nothing


def test_mean_pairwise_cosine():
    x = RANDOM.normal(size=(6, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.mean([unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j])
    assert representation.mean_pairwise_cosine(x) == pytest.approx(expected)


def test_the_best_linear_map():
    text = RANDOM.normal(size=(400, 5))
    code = text @ RANDOM.normal(size=(5, 5))
    relative, absolute = representation.linear_map(text, code)
    assert relative < 1e-12 and absolute < 1e-9
    relative, absolute = representation.linear_map(text, RANDOM.normal(size=(400, 5)))
    assert 0.95 < relative < 1.1 and absolute > 30
    few = representation.linear_map(RANDOM.normal(size=(40, 12)), RANDOM.normal(size=(40, 12)))
    assert few[0] > 1  # fitted to 20 rows of noise it would look good on those 20
    relative, absolute = representation.linear_map(1e-6 * text, 1e-6 * RANDOM.normal(size=(400, 5)))
    assert relative > 0.95 and absolute < 1e-3  # small encodings make the absolute residual small: no success


def test_verdicts():
    base = RANDOM.normal(size=(50, 8))
    healthy = {"text": base, "pred": base + 0.1, "code": base}
    assert representation.verdict(representation.report(healthy)).startswith("No collapse")
    assert "closer than shuffled ones by" in representation.verdict(representation.report(healthy))
    collapsed = {name: 1 + 1e-3 * RANDOM.normal(size=(50, 8)) for name in healthy}
    figures = representation.report(collapsed)
    assert figures["cosine_aligned"] > 0.999 and figures["cosine_gap"] < 1e-3
    assert "have collapsed" in representation.verdict(figures)
    unrelated = {name: RANDOM.normal(size=(50, 8)) for name in healthy}
    assert "hardly closer" in representation.verdict(representation.report(unrelated))


def test_encodings_are_read_where_training_reads_them(examples):
    """In the order of the examples, whatever the batches; Enc(Text) is the state that k = 0 would read."""
    model = LLMJEPA(toy_decoder("llama"), 2).eval()
    found = representation.encode(model, examples, batch_size=3)
    for i, e in enumerate(examples):
        pred, code = model.encodings(data.collate([e], 2))
        text, _ = model.encodings(data.collate([e], 0))
        for name, state in (("text", text), ("pred", pred), ("code", code)):
            np.testing.assert_allclose(found[name][i], state[0].detach().numpy(), rtol=1e-4, atol=1e-5)
