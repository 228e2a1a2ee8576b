"""What JEPA did to the encodings. In: a model and examples. Out: the encodings, and a dict of figures about them.

Three matrices, one row per example: text = Enc(Text), code = Enc(Code), pred = Pred(Enc(Text)), or Pred(Enc(Code)) of a
model trained with --reverse, each taken where training takes it. A low JEPA loss alone proves nothing: if all encodings
point the same way it is zero as well. Hence the controls: the cosine of *shuffled* pairs, retrieval, effective rank,
and a map scored on rows it was not fitted to.
"""

import math

import numpy as np
import torch

import data
from jepa import pick
from support.cli import UserError


@torch.inference_mode()
def encode(model, examples, batch_size, layout="fused", front_pred=False, reverse=False):
    """{"text": (n, C), "pred": (n, C), "code": (n, C)} as float64 arrays, in the order of the examples."""
    if any(e.own_text for e in examples):
        layout = "paper"  # a fused row would share the conversation's TEXT
    device, k = model.pred.device, len(model.pred)
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].full))  # a lack of memory shows at once
    found = {"text": [], "pred": [], "code": []}
    for start in range(0, len(by_length), batch_size):
        members = [examples[i] for i in by_length[start : start + batch_size]]
        batch = data.collate(members, k, layout, front_pred=front_pred, reverse=reverse).to(device)
        plain = data.collate(members, 0, layout).to(device)  # without [PRED]: its places are those of Enc
        hidden = model.hidden(batch)  # what stands before [PRED] does not see it: one pass gives Enc and Pred
        text, code = model.encodings(hidden, batch)
        pred = code if reverse else text
        if front_pred:  # here Text does see it
            hidden = model.hidden(plain)
        if reverse:
            code = pick(hidden, plain.code_at).float()
        else:
            text = pick(hidden, plain.text_at).float()
        for name, states in (("text", text), ("pred", pred), ("code", code)):
            found[name].append(states.cpu().double().numpy())
    found = {name: np.concatenate(parts)[np.argsort(by_length)] for name, parts in found.items()}
    if not all(np.isfinite(states).all() for states in found.values()):
        raise UserError("the model's encodings are not finite; evaluate another checkpoint")
    return found


def sides(encodings, reverse=False):
    """{name: (n, C)}: the two matrices that the JEPA loss compares, Text's first."""
    if reverse:
        return {"Enc(Text)": encodings["text"], "Pred(Enc(Code))": encodings["pred"]}
    return {"Pred(Enc(Text))": encodings["pred"], "Enc(Code)": encodings["code"]}


def unit(x):  # (n, C) -> (n, C)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def cosines(text, code, seed=0):  # (n, C), (n, C): arrays or tensors
    """Mean cosines, {"pairs", "shuffled", "codes"}: of true pairs, of each Text with another row's Code, and between
    the Codes of different rows. Of a single row the latter two are not a number."""
    text, code = (unit(torch.as_tensor(x).detach().cpu().double().numpy()) for x in (text, code))
    several = len(text) > 1
    return {
        "pairs": float((text * code).sum(axis=1).mean()),
        "shuffled": float((text * code[data.derangement(len(text), seed)]).sum(axis=1).mean()) if several else math.nan,
        "codes": float(mean_pairwise_cosine(code)) if several else math.nan,
    }


def collapsed(cosines):
    """Do all point in nearly one direction, true pairs no closer than shuffled ones? Both parts are needed: untrained
    pairs are no closer either (0.729 and 0.727, SmolLM2 on Spider), and in a narrow cone rows may be told apart."""
    return cosines["shuffled"] > 0.95 and cosines["pairs"] - cosines["shuffled"] < 0.01


def mean_pairwise_cosine(x):  # (n, C) -> ()
    n, total = len(x), unit(x).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def ranks(query, key, codes=None):  # (n, C), (n, C), n hashable values -> (n,)
    """Where a query's own key, or that of a row of the same Code (which is as right), stands when all n keys are sorted
    by cosine, from 1. Ties count against it."""
    query, key, numbers = unit(query), unit(key), {}
    codes = np.array([numbers.setdefault(code, len(numbers)) for code in codes or range(len(query))])

    def of(part):
        cosine, right = query[part] @ key.T, codes[part, None] == codes
        best = np.where(right, cosine, -2).max(axis=1, keepdims=True)
        return 1 + (~right & (cosine >= best - 1e-12)).sum(axis=1)

    return np.concatenate([of(slice(start, start + 1000)) for start in range(0, len(query), 1000)])  # not all of (n, n)


