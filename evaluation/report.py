"""From outputs to figures: judge every row, sum up, compare systems. In: outputs and conversations. Out: plain dicts.

Nothing here knows models or tokens, so the outputs of any system can be scored. Whether one answer is right is decided
in score.py and regular.py; eval.py prints and writes what this file makes.
"""

import json
import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from evaluation import regexes as regular
from evaluation import statistics
from evaluation import tasks as score
from support.cli import UserError

RATES = {"exact": "exact match", "prefix": "starts with the gold answer", "contains": "contains the gold answer",
         "stopped": "ended by the stop token", "same_language": "same language as the gold regex",
         "spider": "same result when executed", "gsm8k": "right number after ####", "nq_open": "names a gold answer",
         "label": "right label", "hellaswag": "right letter", "ending": "likeliest ending is right"}
REASONS = ("stopped too early", "cut off by the budget", "ran on", "other")
FIGURES = {
    "cosine_aligned": "cosine of pairs, prediction and target", "cosine_shuffled": "cosine of shuffled pairs",
    "cosine_gap": "pairs minus shuffled pairs",
    "retrieval_at_1_text_to_code": "retrieval@1, Text to Code",
    "retrieval_at_1_code_to_text": "retrieval@1, Code to Text",
    "mrr_text_to_code": "mean reciprocal rank, Text to Code", "mrr_code_to_text": "mean reciprocal rank, Code to Text",
    "effective_rank_text": "effective rank, Enc(Text)", "effective_rank_pred": "effective rank, predictions",
    "effective_rank_code": "effective rank, Enc(Code)", "mean_pairwise_cosine_text": "mean pairwise cosine, Enc(Text)",
    "mean_pairwise_cosine_pred": "mean pairwise cosine, predictions",
    "mean_pairwise_cosine_code": "mean pairwise cosine, Enc(Code)",
    "linear_residual_relative": "best linear map, relative residual on held-out rows",
    "linear_residual_absolute": "the same as in the paper: absolute, not held out",
    "top100_singular_values_of_difference": "mean of top 100 singular values, Text - Code",
}


@dataclass
class Result:
    """What was found about one system."""

    name: str
    rows: list  # what `judge` makes
    figures: dict = field(default_factory=dict)  # about the encodings (representation.report); empty without a model
    before: dict = field(default_factory=dict)  # the same figures of the model that training began with
    verdict: str = ""  # one sentence on the encodings


def progress(rows, label, **options):
    """A progress bar with an estimate of the time left; in a log file only now and then."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(rows, label, unit="row", leave=False, mininterval=interval, **options)


def check_answered(conversations):
    """Refuse rows that have no gold answer to score by."""
    for conversation in conversations:
        if [message["role"] for message in conversation.messages[-2:]] != ["user", "assistant"]:
            raise UserError(f"{conversation.where}: must end with a question and its answer, to be scored by")


def row_number(conversation):
    """The line of the data file that a conversation stands on."""
    return int(conversation.where.rpartition(":")[2])


def read_outputs(path, conversations):
    """(answers, the conversations that they answer) from the file of another system, or from eval.py's predictions.

    Line i is {"output": ...} for conversation i; or each line says by "row" which line of the data it answers, and then
    some may be missing. Of other keys only "stopped" and "ending_letter" count, which eval.py itself writes.
    """
    lines = _objects(path)
    by_row = {row_number(conversation): conversation for conversation in conversations}
    numbered, left = "row" in lines[0], dict(by_row)
    if len(lines) > len(by_row):
        raise UserError(f"{path}:{len(by_row) + 1}: --data has only {len(by_row)} rows; give one output for each")
    answers = []
    for number, made in enumerate(lines, 1):
        row = made.get("row") if numbered else next(iter(left))
        if not isinstance(row, int) or row not in by_row:
            raise UserError(f"{path}:{number}: --data has no row {row}; are these the outputs for another file?")
        if left.pop(row, None) is None:
            raise UserError(f"{path}:{number}: is another output for row {row} of --data; give one for each")
        answers.append({"row": row, "output": made["output"]})
        answers[-1] |= {name: made[name] for name, kind in (("stopped", bool), ("ending_letter", str))
                        if isinstance(made.get(name), kind)}
    if left and not numbered:
        missing = next(iter(left.values())).where
        raise UserError(f"{path}:{len(lines) + 1}: the file ends, with no output for {missing} and what follows; "
                        f"give {len(by_row)} outputs, or --limit {len(lines)}")
    if left:
        print(f"{path.name} answers {len(lines)} of {len(by_row)} rows; the others are left out", file=sys.stderr)
    return answers, [by_row[answer["row"]] for answer in answers]


def _objects(path):
    """The objects of a JSONL file of outputs: at least one, each with a string "output"."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines: a string may hold U+2028 as it is
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); give a JSONL file of outputs") from None
    while lines and not lines[-1].strip():
        lines.pop()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError):
            objects.append(None)
        if not isinstance(objects[-1], dict) or not isinstance(objects[-1].get("output"), str):
            raise UserError(f'{path}:{number}: must be {{"output": "..."}}, one line for each row of --data')
    if not objects:
        raise UserError(f'{path}: is empty; give {{"output": "..."}}, one line for each row of --data')
    return objects


