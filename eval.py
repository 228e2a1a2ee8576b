"""Evaluate: let models answer, score the answers, and report what the encodings look like.

    python eval.py runs/A --data datasets/synth_test.jsonl                    # a run; results go into its folder
    python eval.py runs/A --data datasets/synth_test.jsonl --base MODEL       # encodings before training, too
    python eval.py MODEL --data FILE --out results                            # an untouched Hugging Face folder
    python eval.py runs/A runs/B --data FILE --report AB.md                   # compared, row by row
    python eval.py runs/A --data FILE --task spider --databases DIR           # SQL is executed
    python eval.py --predictions OUTPUTS.jsonl --data FILE --out metrics.json # other systems' outputs, no model

Each model gets metrics.json, predictions.jsonl (one object per row), tsne.png and spectrum.png, those of the latest
evaluation, and for each way of answering a file answers-*.jsonl, from which an interrupted evaluation goes on. The
model's part is in subject.py, figures about encodings in representation.py, rates and tables in results.py, what is
right in score.py and regular.py, pictures in plots.py.
"""

import math
import os
from pathlib import Path

import data
from evaluation import plots
from evaluation import report as results
from evaluation import tasks as score
from support import cli
from support.cli import UserError

# Room for an answer, in tokens, by task. Longer gold answers are told of before generation starts.
BUDGET = {"exact": 128, "gsm8k": 512, "spider": 256, "nq_open": 64, "hellaswag": 8, "label": 8}


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run folder of train.py, or any Hugging Face folder")
    add("--data", type=Path, required=True, help="JSONL of conversations to answer")
    add("--task", choices=sorted(score.TASKS),
        help="how answers are scored; default: from the data file's name. exact, on files named synth or turk, also "
        "compares regexes as languages; hellaswag takes the likeliest letter and the likeliest ending")
    add("--databases", type=Path, help="spider: folder of the databases, DIR/<db_id>/<db_id>.sqlite")
    add("--predictions", type=Path, metavar="FILE",
        help='score these outputs, one {"output": "..."} for each row of --data in order, instead of a RUN')
    add("--base", type=Path, metavar="FOLDER",
        help='report the encodings of this model beside those of RUN, as "before": the one that training began with')
    add("--limit", type=int, help="only the first so many rows of the file")
    add("--max_new_tokens", type=int, help=f"budget of an answer; default by task: {BUDGET}")
    add("--temperature", type=float, default=0.0, help="0: greedy; otherwise sample from softmax(logits / temperature)")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up this share")
    add("--seed", type=int, default=0, help="of sampling, of the shuffled pairs, of the bootstrap")
    add("--batch_size", type=int, default=128, help="prompts per batch; changes nothing but rounding")
    add("--too_long", choices=["refuse", "skip"], default="refuse", help="what to do with rows longer than the model")
    add("--tokenizer", help="synth, gpt2 or a Hugging Face folder; default: what the model was trained with")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add("--out", type=Path,
        help="folder for the results; default: the run's own. With --predictions a JSON file; default: only print")
    add("--report", type=Path, metavar="FILE.md",
        help="write the table with pictures; default with several RUNs and --out: OUT/comparison.md")
    args = p.parse_args()
    check(args)
    return args


def check(args):
    """Refuse settings that cannot work, and fill in those that depend on others."""
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UserError(f"--temperature {args.temperature}: must be finite and not negative")
    if not 0 < args.top_p <= 1 or args.top_p < 1 and args.temperature == 0:
        raise UserError(f"--top_p {args.top_p}: must be above 0 and at most 1, and needs a --temperature above 0")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    if bool(args.runs) == bool(args.predictions):
        raise UserError("give either one or more RUN folders, or --predictions FILE")
    if args.predictions and (args.base or args.report):
        raise UserError("--base and --report need a RUN: --predictions come without a model")
    args.guessed = args.task is None
    args.task = args.task or score.guess_task(args.data)
    if args.task == "spider" and not (args.databases and args.databases.is_dir()):
        raise UserError("--task spider executes queries: give --databases DIR, the folder of Spider's databases "
                        "(python datasets/download.py spider --databases fetches them)")
    args.max_new_tokens = args.max_new_tokens or BUDGET[args.task]
    args.is_regex = args.task == "exact" and args.data.name.lower().startswith(("synth", "turk"))
    for path in filter(None, (args.report, args.predictions and args.out)):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file to write")
    if args.out and len(args.runs) > 1 and not args.report:
        args.report = args.out / "comparison.md"


