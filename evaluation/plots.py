"""The pictures. In: run folders or arrays. Out: PNG files, in Okabe and Ito's colours (safe for the colour-blind)."""

import json
from pathlib import Path

import matplotlib
import numpy as np

from support.cli import writing

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_log(run):
    """The objects of a run's log.jsonl; none if it was stopped before the first. Half a line at the end is left."""
    path = Path(run) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def training_of(run):
    """What a run was trained on, for legends: model, data file, rows, seed."""
    config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    settings = config["arguments"]
    rows = f", n = {config['rows']:,}" if "rows" in config else ""
    return f"{Path(settings['init']).name}, {Path(settings['data']).name}{rows}, seed {settings['seed']}"


def short(name, most=50):
    """A name that fits into a legend: its middle is left out if need be."""
    return name if len(name) <= most else f"{name[:most // 2]}...{name[-most // 2 + 3:]}"


def save(figure, path):
    """Write a figure, whole or not at all."""
    with writing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def losses(runs, path):
    """Training (line) and validation (dots) of each run: the language-model loss and the JEPA loss apart.

    runs: folders, or {name: folder}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    names = {"lm": "next-token loss (nats per token)", "jepa": "JEPA loss (distance per pair)"}
    named = runs if isinstance(runs, dict) else {Path(run).name: run for run in runs}
    for (title, run), colour in zip(named.items(), COLOURS * len(named), strict=False):
        lines = read_log(run)
        for axis, name in zip(axes, names, strict=True):
            train = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            val = [(line["step"], line[f"val_{name}"]) for line in lines if f"val_{name}" in line]
            axis.plot(*np.reshape(train, (-1, 2)).T, color=colour, linewidth=1, alpha=0.7)
            axis.plot(*np.reshape(val, (-1, 2)).T, "o", color=colour, markersize=4)
        axes[0].plot([], "-o", color=colour, markersize=4, label=f"{short(title)} ({training_of(run)})")
    for axis, label in zip(axes, names.values(), strict=True):
        axis.set(xlabel="optimizer step", title=label)
        axis.grid(alpha=0.3)
        if np.isfinite(axis.dataLim.ymin) and axis.dataLim.ymin > 0:
            axis.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=1)
    figure.suptitle("Loss in training (lines) and on the validation rows (dots)")
    save(figure, path)


def tsne(sides, title, path, most=500):
    """`representation.sides`, (n, C) each, in two dimensions; a faint line joins the two views of an example."""
    from sklearn.manifold import TSNE

    (text_name, text), (code_name, code) = sides.items()
    n = min(len(text), most)
    both = np.concatenate([text[:n], code[:n]])
    both = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)  # the loss compares directions
    start = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of a single point is not defined
    points = TSNE(perplexity=min(30, (len(both) - 1) / 3), init=start, random_state=0).fit_transform(both)
    figure, axis = plt.subplots(figsize=(7, 7))
    axis.plot(*np.stack([points[:n], points[n:]]).transpose(2, 0, 1), color="#999999", linewidth=0.5, alpha=0.3)
    axis.scatter(*points[:n].T, s=12, color=COLOURS[0], marker="o", label=f"Text: {text_name}")
    axis.scatter(*points[n:].T, s=12, color=COLOURS[1], marker="^", label=f"Code: {code_name}")
    axis.set(xticks=[], yticks=[], title=title + (f" (first {n} drawn)" if n < len(text) else ""))
    axis.legend()
    save(figure, path)


def spectrum(runs, title, path):
    """Singular values of the centred encodings of runs: {run name: {"text": (n, C), "pred": ..., "code": ...}}."""
    names = {"text": "Enc(Text)", "pred": "prediction, from the last [PRED]", "code": "Enc(Code)"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for (run, encodings), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            x = encodings[name]
            values = np.linalg.svd((x - x.mean(axis=0)) / np.sqrt(len(x)), compute_uv=False)
            values = values[: len(x) - 1]  # centred rows span one dimension less: the next one is zero
            axis.plot(range(1, len(values) + 1), np.maximum(values, 1e-9), color=colour, label=short(run))
        axis.set(xlabel="index", title=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value / sqrt(n)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(runs)))
    figure.suptitle(title)
    save(figure, path)