def judge(answers, conversations, task, databases=None, is_regex=False):
    """One dict per row: the answer, question, gold answer, each score (None: cannot be scored), why it is wrong."""
    rows, broken = [], 0
    pairs = progress(zip(answers, conversations, strict=True), "scores", total=len(answers))
    for made, conversation in pairs:
        user, gold = (message["content"] for message in conversation.messages[-2:])
        output = made["output"]
        row = made | {"text": user, "gold": gold, "exact": score.exact(output, gold),
                      "prefix": score.starts_with_gold(output, gold), "contains": gold.strip() in output}
        if is_regex:
            row["same_language"] = regular.same_regex(output, gold)
        if "ending_letter" in made:
            row["ending"] = made["ending_letter"] == gold.strip()
        if task != "exact":
            try:
                row[task] = score.correct(task, output, gold, user, databases)
            except score.CannotScore as reason:
                row[task], broken = None, broken + 1
                if broken <= 20:
                    tqdm.write(f"{conversation.where}: cannot be scored, left out: {reason}", file=sys.stderr)
        row["wrong_because"] = why(output.strip(), gold.strip(), made.get("stopped")) if row[task] is False else None
        rows.append(row)
    if broken == len(rows):
        raise UserError(f"none of the {broken} rows can be scored as {task}; is it the right --task or --databases?")
    if broken > 20:
        print(f"and {broken - 20} more rows that cannot be scored", file=sys.stderr)
    return rows


def why(output, gold, stopped):
    """How a wrong output differs from the gold answer: one of REASONS. stopped: did the model end it? None: unknown."""
    if gold.startswith(output):
        return "cut off by the budget" if stopped is False else "stopped too early"
    return "ran on" if output.startswith(gold) else "other"


def rates(rows):
    """{metric: {"value", "low", "high", "n"}}: the share of rows that can be scored, 95 % Wilson interval."""
    shares = {}
    for name in RATES:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            low, high = statistics.wilson(sum(known), len(known))
            shares[name] = {"value": sum(known) / len(known), "low": low, "high": high, "n": len(known)}
    return shares


def metrics(result, task, **more):
    """What metrics.json holds."""
    rows = result.rows
    found = {"system": result.name, "task": task, "n": len(rows), **more, "rates": rates(rows),
             "unscorable": sum(row.get(task, True) is None for row in rows),
             "wrong": {reason: sum(row["wrong_because"] == reason for row in rows) for reason in REASONS}}
    if result.figures:
        found |= {"representation": result.figures, "verdict": result.verdict}
    if result.before:
        found["representation_before"] = result.before
    return found


# ---- what people read


def summary(result, task, data_name):
    """Lines that say what one wants to know about one system, on one screen."""
    found = metrics(result, task)
    lines = [f"{result.name} on {data_name}: {found['n']} rows, task {task}"]
    for name, share in found["rates"].items():
        interval = f"95 % interval [{share['low']:6.1%}, {share['high']:6.1%}]"
        lines.append(f"  {RATES[name]:32s} {share['value']:7.2%}   {interval}")
    if found["unscorable"]:
        lines.append(f"  {found['unscorable']} rows cannot be scored and are left out of the rate above")
    lines.append("  wrong: " + ", ".join(f"{n} {reason}" for reason, n in found["wrong"].items()))
    if result.figures:
        lines.append(f"{'Encodings':54s} {'before':>10s} {'after':>10s}" if result.before else "Encodings")
        for name, label in FIGURES.items():
            values = [figures[name] for figures in (result.before, result.figures) if figures]
            lines.append(f"  {label:52s} " + " ".join(f"{value:10.4f}" for value in values))
        lines.append(f"  {result.verdict}")
    return lines


def comparison(results, task, seed):
    """Rows of a table: every metric of every system, the differences to the first, why outputs are wrong, figures."""
    first, rest = results[0], results[1:]
    every = [rates(result.rows) for result in results]
    table = [["", *(result.name for result in results)], ["rows", *(str(len(result.rows)) for result in results)]]
    for name, label in RATES.items():
        cells = [f"{s[name]['value']:.2%} [{s[name]['low']:.1%}, {s[name]['high']:.1%}]" if name in s else "-"
                 for s in every]
        if any(cell != "-" for cell in cells):
            table.append([label, *cells])
    for metric in dict.fromkeys(("exact", task, "same_language", "ending") if rest else ()):
        if metric in every[0]:
            differences = [difference(result, first, metric, seed) for result in rest]
            table.append([f"{RATES[metric]}: difference to {first.name}", "", *(cells[0] for cells in differences)])
            table.append([f"{RATES[metric]}: McNemar's p", "", *(cells[1] for cells in differences)])
    for reason in REASONS:
        counts = [sum(row["wrong_because"] == reason for row in result.rows) for result in results]
        table.append([f"wrong: {reason}", *map(str, counts)])
    for name, label in FIGURES.items() if first.figures else ():
        table.append([label, *(f"{result.figures[name]:.4f}" for result in results)])
        if first.before:
            table.append([f"{label}: before", *(f"{result.before[name]:.4f}" for result in results)])
    return table


def difference(result, first, metric, seed):
    """(paired bootstrap of the difference in a metric, McNemar's p), as text, over the rows that both have."""
    theirs = {row["row"]: row.get(metric) for row in first.rows}
    pairs = [(row.get(metric), theirs.get(row["row"])) for row in result.rows]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return "-", "-"
    ours, others = zip(*pairs, strict=True)
    middle, low, high = statistics.paired_bootstrap(ours, others, seed)
    fewer = f", {len(pairs)} rows" if len(pairs) < max(len(result.rows), len(first.rows)) else ""
    return f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]{fewer}", f"{statistics.mcnemar(ours, others):.3g}"


def markdown(table):
    """The lines of a Markdown table, its columns padded so that it can be read as it stands."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
