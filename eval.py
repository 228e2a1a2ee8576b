"""Evaluate a run: generate answers, score them, and report what the encodings look like.

    python eval.py runs/lam2-k1-seed0 --data datasets/synth_test.jsonl

Writes into the run folder: predictions.jsonl (one object per row), metrics.json, tsne.png, spectrum.png. Prints a summary
of one screen. The scorers are in score.py, the figures about encodings in representation.py.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import data
import generate
import representation
import runs
import score
import tokenizer as tokenizers
from cli import UserError

# Room for an answer, in tokens. Answers that are longer are told of before generation starts.
BUDGET = {"exact": 128, "gsm8k": 512, "spider": 256, "nq_open": 64, "hellaswag": 8, "label": 8}


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("run", type=Path, help="run folder of train.py")
    add("--data", type=Path, required=True, help="JSONL of conversations to answer")
    add("--task", choices=sorted(score.TASKS), help="how answers are scored; default: from the data file's name")
    add("--limit", type=int, help="only the first so many rows")
    add("--max_new_tokens", type=int, help=f"budget of an answer; default by task: {BUDGET}")
    add("--batch_size", type=int, default=128, help="prompts per batch")
    add("--too_long", choices=["refuse", "skip"], default="refuse", help="what to do with rows longer than the model")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = p.parse_args()
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    args.task = args.task or score.guess_task(args.data)
    args.max_new_tokens = args.max_new_tokens or BUDGET[args.task]
    return args


def open_run(path, device):
    """(model, tokenizer, settings) of a run folder; the best checkpoint if there is one, else the last."""
    settings, _ = runs.read(path)
    folder = next((path / name for name in ("best", "checkpoint") if (path / name).exists()), None)
    if folder is None:
        raise UserError(f"{path}: holds no checkpoint yet; let train.py finish an epoch first")
    return runs.load_model(folder).to(device).eval(), tokenizers.load(settings.tokenizer), settings


def answer(model, tokenizer, examples, args, path):
    """Generate an answer for each example: a list of {"row", "output", "stopped"}.

    Answers are appended to `path` as they come. If it holds some already, made from the same weights and with the same
    settings, they are kept and only the others are generated: an interrupted evaluation goes on.
    """
    header = {"data": runs.sha256(args.data), "weights": args.weights, "max_new_tokens": args.max_new_tokens}
    done = read_answers(path, header)
    todo = [i for i in range(len(examples)) if i + 1 not in done]
    prompts = [examples[i].full[: examples[i].answer_start] for i in todo]
    with open(path, "a" if done else "w", encoding="utf-8") as file:
        if not done:
            file.write(json.dumps(header) + "\n")
        found = generate.in_batches(model.decoder, prompts, tokenizer.stop, args.max_new_tokens, args.batch_size)
        for i, made in tqdm(found, "answers", total=len(examples), initial=len(done), unit="row", leave=False):
            done[todo[i] + 1] = {"row": todo[i] + 1, "output": tokenizer.decode(made.ids), "stopped": made.stopped}
            file.write(json.dumps(done[todo[i] + 1]) + "\n")
            file.flush()
    return [done[i + 1] for i in range(len(examples))]


def read_answers(path, header):
    """{row: answer} of an evaluation that was interrupted, if it was made with the settings in `header`."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is half a line
    if not lines or json.loads(lines[0]) != header:
        return {}
    return {line["row"]: line for line in map(json.loads, lines[1:])}


def rates(answers, golds, users, args):
    """(one dict of booleans per row, {metric: {"value", "low", "high"}}): each share with its 95 % Wilson interval."""
    rows = []
    for made, gold, user in zip(answers, golds, users, strict=True):
        output = made["output"]
        row = {"exact": score.exact(output, gold), "prefix": score.starts_with_gold(output, gold),
               "contains": gold.strip() in output, "stopped": made["stopped"]}
        if args.task != "exact":
            row[args.task] = score.correct(args.task, output, gold, user, args.databases)
        rows.append(row)
    shares = {}
    for name in rows[0]:
        hits = sum(row[name] for row in rows)
        low, high = score.wilson(hits, len(rows))
        shares[name] = {"value": hits / len(rows), "low": low, "high": high}
    return rows, shares


def main():
    args = arguments()
    device, _ = runs.hardware(args.device)
    model, tokenizer, settings = open_run(args.run, device)
    limit = model.decoder.config.block_size
    conversations, examples = data.load(args.data, tokenizer, limit, settings.k, args.too_long)
    conversations, examples = conversations[: args.limit], examples[: args.limit]

    answers = answer(model, tokenizer, examples, args, args.run / "predictions.partial.jsonl")
    golds = [conversation.messages[-1]["content"] for conversation in conversations]
    users = [conversation.messages[-2]["content"] for conversation in conversations]
    rows, shares = rates(answers, golds, users, args)
    encodings = representation.encode(model, examples, args.batch_size)
    figures = representation.report(encodings)
    ...
