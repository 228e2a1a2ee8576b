"""Figures about encodings, on matrices of which one knows the answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import toy_decoder
from scipy.linalg import svdvals
from scipy.stats import entropy, rankdata
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import cosine_similarity

import data
from evaluation import encodings, plots
from jepa import LLMJEPA
from support.cli import UserError

RANDOM = np.random.default_rng(0)


def figures_of(found, seed=0, codes=None, reverse=False):
    return encodings.measure(found, reverse, seed, codes)


def test_effective_rank():
    assert encodings.effective_rank(np.eye(4) - 0.25) == pytest.approx(3)  # centred: three equal directions
    assert encodings.effective_rank(np.ones((9, 4))) == 1.0
    line = np.outer(np.arange(9.0), [1, 2, 3])
    assert encodings.effective_rank(line) == pytest.approx(1.0, abs=1e-6)
    uneven = np.diag([3.0, 1.0, 0.0])[[0, 0, 1, 1]] * np.array([[1], [-1], [1], [-1]])  # singular values 3 and 1, times
    share = np.array([0.75, 0.25])  # the square root of 2
    assert encodings.effective_rank(uneven) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_ranks_count_ties_against_the_query():
    query = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert encodings.ranks(query, 5 * query).tolist() == [1, 1, 1]
    assert encodings.ranks(query, query[[1, 0, 2]]).tolist() == [3, 3, 1]
    same = np.ones((4, 2))
    assert encodings.ranks(same, same).tolist() == [4] * 4  # a collapse finds nothing
    one, other = np.random.default_rng(3).normal(size=(2, 2500, 3))  # more than are compared at once
    cosine = cosine_similarity(one, other)
    assert encodings.ranks(one, other).tolist() == (cosine >= np.diag(cosine)[:, None] - 1e-12).sum(axis=1).tolist()


def test_rows_of_one_code_are_as_right_as_each_other():
    """Their encodings differ in the last bits; which of them is nearest says nothing."""
    code = np.array([[1, 0.02, 0.01], [1, 0.02, 0.01], [0, 1, 0], [0, 0, 1]]) + 1e-8 * RANDOM.normal(size=(4, 3))
    assert encodings.ranks(code[[1, 0, 2, 3]], code, "aabc").tolist() == [1] * 4
    assert encodings.ranks(code[[2, 2, 2, 0]], code, "aabc").tolist() == [2, 2, 1, 4]
    assert encodings.ranks(-code[[0, 0, 2, 3]], code, "aabc").tolist()[:2] == [3, 3], "two other Codes are nearer"
    text = np.eye(3) + 0.5  # from Code to Text: the first two have one Code, and the first Text's is nearest to it
    assert encodings.ranks(text[[0, 0, 2]], text, "aab").tolist() == [1, 1, 1]
    assert encodings.ranks(text[[0, 0, 2]], text).tolist() == [1, 3, 1]
    figures = figures_of({"text": code, "pred": code[[1, 0, 2, 3]], "code": code}, codes=list("aabc"))
    assert figures["retrieval_at_1_text_to_code"] == figures["retrieval_at_1_code_to_text"] == 1
    assert (figures["n"], figures["different_codes"]) == (4, 3)


def test_mean_pairwise_cosine():
    x = RANDOM.normal(size=(6, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.mean([unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j])
    assert encodings.mean_pairwise_cosine(x) == pytest.approx(expected)


def test_the_best_linear_map():
    text = RANDOM.normal(size=(400, 5)) + 3
    map_ = RANDOM.normal(size=(5, 5))
    relative, absolute = encodings.linear_map(text, text @ map_)
    assert relative < 1e-12 and absolute < 1e-9
    relative, _ = encodings.linear_map(text, text @ map_ + 7)
    assert relative < 1e-12, "a constant is no part of what is to be explained"
    independent = RANDOM.normal(size=(400, 5))
    relative, absolute = encodings.linear_map(text, independent)
    assert 0.95 < relative < 1.1 and absolute > 30
    relative, absolute = encodings.linear_map(1e-6 * text, 1e-6 * independent)
    assert relative > 0.95 and absolute < 1e-3  # small encodings make the absolute residual small: no success
    assert encodings.linear_map(text, np.ones((400, 5)))[0] == 1.0  # nothing to be explained


def test_the_linear_map_is_scored_on_rows_that_it_was_not_fitted_to():
    """More columns than rows: any map fits its own rows, and the paper's absolute residual is zero."""
    text, code = RANDOM.normal(size=(60, 80)), RANDOM.normal(size=(60, 80))
    relative, absolute = encodings.linear_map(text, code)
    assert absolute < 1e-9 and relative > 0.9
    noise = RANDOM.normal(size=(400, 5))
    text = RANDOM.normal(size=(400, 5))
    relative, _ = encodings.linear_map(text, text + noise)
    part = np.arange(400) % 5
    fit = LinearRegression().fit(text[part < 3], (text + noise)[part < 3])
    held = (text + noise)[part == 4]
    expected = np.square(held - fit.predict(text[part == 4])).sum() / np.square(held - (text + noise)[part < 3].mean(
        axis=0)).sum()
    assert relative == pytest.approx(expected, rel=0.05) and 0.3 < relative < 0.7