def effective_rank(x):  # (n, C) -> number between 1 and C
    """exp(entropy of the normalised singular values) of the centred matrix (Roy and Vetterli 2007)."""
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    if values.sum() <= 1e-9 * len(x):
        return 1.0  # all rows are the same point
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def linear_map(text, code):  # (n, C), (n, C) -> (relative residual on held-out rows, absolute residual as in the paper)
    """How well the best linear map takes Text to Code.

    absolute: min over W of |Text W - Code| (Frobenius), fitted to all rows and scored on them: it shrinks with the
    encodings, and is 0 for n <= C. relative: squared error over that of predicting the mean Code, so that 0 is perfect
    and 1 no better than a constant, on rows that the map has not seen. Of five rows three fit ridge regressions, one
    chooses among them, one is scored; of fewer than five rows none is left, and the relative residual is None.
    """
    absolute = float(np.linalg.norm(text @ np.linalg.lstsq(text, code, rcond=1e-6)[0] - code))
    if len(text) < 5:
        return None, absolute
    part = np.arange(len(text)) % 5
    center, mean = text[part < 3].mean(axis=0), code[part < 3].mean(axis=0)
    u, s, v = np.linalg.svd(text[part < 3] - center, full_matrices=False)
    target = u.T @ (code[part < 3] - mean)

    def residual(ridge, rows):
        shrunk = (s / np.maximum(s**2 + ridge * s[0] ** 2, 1e-300))[:, None] * target
        return np.square((text[rows] - center) @ v.T @ shrunk + mean - code[rows]).sum()

    best = min(10.0 ** np.arange(-13, 4), key=lambda ridge: residual(ridge, part == 3))
    spread = np.square(code[part == 4] - mean).sum()
    negligible = 1e-12 * np.square(code).sum()  # all Codes are one point: nothing to be explained
    return float(residual(best, part == 4) / spread) if spread > negligible else 1.0, absolute


def measure(encodings, reverse=False, seed=0, codes=None):
    """All figures of what `encode` made of n >= 4 examples. codes: by which equal Codes are known, if any are equal."""
    text, code = sides(encodings, reverse).values()
    pairs, shuffled, _ = cosines(text, code, seed).values()
    figures = {"cosine_aligned": pairs, "cosine_shuffled": shuffled, "cosine_gap": pairs - shuffled}
    for name, (query, key) in {"text_to_code": (text, code), "code_to_text": (code, text)}.items():
        rank = ranks(query, key, codes)
        figures |= {f"retrieval_at_1_{name}": (rank == 1).mean(), f"retrieval_at_10_{name}": (rank <= 10).mean(),
                    f"mrr_{name}": (1 / rank).mean()}
    for name, matrix in encodings.items():
        figures[f"effective_rank_{name}"] = effective_rank(matrix)
        figures[f"mean_pairwise_cosine_{name}"] = mean_pairwise_cosine(matrix)
    relative, absolute = linear_map(encodings["text"], encodings["code"])
    top = np.linalg.svd(encodings["text"] - encodings["code"], compute_uv=False)[:100]
    figures |= {"linear_residual_relative": relative, "linear_residual_absolute": absolute,
                "top100_singular_values_of_difference": top.mean()}
    rounded = {name: None if value is None else round(float(value), 6) + 0.0 for name, value in figures.items()}
    return {"n": len(text), "different_codes": len(set(codes or range(len(text))))} | rounded


def verdict(figures, reverse=False):
    """One sentence: have the encodings that the JEPA loss compares collapsed? Pretrained states lie in a cone (mean
    cosine 0.94 of different Codes, at 135M parameters): no collapse. Labels, few in number, may share a direction."""
    few = figures["different_codes"] < min(10, figures["n"])
    names = {} if few and reverse else {"pred": "the predictions"}
    if reverse:
        names["text"] = "Enc(Text)"
    elif not few:
        names["code"] = "Enc(Code)"
    worst = max(names, key=lambda name: figures[f"mean_pairwise_cosine_{name}"])
    pairwise, rank = figures[f"mean_pairwise_cosine_{worst}"], min(figures[f"effective_rank_{name}"] for name in names)
    numbers = f"mean cosine between different rows of {names[worst]} {pairwise:.3f}, smallest effective rank {rank:.1f}"
    gap = figures["cosine_gap"]
    if pairwise > 0.99 or rank < 2 and not few:
        return f"The encodings have collapsed: different rows point in nearly one direction ({numbers})."
    if gap < 0.05:
        return f"No collapse ({numbers}), but pairs are hardly closer than shuffled ones ({gap:+.3f} in cosine)."
    return f"No collapse ({numbers}); pairs are closer than shuffled ones by {gap:.3f} in cosine."
