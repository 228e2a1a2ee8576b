"""From judged rows to what people see: rates with intervals, tables that compare systems, the files of an evaluation.

Nothing here knows models or tokens: a system is its rows (see tasks.py) and, if it is a model, figures on its encodings
(see encodings.py). Files carry a mark by which a later evaluation knows that it may replace them.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from evaluation import plots, statistics
from evaluation.tasks import REASONS
from support.cli import UserError, read_json, write, write_json

LABELS = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
RATES, FIGURES = LABELS["rates"], LABELS["figures"]  # {name in metrics.json: what tables call it}, in their order


@dataclass
class Evaluated:
    """What was found about one system."""

    name: str
    rows: list  # one dict a row: answer, question, gold answer, scores
    figures: dict = field(default_factory=dict)  # about the encodings; empty without a model
    before: dict = field(default_factory=dict)  # the same figures of the model that training began with
    verdict: str = ""  # one sentence on the encodings
    spectra: dict = field(default_factory=dict)  # {name: encodings} to be drawn: of the model, and of the one before


# ---- figures


def rates(rows):
    """{metric: {"value", "low", "high", "n"}}: the share of rows that can be scored, 95 % Wilson interval."""
    shares = {}
    for name in RATES:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            low, high = statistics.wilson(sum(known), len(known))
            shares[name] = {"value": sum(known) / len(known), "low": low, "high": high, "n": len(known)}
    return shares


def metrics(system, task, **more):
    """What metrics.json holds."""
    rows = system.rows
    found = {"made_by": "nano-llm-jepa", "system": system.name, "task": task, "n": len(rows), **more,
             "rates": rates(rows), "unscorable": sum("cannot_score" in row for row in rows),
             "undecided": sum("undecided" in row for row in rows),
             "wrong": {reason: sum(row["wrong_because"] == reason for row in rows) for reason in REASONS}}
    if system.figures:
        found |= {"representation": system.figures, "verdict": system.verdict}
    if system.before:
        found["representation_before"] = system.before
    return found


def difference(system, first, metric, seed):
    """(paired bootstrap of the difference in a metric, McNemar's p), as text, over the rows that both have."""
    theirs = {row["row"]: row.get(metric) for row in first.rows}
    pairs = [(row.get(metric), theirs.get(row["row"])) for row in system.rows]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return "-", "-"
    ours, others = zip(*pairs, strict=True)
    middle, low, high = statistics.paired_bootstrap(ours, others, seed)
    fewer = f", {len(pairs)} rows" if len(pairs) < max(len(system.rows), len(first.rows)) else ""
    return f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]{fewer}", f"{statistics.mcnemar(ours, others):.3g}"


# ---- tables


def table(systems, task, seed):
    """Lines of a table: each metric of every system, differences to the first, why outputs are wrong, encodings."""
    first, rest = systems[0], systems[1:]
    every = [rates(system.rows) for system in systems]
    cells = [["", *(system.name for system in systems)], ["rows", *(str(len(system.rows)) for system in systems)]]
    for name, label in RATES.items():
        if any(name in shares for shares in every):
            cells.append([label, *(percent(shares.get(name)) for shares in every)])
    for metric in dict.fromkeys(("exact", task, "same_language", "ending") if rest else ()):
        if metric in every[0]:
            middles, p_values = zip(*(difference(system, first, metric, seed) for system in rest), strict=True)
            cells.append([f"{RATES[metric]}: difference to {first.name}", "", *middles])
            cells.append([f"{RATES[metric]}: McNemar's p", "", *p_values])
    for reason in REASONS:
        counts = [sum(row["wrong_because"] == reason for row in system.rows) for system in systems]
        cells.append([f"wrong: {reason}", *map(str, counts)])
    for key, label in LABELS["doubtful"].items():
        counts = [sum(key in row for row in system.rows) for system in systems]
        if any(counts):
            cells.append([label, *map(str, counts)])
    for name, label in FIGURES.items() if first.figures else ():
        cells.append([label, *(number(system.figures[name]) for system in systems)])
        if first.before and name not in ("n", "different_codes"):
            cells.append([f"{label}: before", *(number(system.before[name]) for system in systems)])
    return markdown(cells)


def percent(share):
    return f"{share['value']:.2%} [{share['low']:.1%}, {share['high']:.1%}]" if share else "-"