def test_no_row_is_left_to_score_the_linear_map_on():
    """Of four rows the fourth chooses the ridge regression, and none is held out: no figure, rather than 1.0000."""
    x = RANDOM.normal(size=(4, 3))
    figures = figures_of({"text": x, "pred": x, "code": x})
    assert figures["linear_residual_relative"] is None and figures["linear_residual_absolute"] < 1e-9
    x = np.vstack([x, x[:1]])  # of five the fifth is
    assert figures_of({"text": x, "pred": x, "code": x})["linear_residual_relative"] >= 0


def test_figures_against_other_implementations():
    pred, code = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(40, 6))
    similarity = cosine_similarity(pred, code)
    found = figures_of({"text": pred, "pred": pred, "code": code}, seed=3)
    ranks = [40 + 1 - rankdata(row)[i] for i, row in enumerate(similarity)]
    assert found["mrr_text_to_code"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-6)
    assert found["retrieval_at_1_text_to_code"] == pytest.approx(np.mean([rank == 1 for rank in ranks]), abs=1e-6)
    assert found["retrieval_at_10_text_to_code"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=1e-6)
    ranks = [40 + 1 - rankdata(row)[i] for i, row in enumerate(similarity.T)]
    assert found["retrieval_at_10_code_to_text"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=1e-6)
    assert 0 < found["retrieval_at_10_code_to_text"] < 1
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
    assert encodings.verdict(figures_of(healthy)).startswith("No collapse")
    assert "closer than shuffled ones by" in encodings.verdict(figures_of(healthy))
    collapsed = {name: 1 + 1e-3 * RANDOM.normal(size=(50, 8)) for name in healthy}
    figures = figures_of(collapsed)
    assert figures["cosine_aligned"] > 0.999 and figures["cosine_gap"] < 1e-3
    assert "have collapsed" in encodings.verdict(figures)
    assert "have collapsed" in encodings.verdict(figures_of(healthy | {"pred": collapsed["pred"]}))
    line = np.outer(RANDOM.normal(size=50), np.arange(8.0))
    assert "have collapsed" in encodings.verdict(figures_of({name: line for name in healthy}))
    unrelated = {name: RANDOM.normal(size=(50, 8)) for name in healthy}
    assert "hardly closer" in encodings.verdict(figures_of(unrelated))
    cone = {name: 4 + base for name in healthy}  # as pretrained decoders have it
    assert "No collapse" in encodings.verdict(figures_of(cone))


