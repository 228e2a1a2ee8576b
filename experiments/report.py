"""Write the tables of experiments/README.md and draw the pictures of grids, from experiments/results and nothing else.

    python -m experiments.report pilot       # a grid of sweep, or a JSON file of bench or peers: its name without .json
    python -m experiments.report             # everything that README.md has a place for: <!-- NAME --> ... <!-- end -->

An interval is over seeds (95 %, Student's t). A p value is over rows: the arm's right answers, averaged over its seeds,
against those of lam 0 on the same rows, with signs flipped at random; Holm's correction is over the arms of the table.
"""

import math
import re
from statistics import mean, stdev

import numpy as np
import scipy

from evaluation import plots
from evaluation.report import markdown
from evaluation.tasks import REASONS
from evaluation.validation import SAMPLE, is_best
from experiments import bench
from experiments.sweep import GRIDS, RESULTS, ROOT
from support import cli
from support.cli import UserError

README = ROOT / "experiments" / "README.md"
CLAIMS = cli.read_json(ROOT / "experiments" / "claims.json")  # name: title; what is drawn; arms, as "grid/arm": label


# ---- statistics


def interval(values):
    """(mean, half the width of its 95 % interval); the latter is NaN for a single value."""
    n = len(values)
    return mean(values), float(scipy.stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def flip_test(differences, seed=0, draws=100_000):
    """Two-sided p of a mean of zero: the share of random signs of the rows' differences that take it as far from zero.
    Rows that differ by the same amount are drawn together, as one binomial number."""
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    heads = np.random.default_rng(seed).binomial(counts, 0.5, size=(draws, len(counts)))
    as_far = np.abs((2 * heads - counts) @ sizes) >= abs(sum(differences)) - 1e-9
    return float((1 + as_far.sum()) / (1 + draws))


def holm(p_values):
    """Each p value corrected for the number of tests (Holm 1979): below 0.05, its test is significant among all."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


# ---- grids


def read_grid(name):
    """{arm: {seed: what sweep wrote}} for every arm of a grid; an arm that was not run has no seeds."""
    found = {arm: {} for arm in GRIDS[name]["arms"]}
    for path in sorted((ROOT / RESULTS / name).glob("*.json")):
        cell = cli.read_json(path)
        found.setdefault(cell["arm"], {})[cell["seed"]] = cell  # also of arms that the grid does not name any more
    return found


def value(cell, metric):
    """A rate of metrics.json, a figure about the encodings, a count of wrong outputs; None if it is not there."""
    metrics = cell["metrics"]
    if metric == "val_lm":  # of the weights in best/
        lines = cell["validation"]
        return next((line["val_lm"] for i, line in [*enumerate(lines)][::-1] if is_best(line, lines[:i], SAMPLE)), None)
    if metric in metrics["rates"]:
        return metrics["rates"][metric]["value"]
    return (metrics["wrong"] | metrics.get("representation", {})).get(metric)


def average(cells, metric, form):
    """The mean over seeds as text; with an interval where `form` has a second place."""
    values = [value(cell, metric) for cell in cells.values()]
    if not values or None in values:
        return "-"
    middle, half = interval(values)
    return form.format(middle, half) if half == half else form.split(" ±")[0].format(middle)


def base_of(arm, arms):
    """The arm that this one is compared with: lam0 under the same settings."""
    return next(base for base in arms if base.endswith("lam0") and arm.startswith(base.removesuffix("lam0")))


def compare(cells, base):
    """(differences in exact match, one per seed; p over rows) of two arms, over the seeds that both have."""
    seeds = sorted(cells.keys() & base.keys())
    by_seed = [value(cells[seed], "exact") - value(base[seed], "exact") for seed in seeds]
    right = [np.mean([[int(c) for c in side[seed]["correct"]] for seed in seeds], axis=0) for side in (cells, base)]
    return by_seed, flip_test(right[0] - right[1])


COLUMNS = {  # heading: ((metric, form), ...)
    "exact match": (("exact", "{:.2%} ± {:.2%}"),),
    "validation loss": (("val_lm", "{:.4f}"),),
    "prefix match": (("prefix", "{:.2%}"),),
    "same language": (("same_language", "{:.2%}"),),
    "stop rate": (("stopped", "{:.1%}"),),
    "wrong: " + " / ".join(REASONS): tuple((reason, "{:.0f}") for reason in REASONS),
    "cosine of pairs / shuffled": (("cosine_aligned", "{:.3f}"), ("cosine_shuffled", "{:.3f}")),
    "retrieval@1": (("retrieval_at_1_text_to_code", "{:.1%} ± {:.1%}"),),
    "recall@10": (("retrieval_at_10_text_to_code", "{:.1%}"),),
    "candidates": (("n", "{:,.0f}"),),
    "rank of predictions / Codes": (("effective_rank_pred", "{:.1f}"), ("effective_rank_code", "{:.1f}")),
}


def grid_table(name):
    """Lines of Markdown: how the grid was run, a row for each arm, what was not run, the picture."""
    found, grid = read_grid(name), GRIDS[name]
    if not any(found.values()):
        return [f"`python -m experiments.sweep {name}`: not run. {grid['seeds']} seeds of {', '.join(found)}."]
    tests = {arm: compare(cells, found[base]) for arm, cells in found.items()
             if (base := base_of(arm, found)) != arm and cells.keys() & found[base].keys()}
    corrected = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    first, *rest = COLUMNS
    table, missing = [["arm", "seeds", first, "minus lam 0 (points)", "p", *rest]], {}
    for arm, cells in found.items():
        if absent := ", ".join(str(seed) for seed in range(grid["seeds"]) if seed not in cells):
            missing.setdefault(absent, []).append(arm)
        if not cells:
            continue
        texts = [" / ".join(average(cells, *metric) for metric in metrics) for metrics in COLUMNS.values()]
        against = ["-", "-"]
        if arm in tests:
            middle, half = interval([100 * difference for difference in tests[arm][0]])
            against = [f"{middle:+.2f}" + (f" ± {half:.2f}" if half == half else ""), f"{corrected[arm]:.2g}"]
        table.append([arm, str(len(cells)), texts[0], *against, *texts[1:]])
    absent = [f"of {', '.join(arms)} seeds {seeds}" for seeds, arms in missing.items()]
    not_run = ["", f"Not run: {'; '.join(absent)}."] if missing else []
    picture = ["", f"![{name}: exact match against retrieval@1](results/{name}.png)"] * grid.get("picture", True)
    return [conditions(name, found), "", *markdown(table), *not_run, *picture]


def conditions(name, found):
    """On what, how long and by which versions the cells of a grid were run."""
    cells = [cell for seeds in found.values() for cell in seeds.values()]
    many = lambda values: ", ".join(sorted(set(values)))  # noqa: E731
    hours = sum(sum(cell["seconds"].values()) for cell in cells) / 3600
    machines = many(cell["hardware"]["gpu"] or cell["hardware"]["processor"] for cell in cells)
    threads, codes = many(str(c["hardware"]["threads"]) for c in cells), many(c["versions"]["code"] for c in cells)
    return (f"`python -m experiments.sweep {name}`: {len(cells)} of {len(found) * GRIDS[name]['seeds']} cells, "
            f"{hours:.1f} hours in all, threads each: {threads}; {machines}; code {codes}.")


def draw_grid(name, path):
    """Exact match against retrieval@1: a point for each arm, a small one for each seed."""
    figure, axis = plots.panels(figsize=(9, 5.5), layout="constrained")
    arms = {arm: cells for arm, cells in read_grid(name).items() if cells}
    for number, (arm, cells) in enumerate(arms.items()):
        points = np.array([[100 * value(cell, metric) for metric in ("retrieval_at_1_text_to_code", "exact")]
                           for cell in cells.values()])
        look = {"color": plots.COLOURS[number % 7], "marker": "osD^v"[number // 7]}
        axis.scatter(*points.T, s=16, alpha=0.5, **look)
        axis.scatter(*points.mean(axis=0), s=90, edgecolors="black", label=f"{arm} ({len(cells)})", **look)
    axis.set(xlabel="retrieval@1, Text to Code (%)", ylabel="exact match (%)", title=f"{name}\n{GRIDS[name]['about']}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="arm (seeds)")
    plots.save(figure, path)


def draw_claim(name, path):
    """A panel for each metric, a line for each arm: its seeds as small points, their mean, its 95 % interval."""
    claim = CLAIMS[name]
    size = 4 + 3 * len(claim["metrics"]), 1.5 + 0.27 * len(claim["arms"])  # inches
    figure, axes = plots.panels(1, len(claim["metrics"]), sharey=True, figsize=size, layout="constrained")
    for axis, (metric, label) in zip(np.atleast_1d(axes), claim["metrics"].items(), strict=True):
        for line, (grid, arm) in enumerate(arm.split("/") for arm in claim["arms"]):
            cells = read_grid(grid)
            base = cells[base_of(arm, cells)] if metric == "gain" else cells[arm]
            if not cells[arm].keys() & base.keys():
                continue  # not run: its line stays empty
            found = [value(cell, metric) for cell in cells[arm].values()]
            if metric == "gain":
                found, _ = compare(cells[arm], base)
            found = [number * (100 if "%" in label or "points" in label else 1) for number in found]
            (middle, half), colour = interval(found), plots.COLOURS[[*GRIDS].index(grid) % 7]
            axis.errorbar(middle, line, xerr=half, fmt="o", markersize=6, capsize=3, color=colour)
            axis.plot(found, [line] * len(found), "o", markersize=3, alpha=0.4, color=colour)
        axis.set(xlabel=label, yticks=range(len(claim["arms"])), yticklabels=claim["arms"].values())
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.suptitle(claim["title"])
    plots.save(figure, path)


# ---- README.md


def section(name):
    """The lines that stand in README.md between the marks of this name."""
    if name in GRIDS:
        return grid_table(name)
    path = ROOT / RESULTS / f"{name}.json"
    if not path.exists():
        return ["Not measured yet."]
    found = cli.read_json(path)
    machine = found["machine"]
    where = f"{machine['gpu'] or machine['processor']}, torch {machine['torch']}"
    return [f"`{found['command']}`: {where}", "", *bench.tables(found)]


def fill(text, name, lines):
    """The text of README.md with these lines between the marks <!-- name --> and <!-- end -->."""
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(text):
        raise UserError(f"{README}: has no place for it; write <!-- {name} --> and <!-- end --> on lines of their own")
    return marks.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def main():
    p = cli.parser(__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="a grid, or a JSON file; default: all in README.md")
    args, text = p.parse_args(), README.read_text(encoding="utf-8")
    known = [*GRIDS, *sorted(path.stem for path in (ROOT / RESULTS).glob("*.json"))]
    for name in args.names:
        if name not in known:
            raise UserError(f"{name}: is neither a grid nor a file in {RESULTS}; there are {', '.join(known)}")
    for name in args.names or re.findall(r"<!-- (?!end)(\S+) -->", text):
        lines = section(name)
        text = fill(text, name, lines)
        print("\n".join([f"## {name}", "", *lines, ""]))
        if name in GRIDS and any(read_grid(name).values()) and GRIDS[name].get("picture", True):
            draw_grid(name, ROOT / RESULTS / f"{name}.png")
    for name, claim in CLAIMS.items():
        if not args.names or any(arm.split("/")[0] in args.names for arm in claim["arms"]):
            draw_claim(name, ROOT / RESULTS / f"claim-{name}.png")
    cli.write(README, text)


if __name__ == "__main__":
    cli.run(main)
