"""The pictures. In: run folders or arrays. Out: PNG files, in Okabe and Ito's colours (safe for the colour-blind)."""

from pathlib import Path

import numpy as np

from evaluation.encodings import unit
from support.cli import writing

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def panels(*size, sharey=False, **options):
    """(figure, axes) to draw on. Without pyplot: for files only, with or without a screen; nothing has to be closed."""
    from matplotlib.figure import Figure

    figure = Figure(**options)
    return figure, figure.subplots(*size, sharey=sharey)


def save(figure, path, area="tight"):
    """Write a figure, whole or not at all. area: as large as what is drawn needs, or None: as large as it was made."""
    with writing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, bbox_inches=area, metadata={"Software": "nano-llm-jepa"})


def legible(name, most=50):
    """A file's or run's name as a picture can show it: not long, all of it text, no formula between its $."""
    name = str(name).encode("utf-8", "backslashreplace").decode()
    if len(name) > most:
        name = f"{name[:most // 2]}...{name[-most // 2 + 3:]}"
    return name.replace("$", r"\$")


def training_of(config):
    """What a run was trained on, for legends: model, data file, rows, seed, from its config.json."""
    arguments = config["arguments"]
    rows = f", n = {config['rows']:,}" if isinstance(config.get("rows"), int) else ""
    return legible(f"{Path(arguments['init']).name}, {Path(arguments['data']).name}{rows}, "
                   f"seed {arguments.get('seed')}", 90)


PANELS = {  # title: {key in log.jsonl: (how it is drawn, name in the panel's own legend)}
    "next-token loss (nats per token)": {"lm": ("-", "training"), "val_lm": ("o", "validation")},
    "JEPA loss (distance per pair)": {"jepa": ("-", "training"), "val_jepa": ("o", "validation")},
    "on the validation rows": {"val_cosine_pairs": ("-o", "cosine of pairs"), "val_cosine_shuffled": (
        "--x", "cosine of shuffled pairs"), "val_exact": (":s", "exact match")},
}


def curves(folders, path):
    """What became of runs while they were trained, a panel for each of PANELS. folders: a list, or {name: folder}."""
    from hf import runs  # and with it models, which `eval.py --predictions` does without

    named = folders if isinstance(folders, dict) else {Path(folder).name: folder for folder in folders}
    logs = [runs.read_log(folder) for folder in named.values()]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(logs))]
    figure, axes = panels(1, len(PANELS), figsize=(15, 4.3 + 0.2 * len(logs)), layout="constrained")
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for key, (style, label) in keys.items():
            axis.plot([], style, color="#555555", markersize=4, label=label)
            for lines, colour in zip(logs, colours, strict=True):
                points = [(line["step"], line[key]) for line in lines if drawable(line["step"], line.get(key))]
                axis.plot(*np.reshape(points, (-1, 2)).T, style, color=colour, linewidth=1.2, markersize=4, alpha=0.7)
        axis.set(xlabel="optimizer step", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[2].set_ylim(top=1.05)
    for axis in axes[:2]:
        if np.isfinite(axis.dataLim.ymin) and axis.dataLim.ymin > 0:
            axis.set_yscale("log")
    labels = [f"{legible(name)} ({training_of(runs.settings(folder))})" for name, folder in named.items()]
    lines = [axes[0].plot([], "-o", color=colour, markersize=4)[0] for colour in colours]
    figure.legend(lines, labels, loc="outside lower center", ncols=1)
    save(figure, path, area=None)  # after each epoch of a training: to look what is needed would draw it twice


def drawable(*values):
    """Are these numbers, and of a size that a picture has room for? In a log there may be anything."""
    return all(isinstance(value, (int, float)) and abs(value) < 1e30 for value in values)


def tsne(sides, title, path, most=500):
    """`encodings.sides`, (n, C) each, in two dimensions; a faint line joins the two views of an example."""
    from sklearn.manifold import TSNE

    (text_name, text), (code_name, code) = sides.items()
    n = min(len(text), most)
    both = unit(np.concatenate([text[:n], code[:n]]))  # the loss compares directions
    start = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of a single point is not defined
    points = TSNE(perplexity=min(30, (len(both) - 1) / 3), init=start, random_state=0).fit_transform(both)
    figure, axis = panels(figsize=(7, 7))
    axis.plot(*np.stack([points[:n], points[n:]]).transpose(2, 0, 1), color="#999999", linewidth=0.5, alpha=0.3)
    axis.scatter(*points[:n].T, s=12, color=COLOURS[0], marker="o", label=f"Text: {text_name}")
    axis.scatter(*points[n:].T, s=12, color=COLOURS[1], marker="^", label=f"Code: {code_name}")
    axis.set(xticks=[], yticks=[], title=legible(title, 200) + (f" (first {n} drawn)" if n < len(text) else ""))
    axis.legend()
    save(figure, path)


def spectrum(models, title, path):
    """Singular values of the centred encodings of models: {name: {"text": (n, C), "pred": ..., "code": ...}}."""
    labels = {"text": "Enc(Text)", "pred": "prediction, from the last [PRED]", "code": "Enc(Code)"}
    figure, axes = panels(1, 3, figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, (which, label) in zip(axes, labels.items(), strict=True):
        for encodings, colour in zip(models.values(), COLOURS * len(models), strict=False):
            x = encodings[which]
            values = np.linalg.svd((x - x.mean(axis=0)) / np.sqrt(len(x)), compute_uv=False)
            values = values[: len(x) - 1]  # centred rows span one dimension less: the next one is zero
            axis.plot(range(1, len(values) + 1), np.maximum(values, 1e-9), color=colour)
        axis.set(xlabel="index", title=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value / sqrt(n)")
    labels = [legible(name) for name in models]
    figure.legend(axes[0].get_lines(), labels, loc="outside lower center", ncols=min(3, len(models)))
    figure.suptitle(legible(title, 200))
    save(figure, path)
