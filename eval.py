"""Evaluate a run: generate answers, score them, and report what the encodings look like.

    python eval.py runs/lam2-k1-seed0 --data datasets/synth_test.jsonl

Writes into the run folder: predictions.jsonl (one object per row), metrics.json, tsne.png, spectrum.png. Prints a
summary of one screen. The scorers are in score.py, the figures about encodings in representation.py.
"""

import json
from pathlib import Path

from tqdm import tqdm

import cli
import data
import generate
import plots
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
    add("--databases", type=Path, help="spider: folder of the databases, DIR/<db_id>/<db_id>.sqlite")
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


def open_run(args, device):
    """(model, tokenizer, settings) of the run: its best checkpoint if it has one, else its last. Sets args.weights."""
    settings, _ = runs.read(args.run)
    folder = next((args.run / name for name in ("best", "checkpoint") if (args.run / name).exists()), None)
    if folder is None:
        raise UserError(f"{args.run}: holds no checkpoint yet; let train.py finish an epoch first")
    args.weights = f"{folder.name} {runs.sha256(folder / 'model.safetensors')[:16]}"
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


def summary(args, shares, figures):
    """Print what one wants to know, on one screen."""
    print(f"\n{args.run} on {args.data}: {figures['n']} rows, task {args.task}")
    names = {"exact": "exact match", "prefix": "starts with the gold answer", "contains": "contains the gold answer",
             "stopped": "ended by the stop token"}
    for name, share in shares.items():
        interval = f"[{share['low']:6.1%}, {share['high']:6.1%}]"
        print(f"  {names.get(name, name):28s} {share['value']:7.2%}   95 % interval {interval}")
    print("Encodings: [PRED] state of Text against Code")
    print(f"  cosine, pairs {figures['cosine_aligned']:.4f}, shuffled pairs {figures['cosine_shuffled']:.4f}")
    print(f"  retrieval@1, Text to Code {figures['retrieval_at_1_text_to_code']:.1%}, "
          f"Code to Text {figures['retrieval_at_1_code_to_text']:.1%}")
    ranks = (f"{name} {figures[f'effective_rank_{name}']:.1f}" for name in ("text", "pred", "code"))
    print(f"  effective rank, {', '.join(ranks)}")
    print(f"  residual of the best linear map Text to Code on held-out rows: {figures['linear_residual_relative']:.3f}")
    print(f"  {representation.verdict(figures)}")


def main():
    args = arguments()
    device, _ = runs.hardware(args.device)
    model, tokenizer, settings = open_run(args, device)
    limit = model.decoder.config.block_size
    conversations, examples = data.load(args.data, tokenizer, limit, settings.k, args.too_long)
    conversations, examples = conversations[: args.limit], examples[: args.limit]
    if len(examples) < 4:
        raise UserError(f"{args.data}: {len(examples)} rows are too few to compare encodings; give at least 4")

    unfinished = args.run / "predictions.partial.jsonl"
    answers = answer(model, tokenizer, examples, args, unfinished)
    users, golds = zip(*([m["content"] for m in c.messages[-2:]] for c in conversations), strict=True)
    rows, shares = rates(answers, golds, users, args)
    layout = {name: getattr(settings, name) for name in ("layout", "front_pred", "reverse")}
    if any(e.own_text for e in examples):
        layout["layout"] = "paper"  # a fused row would share the conversation's TEXT
    encodings = representation.encode(model, examples, args.batch_size, **layout)
    figures = representation.report(encodings)

    about = {"run": str(args.run), "data": str(args.data), "task": args.task, "n": len(rows), "weights": args.weights}
    lines = [made | {"text": user, "gold": gold} | row
             for made, user, gold, row in zip(answers, users, golds, rows, strict=True)]
    runs.write_text(args.run / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    runs.write_json(args.run / "metrics.json", about | {"rates": shares, "representation": figures})
    title = f"{args.run.name} on {args.data.name}, n = {len(rows)}, seed {settings.seed}"
    plots.tsne(encodings["pred"], encodings["code"], title, args.run / "tsne.png")
    plots.spectrum({args.run.name: encodings}, title, args.run / "spectrum.png")
    unfinished.unlink()
    summary(args, shares, figures)
    print(f"{args.run}: metrics.json, predictions.jsonl, tsne.png and spectrum.png are written")


if __name__ == "__main__":
    cli.run(main)