def number(value):
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def markdown(cells):
    """The lines of a Markdown table, its columns padded so that it can be read as it stands."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def show(systems, args):
    """Print a table of systems, and of a single one what the table does not say."""
    print(f"\n{args.data.name}, task {args.task}", *table(systems, args.task, args.seed), sep="\n")
    if len(systems) == 1 and systems[0].verdict:
        print(systems[0].verdict)


# ---- files

# One of these stands in every file that an evaluation (or, of pictures, training) leaves.
MARKS = (b'"made_by": "nano-llm-jepa"', b'"wrong_because"', b"Software\0nano-llm-jepa", b"<!-- nano-llm-jepa -->")


def check_places(args, folders):
    """Refuse to write where an input would be lost, or a file that was not made here. folders: of the models."""
    outputs = [file for folder in folders for file in files_of(folder)]
    outputs += [args.out] if args.predictions and args.out else []
    outputs += [args.report, *pictures_of(args.report).values()] if args.report else []
    if len({*map(os.path.realpath, outputs)}) < len(outputs):
        raise UserError(f"--report {args.report}: one of its files is a RUN's result as well; choose another name")
    for path in filter(os.path.lexists, outputs):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file to write")
        if any(source and source.exists() and path.samefile(source) for source in (args.data, args.predictions)):
            raise UserError(f"{path}: is read as well, and would be lost; choose another place for the results")
        content = path.read_bytes() if path.is_file() else b""
        if not any(mark in content for mark in MARKS):
            raise UserError(f"{path}: is there, and not from an earlier evaluation; choose another place, or move it")


def files_of(folder):
    """What `write_model` leaves in a folder."""
    return [folder / name for name in ("metrics.json", "predictions.jsonl", "tsne.png", "spectrum.png")]


def pictures_of(path):
    """{name: file} of the pictures that `write_comparison` draws beside a report."""
    return {name: path.parent / f"{path.stem}-{name}.png" for name in ("spectrum", "curves")}


def write_model(system, sides, folder, title, task, **about):
    """Leave what was found about a model in a folder. sides: see encodings.py. about: more for metrics.json."""
    metrics_file, rows_file, tsne, spectrum = files_of(folder)
    write(rows_file, "".join(json.dumps(row) + "\n" for row in system.rows))
    write_json(metrics_file, metrics(system, task, **about))
    pairs, shuffled = system.figures["cosine_aligned"], system.figures["cosine_shuffled"]
    cosines = f"cosine of pairs {pairs:.3f}, of shuffled pairs {shuffled:.3f}"  # t-SNE would not show a collapse
    plots.tsne(sides, f"{title}\n{cosines}", tsne)
    plots.spectrum(system.spectra, title, spectrum)


def write_comparison(systems, folders, args):
    """Write the table as Markdown, with the spectra and curves of all models overlaid, and each one's t-SNE."""
    names, pictures = [system.name for system in systems], pictures_of(args.report)
    title = f"{args.data.name}, n = {len(systems[0].rows)}, task {args.task}"
    plots.spectrum({name: x for system in systems for name, x in system.spectra.items()}, title, pictures["spectrum"])
    logs = {name: run for name, run in zip(names, args.runs, strict=True)
            if (run / "log.jsonl").exists() and "arguments" in read_json(run / "config.json")}
    if logs:
        plots.curves(logs, pictures["curves"])
    else:
        del pictures["curves"]
    pictures |= {f"t-SNE, {name}": files_of(folder)[2] for name, folder in zip(names, folders, strict=True)}
    lines = ["<!-- nano-llm-jepa -->", f"# {', '.join(names)} on {title}", ""]
    lines += [*table(systems, args.task, args.seed), ""]
    lines += [f"{system.name}: {system.verdict}\n" for system in systems]
    for name, picture in pictures.items():
        address = os.fsencode(Path(os.path.relpath(picture, args.report.parent)).as_posix())
        lines.append(f"![{name}](<{quote(address, safe=b' /')}>)")
    write(args.report, "\n".join(lines) + "\n")
    print(f"{args.report} is written")


def short_names(paths):
    """A short name for each folder: the last part of its path, and of more parts if those are not different."""
    for depth in range(1, 20):
        found = ["-".join(path.resolve().parts[1:][-depth:]) for path in paths]
        if len(set(found)) == len(paths):
            return found
    raise UserError("a RUN is given twice; give different ones")
