"""Figures about encodings, on matrices of which one knows the answer."""

import numpy as np
import pytest
import torch
from conftest import toy_decoder
from scipy.linalg import svdvals
from scipy.stats import entropy, rankdata
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import cosine_similarity

import data
from evaluation import encodings as representation
from evaluation import plots
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
    text = RANDOM.normal(size=(400, 5)) + 3
    map_ = RANDOM.normal(size=(5, 5))
    relative, absolute = representation.linear_map(text, text @ map_)
    assert relative < 1e-12 and absolute < 1e-9
    relative, _ = representation.linear_map(text, text @ map_ + 7)
    assert relative < 1e-12, "a constant is no part of what is to be explained"
    independent = RANDOM.normal(size=(400, 5))
    relative, absolute = representation.linear_map(text, independent)
    assert 0.95 < relative < 1.1 and absolute > 30
    relative, absolute = representation.linear_map(1e-6 * text, 1e-6 * independent)
    assert relative > 0.95 and absolute < 1e-3  # small encodings make the absolute residual small: no success
    assert representation.linear_map(text, np.ones((400, 5)))[0] == 1.0  # nothing to be explained


def test_the_linear_map_is_scored_on_rows_that_it_was_not_fitted_to():
    """More columns than rows: any map fits its own rows, and the paper's absolute residual is zero."""
    text, code = RANDOM.normal(size=(60, 80)), RANDOM.normal(size=(60, 80))
    relative, absolute = representation.linear_map(text, code)
    assert absolute < 1e-9 and relative > 0.9
    noise = RANDOM.normal(size=(400, 5))
    text = RANDOM.normal(size=(400, 5))
    relative, _ = representation.linear_map(text, text + noise)
    part = np.arange(400) % 5
    fit = LinearRegression().fit(text[part < 3], (text + noise)[part < 3])
    held = (text + noise)[part == 4]
    expected = np.square(held - fit.predict(text[part == 4])).sum() / np.square(held - (text + noise)[part < 3].mean(
        axis=0)).sum()
    assert relative == pytest.approx(expected, rel=0.05) and 0.3 < relative < 0.7


def test_figures_against_other_implementations():
    pred, code = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(40, 6))
    similarity = cosine_similarity(pred, code)
    found = representation.report({"text": pred, "pred": pred, "code": code}, seed=3)
    ranks = [40 + 1 - rankdata(row)[i] for i, row in enumerate(similarity)]
    assert found["mrr_text_to_code"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-6)
    assert found["retrieval_at_1_text_to_code"] == pytest.approx(np.mean([rank == 1 for rank in ranks]), abs=1e-6)
    ranks = [40 + 1 - rankdata(row)[i] for i, row in enumerate(similarity.T)]
    assert found["mrr_code_to_text"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-6)
    assert found["cosine_aligned"] == pytest.approx(np.diag(similarity).mean(), abs=1e-6)
    partner = data.derangement(40, 3)
    shuffled = np.mean([similarity[i, j] for i, j in enumerate(partner)])
    assert found["cosine_shuffled"] == pytest.approx(shuffled, abs=1e-6)
    assert all(i != j for i, j in enumerate(partner)) and sorted(partner) == list(range(40))
    values = svdvals(code - code.mean(axis=0))
    assert found["effective_rank_code"] == pytest.approx(np.exp(entropy(values / values.sum())), abs=1e-5)
    assert found["top100_singular_values_of_difference"] == pytest.approx(svdvals(pred - code).mean(), abs=1e-5)


def test_verdicts():
    base = RANDOM.normal(size=(50, 8))
    healthy = {"text": base, "pred": base + 0.1, "code": base}
    assert representation.verdict(representation.report(healthy)).startswith("No collapse")
    assert "closer than shuffled ones by" in representation.verdict(representation.report(healthy))
    collapsed = {name: 1 + 1e-3 * RANDOM.normal(size=(50, 8)) for name in healthy}
    figures = representation.report(collapsed)
    assert figures["cosine_aligned"] > 0.999 and figures["cosine_gap"] < 1e-3
    assert "have collapsed" in representation.verdict(figures)
    assert "have collapsed" in representation.verdict(representation.report(healthy | {"pred": collapsed["pred"]}))
    line = np.outer(RANDOM.normal(size=50), np.arange(8.0))
    assert "have collapsed" in representation.verdict(representation.report({name: line for name in healthy}))
    unrelated = {name: RANDOM.normal(size=(50, 8)) for name in healthy}
    assert "hardly closer" in representation.verdict(representation.report(unrelated))
    cone = {name: 4 + base for name in healthy}  # as pretrained decoders have it
    assert "No collapse" in representation.verdict(representation.report(cone))


def test_few_labels_are_no_collapse():
    """Codes that are Good or Bad lie on a line because there are two of them."""
    base = RANDOM.normal(size=(50, 8))
    encodings = {"text": base, "pred": base, "code": np.eye(8)[[0, 1] * 25]}
    assert "collapsed" not in representation.verdict(representation.report(encodings, different_codes=2))
    assert "have collapsed" in representation.verdict(representation.report(encodings))


def test_pictures_of_collapsed_encodings(tmp_path):
    """All rows one point: nothing to draw apart, but no failure."""
    same = np.ones((12, 4))
    encodings = {"text": same, "pred": same, "code": same}
    plots.tsne(representation.sides(encodings), "one point", tmp_path / "tsne.png")
    plots.spectrum({"run": encodings}, "one point", tmp_path / "spectrum.png")
    assert {path.name for path in tmp_path.iterdir()} == {"tsne.png", "spectrum.png"}


@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_encodings_are_read_where_training_reads_them(examples, reverse):
    """In the order of the examples, whatever the batches; Enc is the state that k = 0 would read."""
    model = LLMJEPA(toy_decoder("llama"), 2).eval()
    found = representation.encode(model, examples, batch_size=3, reverse=reverse)
    compared = representation.sides(found, reverse).values()
    for i, e in enumerate(examples):
        for side, state in zip(compared, model.encodings(data.collate([e], 2, reverse=reverse)), strict=True):
            np.testing.assert_allclose(side[i], state[0].numpy(), rtol=1e-4, atol=1e-5)
        for name, state in zip(("text", "code"), model.encodings(data.collate([e], 0)), strict=True):
            np.testing.assert_allclose(found[name][i], state[0].numpy(), rtol=1e-4, atol=1e-5)
    first, second = compared
    aligned = np.mean(np.diag(cosine_similarity(first, second)))
    assert representation.report(found, reverse=reverse)["cosine_aligned"] == pytest.approx(aligned, abs=1e-6)
    assert np.abs(found["pred"] - found["code" if reverse else "text"]).max() > 0.1
