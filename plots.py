"""The pictures. In: run folders or arrays. Out: PNG files, in Okabe and Ito's colours (safe for the colour-blind)."""

import json
import os
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_log(run):
    """The objects of a run's log.jsonl; none if the run was stopped before the first."""
    if not (Path(run) / "log.jsonl").exists():
        return []
    with open(Path(run) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def training_of(run):
    """What a run was trained on, for titles: data file and seed."""
    with open(Path(run) / "config.json", encoding="utf-8") as file:
        settings = json.load(file)["arguments"]
    return f"{Path(settings['data']).name}, seed {settings['seed']}"


def save(figure, path):
    """Write a figure, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    os.replace(partial, path)


def losses(runs, path):
    """Training (line) and validation (dots) of each run: the language-model loss and the JEPA loss apart.

    runs: folders, or {name: folder}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    names = {"lm": "next-token loss (nats per token)", "jepa": "JEPA loss (distance per pair)"}
    named = runs if isinstance(runs, dict) else {Path(run).name: run for run in runs}
    for (title, run), colour in zip(named.items(), COLOURS * len(named), strict=False):
        lines = read_log(run)
        for axis, name in zip(axes, names, strict=True):
            train = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            val = [(line["step"], line[f"val_{name}"]) for line in lines if f"val_{name}" in line]
            if train:
                axis.plot(*zip(*train, strict=True), color=colour, linewidth=1, alpha=0.7, label=f"{title}, train")
            if val:
                axis.plot(*zip(*val, strict=True), "o", color=colour, markersize=4, label=f"{title}, validation")
    for axis, label in zip(axes, names.values(), strict=True):
        axis.set(xlabel="optimizer step", title=label)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
        if axis.has_data() and axis.dataLim.ymin > 0:
            axis.set_yscale("log")
    figure.suptitle("Training on " + "; ".join(dict.fromkeys(map(training_of, named.values()))))
    figure.tight_layout()
    save(figure, path)


def tsne(text, code, title, path, most=500):
    """Pred(Enc(Text)) and Enc(Code), (n, C) each, in two dimensions; a faint line joins the two views of an example."""
    from sklearn.manifold import TSNE

    n = min(len(text), most)
    both = np.concatenate([text[:n], code[:n]])
    both = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)  # the loss compares directions
    start = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of a single point is not defined
    points = TSNE(perplexity=min(30, (len(both) - 1) / 3), init=start, random_state=0).fit_transform(both)
    figure, axis = plt.subplots(figsize=(7, 7))
    axis.plot(*np.stack([points[:n], points[n:]]).transpose(2, 0, 1), color="#999999", linewidth=0.5, alpha=0.3)
    axis.scatter(*points[:n].T, s=12, color=COLOURS[0], marker="o", label="Text: Pred(Enc(Text))")
    axis.scatter(*points[n:].T, s=12, color=COLOURS[1], marker="^", label="Code: Enc(Code)")
    axis.set(xticks=[], yticks=[], title=title + (f" (first {n} drawn)" if n < len(text) else ""))
    axis.legend()
    save(figure, path)


def spectrum(runs, title, path):
    """Singular values of the centred encodings of runs: {run name: {"text": (n, C), "pred": ..., "code": ...}}."""
    names = {"text": "Enc(Text)", "pred": "Pred(Enc(Text))", "code": "Enc(Code)"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for (run, encodings), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            x = encodings[name]
            values = np.linalg.svd((x - x.mean(axis=0)) / np.sqrt(len(x)), compute_uv=False)
            axis.plot(range(1, len(values) + 1), np.maximum(values, 1e-9), color=colour, label=run)
        axis.set(xlabel="index", title=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value / sqrt(n)")
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, path)
