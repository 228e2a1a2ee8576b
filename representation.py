"""What JEPA did to the encodings. In: a model and examples. Out: the encodings, and a dict of figures about them.

Three matrices, one row per example: Text = Enc(Text), Pred = Pred(Enc(Text)), Code = Enc(Code), each read where
training reads it. A low JEPA loss alone proves nothing: if all encodings point the same way it is zero as well. Hence
the controls: the cosine of *shuffled* pairs, retrieval, effective rank, and a map scored on rows it was not fitted to.
"""

import numpy as np
import torch

import data


@torch.inference_mode()
def encode(model, examples, batch_size, **layout):
    """{"text": (n, C), "pred": (n, C), "code": (n, C)} as float64 arrays, in the order of the examples."""
    device, k = model.pred.device, len(model.pred)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].full))
    found = {"text": {}, "pred": {}, "code": {}}
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        members = [examples[i] for i in chosen]
        pred, code = model.encodings(data.collate(members, k, **layout).to(device))
        text, _ = model.encodings(data.collate(members, 0, layout=layout.get("layout", "fused")).to(device))
        for name, states in (("text", text), ("pred", pred), ("code", code)):
            found[name] |= dict(zip(chosen, states.double().cpu().numpy(), strict=True))
    return {name: np.stack([rows[i] for i in range(len(examples))]) for name, rows in found.items()}


def unit(x):  # (n, C) -> (n, C)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def retrieval(query, key):  # (n, C), (n, C) -> (recall@1, mean reciprocal rank)
    """How often, and how high, a query's own key stands when all keys are sorted by cosine. Ties count against it."""
    similarity = unit(query) @ unit(key).T  # (n, n)
    own = np.diag(similarity)[:, None]
    rank = (similarity >= own - 1e-12).sum(axis=1)  # 1: nothing else is as close
    return (rank == 1).mean(), (1 / rank).mean()


def effective_rank(x):  # (n, C) -> number between 1 and C
    """exp(entropy of the normalised singular values) of the centred matrix (Roy and Vetterli 2007)."""
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    if values.sum() <= 1e-9 * len(x):
        return 1.0  # all rows are the same point
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_pairwise_cosine(x):  # (n, C) -> ()
    n, total = len(x), unit(x).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def linear_map(text, code):  # (n, C), (n, C) -> (relative residual on held-out rows, absolute residual as in the paper)
    """How well the best linear map takes Text to Code.

    absolute: min over W of |Text W - Code| (Frobenius), fitted to all rows and scored on them; it shrinks with the
    encodings. relative: fitted to one half, squared error on the other over that of predicting the mean, so that
    0 is perfect and 1 is no better than a constant, however small the encodings are.
    """
    solve = lambda a, b: np.linalg.lstsq(a, b, rcond=1e-6)[0]  # noqa: E731
    absolute = np.linalg.norm(text @ solve(text, code) - code)
    half = len(text) // 2
    (a, b), (held_a, held_b) = (text[:half], code[:half]), (text[half:], code[half:])
    center_a, center_b = a.mean(axis=0), b.mean(axis=0)
    error = (held_a - center_a) @ solve(a - center_a, b - center_b) + center_b - held_b
    spread = np.square(held_b - center_b).sum()
    return float(np.square(error).sum() / spread) if spread > 1e-12 else 1.0, float(absolute)


def report(encodings, seed=0):
    """All figures of a dict that `encode` made, for n >= 4 examples."""
    text, pred, code = encodings["text"], encodings["pred"], encodings["code"]
    partner = data.derangement(len(text), seed)
    aligned = (unit(pred) * unit(code)).sum(axis=1).mean()
    shuffled = (unit(pred) * unit(code[partner])).sum(axis=1).mean()
    relative, absolute = linear_map(text, code)
    figures = {"n": len(text), "cosine_aligned": aligned, "cosine_shuffled": shuffled, "cosine_gap": aligned - shuffled}
    for name, (query, key) in {"text_to_code": (pred, code), "code_to_text": (code, pred)}.items():
        figures[f"retrieval_at_1_{name}"], figures[f"mrr_{name}"] = retrieval(query, key)
    for name, matrix in encodings.items():
        figures[f"effective_rank_{name}"] = effective_rank(matrix)
        figures[f"mean_pairwise_cosine_{name}"] = mean_pairwise_cosine(matrix)
    top = np.linalg.svd(text - code, compute_uv=False)[:100]
    figures |= {"linear_residual_relative": relative, "linear_residual_absolute": absolute,
                "top100_singular_values_of_difference": top.mean()}
    return {name: value if name == "n" else round(float(value), 6) for name, value in figures.items()}


def verdict(figures):
    """One sentence: have the encodings collapsed?"""
    pairwise, rank = figures["mean_pairwise_cosine_code"], figures["effective_rank_code"]
    numbers = f"mean cosine between different Codes {pairwise:.2f}, effective rank {rank:.1f}"
    if pairwise > 0.95 or rank < 2:
        return f"The encodings have collapsed: all Codes lie in nearly one direction ({numbers})."
    if figures["cosine_gap"] < 0.05:
        return f"No collapse ({numbers}), but pairs are hardly closer than shuffled ones ({figures['cosine_gap']:.2f})."
    return f"No collapse ({numbers}); pairs are closer than shuffled ones by {figures['cosine_gap']:.2f} in cosine."
