"""The pictures. In: run folders or arrays. Out: PNG files, in Okabe and Ito's colours (safe for the colour-blind)."""

import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_log(run):
    """The objects of a run's log.jsonl."""
    with open(Path(run) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save(figure, path):
    """Write a figure, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    os.replace(partial, path)


def losses(runs, path):
    """Training (line) and validation (dots) of each run: the language-model loss and the JEPA loss apart."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    names = {"lm": "next-token loss (nats per token)", "jepa": "JEPA loss (distance per pair)"}
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        lines = read_log(run)
        title = Path(run).name
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
    save(figure, path)