def score_outputs(args):
    """Score the outputs of another system."""
    conversations = data.read(args.data)[: args.limit]
    results.check_answered(conversations)
    answers, conversations = results.read_outputs(args.predictions, conversations)
    rows = results.judge(answers, conversations, args.task, args.databases, args.is_regex)
    result = results.Result(args.predictions.name, rows)
    print("\n".join(results.summary(result, args.task, args.data)))
    if args.out:
        cli.write_json(args.out, results.metrics(result, args.task, data=str(args.data)))


def names(paths):
    """A short name for each folder: the last part of its path, and of more parts if those are not different."""
    for depth in range(1, 20):
        found = ["-".join(path.resolve().parts[1:][-depth:]) for path in paths]
        if len(set(found)) == len(paths):
            return found
    raise UserError("a RUN is given twice; give different ones")


def report(found, folders, args, table):
    """Write the comparison as Markdown, with the spectra and loss curves of all runs overlaid."""
    title = f"{args.data.name}, n = {len(found[0][0].rows)}, task {args.task}"
    lines = [f"# {', '.join(result.name for result, _ in found)} on {title}", "", *table, ""]
    lines += [f"{result.name}: {result.verdict}\n" for result, _ in found]
    pictures = {"singular values": args.report.with_name(f"{args.report.stem}-spectrum.png")}
    spectra = {name: encodings for _, own in found for name, encodings in own.items()}
    plots.spectrum(spectra, title, pictures["singular values"])
    logs = {result.name: run for (result, _), run in zip(found, args.runs, strict=True) if (run / "log.jsonl").exists()}
    if logs:
        pictures["loss curves"] = args.report.with_name(f"{args.report.stem}-losses.png")
        plots.curves(logs, pictures["loss curves"])
    for (result, _), folder in zip(found, folders, strict=True):
        pictures[f"t-SNE, {result.name}"] = folder / "tsne.png"
    for name, path in pictures.items():
        lines.append(f"![{name}](<{Path(os.path.relpath(path, args.report.parent)).as_posix()}>)")
    cli.write(args.report, "\n".join(lines) + "\n")
    print(f"{args.report} is written")


def main():
    args = arguments()
    print(f"task: {args.task}" + " (guessed from the name of the data file)" * args.guessed)
    if args.predictions:
        return score_outputs(args)

    from evaluation import answers as subject
    from hf import runs  # from here on models are needed, which --predictions does without

    for path in filter(None, [*args.runs, args.base]):
        if not subject.is_run(path) and args.out is None and path != args.base:
            raise UserError(f"{path}: is a Hugging Face folder; say with --out where the results should go")
    device, _ = runs.hardware(args.device)
    found, folders = [], []
    for path, name in zip(args.runs, names(args.runs), strict=True):
        folders.append(args.out / name if args.out and len(args.runs) > 1 else args.out or path)
        found.append(subject.evaluate(path, name, folders[-1], args, device))
        print("\n" + "\n".join(results.summary(found[-1][0], args.task, args.data)))
        print(f"{folders[-1]}: metrics.json, predictions.jsonl, tsne.png and spectrum.png are written")
    table = results.markdown(results.comparison([result for result, _ in found], args.task, args.seed))
    if len(found) > 1:
        print("\n" + "\n".join(table))
    if args.report:
        report(found, folders, args, table)


if __name__ == "__main__":
    cli.run(main)