def test_the_verdict_is_on_what_the_loss_compares():
    """With --reverse that is Enc(Text) and the predictions from Code; otherwise the predictions and Enc(Code)."""
    base, point = RANDOM.normal(size=(50, 8)), 1 + 1e-3 * RANDOM.normal(size=(50, 8))
    for name, reverse, collapsed in (("text", True, True), ("text", False, False),
                                     ("code", False, True), ("code", True, False)):
        figures = figures_of({"text": base, "pred": base, "code": base} | {name: point}, reverse=reverse)
        assert ("have collapsed" in encodings.verdict(figures, reverse)) == collapsed


def test_few_labels_are_no_collapse():
    """Codes that are Good or Bad lie on a line because there are two of them."""
    base = RANDOM.normal(size=(50, 8))
    few = {"text": base, "pred": base, "code": np.eye(8)[[0, 1] * 25]}
    assert "collapsed" not in encodings.verdict(figures_of(few, codes=[0, 1] * 25))
    assert "have collapsed" in encodings.verdict(figures_of(few))
    told_apart = few | {"pred": few["code"] + 1e-3 * base}
    assert "No collapse" in encodings.verdict(figures_of(told_apart, codes=[0, 1] * 25))
    reverse = figures_of(few | {"pred": few["code"]}, codes=[0, 1] * 25, reverse=True)
    assert "No collapse" in encodings.verdict(reverse, reverse=True)
    eight = {"text": base[:8], "pred": np.ones((8, 8)) + 1e-3 * base[:8], "code": base[:8]}
    assert "have collapsed" in encodings.verdict(figures_of(eight, reverse=True), True), "eight rows are no labels"
    point = few | {"pred": few["code"][[0] * 50] + 1e-3 * base}
    assert "have collapsed" in encodings.verdict(figures_of(point, codes=[0, 1] * 25))


def test_pictures_of_collapsed_encodings(tmp_path):
    """All rows one point: nothing to draw apart, but no failure."""
    same = np.ones((12, 4))
    found = {"text": same, "pred": same, "code": same}
    plots.tsne(encodings.sides(found), "one point", tmp_path / "tsne.png")
    plots.spectrum({"run": found}, "one point", tmp_path / "spectrum.png")
    assert {path.name for path in tmp_path.iterdir()} == {"tsne.png", "spectrum.png"}


LAYOUTS = [{}, {"reverse": True}, {"layout": "paper"}, {"layout": "paper", "reverse": True},
           {"layout": "paper", "front_pred": True}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_encodings_are_taken_where_training_takes_them(examples, layout):
    """In the order of the examples, whatever the batches. Enc is the state that k = 0 would give, in a pass of its own,
    although one pass gives it together with Pred."""
    model, reverse = LLMJEPA(toy_decoder("llama"), 2).eval(), layout.get("reverse", False)
    found = encodings.encode(model, examples, batch_size=3, **layout)
    compared = encodings.sides(found, reverse).values()

    def states(e, k, **layout):
        batch = data.collate([e], k, **layout)
        return model.encodings(model.hidden(batch), batch)

    plain = {name: value for name, value in layout.items() if name == "layout"}
    for i, e in enumerate(examples):
        for side, state in zip(compared, states(e, 2, **layout), strict=True):
            np.testing.assert_allclose(side[i], state[0].numpy(), rtol=1e-5, atol=1e-5)
        for name, state in zip(("text", "code"), states(e, 0, **plain), strict=True):
            np.testing.assert_allclose(found[name][i], state[0].numpy(), rtol=1e-5, atol=1e-5)
    first, second = compared
    aligned = np.mean(np.diag(cosine_similarity(first, second)))
    assert figures_of(found, reverse=reverse)["cosine_aligned"] == pytest.approx(aligned, abs=1e-6)
    assert np.abs(found["pred"] - found["code" if reverse else "text"]).max() > 0.1


@torch.no_grad()
def test_one_pass_over_each_row_is_enough(examples):
    model, passes = LLMJEPA(toy_decoder("llama"), 2).eval(), []
    hidden = model.hidden
    model.hidden = lambda batch: passes.append(len(batch.ids)) or hidden(batch)
    encodings.encode(model, examples, batch_size=3)
    assert passes == [3, 1]


# ---- what training looks at


def test_cosines_of_pairs_shuffled_pairs_and_codes():
    text, code = RANDOM.normal(size=(30, 6)), RANDOM.normal(size=(30, 6))
    similarity, own = cosine_similarity(text, code), cosine_similarity(code)
    expected = {"pairs": np.diag(similarity).mean(), "codes": own[~np.eye(30, dtype=bool)].mean(),
                "shuffled": np.mean([similarity[i, j] for i, j in enumerate(data.derangement(30, 4))])}
    assert encodings.cosines(text, code, seed=4) == pytest.approx(expected)
    tensors = torch.tensor(text, requires_grad=True), torch.tensor(code).bfloat16()
    assert encodings.cosines(*tensors, seed=4) == pytest.approx(expected, abs=0.01)
    one = encodings.cosines(text[:1], code[:1])
    assert one["pairs"] == pytest.approx(similarity[0, 0]) and np.isnan(one["shuffled"]) and np.isnan(one["codes"])
    assert not encodings.collapsed(one)


@pytest.mark.parametrize(("pairs", "shuffled", "collapsed"), [
    (0.9999, 0.9999, True),  # the paper's loss on small models
    (0.999, 0.985, False),  # a narrow cone in which rows are told apart
    (0.97, 0.87, False),  # with --stop_grad code
    (0.9, 0.9, False),  # alike, but not in one direction
    (0.729, 0.727, False),  # SmolLM2-135M before training
    (-0.28, -0.28, False),  # a contrastive loss on shuffled pairs
])
def test_collapse_needs_pairs_that_are_no_closer_than_others_and_all_alike(pairs, shuffled, collapsed):
    assert encodings.collapsed({"pairs": pairs, "shuffled": shuffled, "codes": 0.99}) is collapsed


def test_views_of_the_rows_own_are_encoded_in_the_paper_layout(examples):
    model = LLMJEPA(toy_decoder("llama"), 2).eval()
    own = encodings.encode(model, [replace(e, own_text=True) for e in examples], batch_size=3)
    for name, states in encodings.encode(model, examples, batch_size=3, layout="paper").items():
        assert np.array_equal(own[name], states)


def test_encodings_that_are_not_finite_are_refused(examples):
    model = LLMJEPA(toy_decoder("llama"), 1).eval()
    with torch.no_grad():
        model.pred.fill_(float("nan"))
    with pytest.raises(UserError, match="encodings are not finite"):
        encodings.encode(model, examples, batch_size=3)


def test_the_rows_that_score_the_linear_map_do_not_choose_it():
    """The fourth of five rows says that the map holds, the fifth that it does not: the score must be bad."""
    random = np.random.default_rng(0)
    text = random.normal(size=(100, 5))
    code = text @ random.normal(size=(5, 5))
    code[4::5] *= -1
    assert encodings.linear_map(text, code)[0] > 2


def test_the_linear_map_and_the_difference_are_of_text_and_not_of_predictions():
    random = np.random.default_rng(0)
    text, pred, code = random.normal(size=(3, 120, 110))
    found = figures_of({"text": text, "pred": pred, "code": code})
    top = svdvals(text - code)[:100].mean()
    assert found["top100_singular_values_of_difference"] == pytest.approx(top, abs=1e-5)
    x, map_ = random.normal(size=(50, 5)), random.normal(size=(5, 5))
    found = figures_of({"text": x, "pred": random.normal(size=(50, 5)), "code": x @ map_})
    assert found["linear_residual_relative"] == 0 and found["linear_residual_absolute"] == 0
