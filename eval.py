"""Evaluate a model: let it answer, see whether the answers are right, and what its encodings look like.

    python eval.py runs/A --data datasets/synth_test.jsonl                    # a run; results go into its folder
    python eval.py runs/A --ask "lines with a vowel"                          # one answer; --ask alone opens a prompt
    python eval.py runs/A --data datasets/synth_test.jsonl --base MODEL       # encodings before training, too
    python eval.py MODEL --data FILE --out results                            # an untouched Hugging Face folder
    python eval.py runs/A runs/B --data FILE --report AB.md                   # compared, row by row
    python eval.py runs/A --data FILE --task spider --databases DIR           # SQL is executed
    python eval.py --predictions OUTPUTS.jsonl --data FILE --out metrics.json # other systems' outputs, no model

Each model gets metrics.json, predictions.jsonl (one object per row), tsne.png and spectrum.png, those of the latest
evaluation. Answers are kept in answers-*.jsonl, a file for each way of asking; an interrupted evaluation goes on there.
In this file: the flags, then one model from its folder to the verdict. Read next: `evaluation/README.md`.
"""

import sys
from functools import partial
from pathlib import Path

import data
from evaluation import answers, ask, encodings, generate, report, tasks
from support import cli
from support.cli import UserError
from support.processes import hardware

# Room for an answer, in tokens, by task. Longer gold answers are reported before generation starts.
BUDGET = {"exact": 128, "gsm8k": 512, "spider": 256, "nq_open": 64, "hellaswag": 8, "label": 8}

FLAGS = cli.parser(__doc__)

add = FLAGS.add_argument_group("data").add_argument
add("runs", type=Path, nargs="*", metavar="RUN", help="run folder of train.py, or any Hugging Face folder")
add("--data", type=Path, help="JSONL of conversations to answer")
add("--task", choices=sorted(tasks.TASKS),
    help="how answers are scored; default: from the data file's name. exact, on files named synth or turk, also "
    "compares regexes as languages; hellaswag takes the likeliest letter and the likeliest ending")
add("--databases", type=Path, help="spider: folder of the databases, DIR/<db_id>/<db_id>.sqlite")
add("--limit", type=cli.whole(1), help="only this many rows of the file, from the first")
add("--too_long", choices=["refuse", "skip"], default="refuse",
    help="rows that do not fit into the model's context are refused, or skipped and reported")
add("--tokenizer", help="synth, gpt2 or a Hugging Face folder or repo id; default: what the model was trained with")

add = FLAGS.add_argument_group("answers").add_argument
add("--ask", nargs="?", const="", metavar="QUESTION",
    help="print the answer to one question, or to each that you type, and write no files. The system turn is that "
    "of the first row of --data, or else of the data that the run was trained on. With --data the Codes of that file "
    f"nearest to the question are shown as well, the best {ask.SHOWN}, if the encodings can tell which are near")
add("--max_new_tokens", type=cli.whole(1),
    help="budget of an answer, in tokens; default by task: " + ", ".join(f"{task} {n}" for task, n in BUDGET.items())
    + "; the largest for --ask without --data")
add("--temperature", type=cli.number(), default=0.0,
    help="0: greedy; otherwise sample from softmax(logits / temperature)")
add("--top_p", type=cli.number(0, 1, above=True), default=1.0,
    help="sample from the likeliest tokens that make up this share")
add("--seed", type=cli.whole(0), default=0, help="of sampling, of the shuffled pairs, of the bootstrap")

add = FLAGS.add_argument_group("hardware").add_argument
add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
    help="of generation, where auto is bfloat16 on GPUs that have it; encodings are always made in float32")
add("--batch_size", type=cli.whole(1), default=128, help="prompts per batch; changes nothing but rounding")

add = FLAGS.add_argument_group("results").add_argument
add("--base", type=Path, metavar="FOLDER",
    help='report the encodings of this model beside those of RUN, as "before": the one that training began with')
add("--predictions", type=Path, metavar="FILE",
    help='score these outputs, one {"output": "..."} for each row of --data in order, instead of a RUN')
add("--out", type=Path,
    help="folder for the results; default: the run's own. With --predictions a JSON file; default: only print")
add("--report", type=Path, metavar="FILE.md",
    help="write the table with pictures; default with several RUNs and --out: OUT/comparison.md")


def check(args):
    """Fill in settings that depend on others, and refuse those that cannot work together. Returns args."""
    if args.top_p < 1 and args.temperature == 0:
        raise UserError(f"--top_p {args.top_p}: needs a --temperature above 0")
    if bool(args.runs) == bool(args.predictions):
        raise UserError("give either one or more RUN folders, or --predictions FILE")
    if args.predictions and (args.base or args.report):
        raise UserError("--base and --report need a RUN: --predictions come without a model")
    if args.ask is not None and (len(args.runs) != 1 or args.base or args.report or args.out):
        raise UserError("--ask wants one RUN, and writes no files: leave out --base, --report, --out and --predictions")
    if args.ask is None and args.data is None:
        raise UserError("--data is missing: a JSONL file of conversations to answer (or --ask a question)")
    args.guessed = args.task is None
    args.task = args.task or tasks.guess_task(args.data or "")
    if args.ask is not None and args.task == "hellaswag":
        args.task = "exact"  # a question that is asked is answered in words, not by the likeliest of the letters
    if args.temperature and (args.task == "hellaswag" or args.predictions):
        raise UserError("--temperature: nothing is sampled here; leave it out")
    if args.ask is None and args.task == "spider" and not (args.databases and args.databases.is_dir()):
        raise UserError(f"--task spider{' (guessed from the name of --data)' * args.guessed} executes queries: give "
                        "--databases DIR (python datasets/download.py spider --databases fetches them)")
    args.max_new_tokens = args.max_new_tokens or (BUDGET[args.task] if args.data else max(BUDGET.values()))
    args.is_regex = args.task == "exact" and tasks.begins(args.data or "", "synth|turk")
    if args.out and len(args.runs) > 1 and not args.report:
        args.report = args.out / "comparison.md"
    return args


# ---- one model


def evaluate(path, name, folder, conversations, args, **about):
    """What is found about the model at `path`: a `report.Evaluated`. Files go to `folder`. about: what was asked."""
    from hf import runs  # whoever scores other systems' outputs needs no models

    # Open it, and the model before training, which may be refused.
    device, autocast = hardware(args.device, args.dtype)
    opened = runs.open_model(path, device, args.tokenizer)
    conversations, examples = fitting(opened, conversations, args)
    before = args.base and encoded_before(
        runs.open_model(args.base, device, args.tokenizer), opened, conversations, args)

    # Let it answer, as far as it has not in an earlier, interrupted evaluation.
    about |= {"weights": opened.stamp, "device": device.type, "dtype": args.dtype, "task": args.task,
              "max_new_tokens": args.max_new_tokens}
    if args.temperature:
        about |= {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    make = answers.likeliest if args.task == "hellaswag" else written
    with autocast():
        found = answers.kept(folder, about, conversations, examples, partial(make, opened, args))

    # Are the answers right?
    system = report.Evaluated(name, scored(found, conversations, args))

    # Do the encodings tell which Code belongs to which Text? Or collapse: mean cosine above 0.99, or rank below 2?
    reverse, codes = opened.layout.get("reverse", False), [tuple(e.code) for e in examples]
    states = encodings.encode(opened.model, examples, args.batch_size, **opened.layout)
    sides = encodings.sides(states, reverse)
    system.figures = encodings.measure(states, reverse, args.seed, codes)
    system.verdict = encodings.verdict(system.figures, reverse)
    title = name if opened.seed is None else f"{name}, seed {opened.seed}"
    system.spectra[title] = states
    if before:
        states, reverse = before
        system.spectra[f"{args.base.name} (before)"] = states
        system.before = encodings.measure(states, reverse, args.seed, codes)
    title += f" on {args.data.name}, n = {len(examples)}"
    report.write_model(system, sides, folder, title, data=str(args.data), tokenizer=opened.tokenizer.name, **about)
    return system


def fitting(opened, conversations, args):
    """(conversations, examples) of the rows that the model has room for. Warns of gold answers beyond the budget."""
    room, k = opened.model.decoder.config.block_size, len(opened.model.pred)
    conversations, examples = data.examples_of(conversations, opened.tokenizer, room, k, args.too_long)
    if len(examples) < 4:
        raise UserError(f"{args.data}: {len(examples)} rows are too few to compare encodings; at least 4 (see --limit)")
    lengths = [sum(e.trained) - 1 for e in examples]  # of the answers; 1: the stop token
    over = sum(length > args.max_new_tokens for length in lengths)
    if over and args.task != "hellaswag":
        print(f"warning: {over} gold answers are longer than --max_new_tokens {args.max_new_tokens} (the longest has "
              f"{max(lengths)} tokens): the model cannot write them", file=sys.stderr)
    return conversations, examples


def written(opened, args, conversations, examples):
    """Yield (index, {"output", "stopped"}): what the model writes after each prompt."""
    prompts = [e.full[: e.answer_start] for e in examples]
    choose = generate.most_likely
    if args.temperature:
        rows = [answers.row_number(conversation) for conversation in conversations]
        choose = generate.sampler(args.temperature, args.top_p, args.seed, rows)
    stops, decoder = opened.stops, opened.model.decoder
    for i, answer in generate.in_batches(decoder, prompts, stops, args.max_new_tokens, args.batch_size, choose):
        yield i, {"output": opened.tokenizer.decode(answer.ids), "stopped": answer.stopped}


def scored(found, conversations, args):
    """The answers as rows: with question, gold answer, and whether they are right."""
    rows, broken = [], []
    for answer, conversation in answers.progress(list(zip(found, conversations, strict=True)), "scores"):
        question, gold = (message["content"] for message in conversation.messages[-2:])
        # exact match is equal text, white space at both ends aside, and never that of an empty output
        row = answer | {"text": question, "gold": gold, "exact": tasks.exact(answer["output"], gold)}
        row |= tasks.judge(row, args.task, args.databases, args.is_regex)  # everything but exact match
        rows.append(row)
        if "cannot_score" in row:
            broken.append(f"{conversation.where}: cannot be scored, left out: {row['cannot_score']}")
    if len(broken) == len(rows):
        raise UserError(f"{broken[0]}; nor can any other row: is it the right --task, or --databases?")
    more = [f"and {len(broken) - 20} more rows that cannot be scored"] if len(broken) > 20 else []
    print("\n".join(broken[:20] + more), end="\n" * bool(broken), file=sys.stderr)
    return rows


def encoded_before(base, opened, conversations, args):
    """(encodings, reverse) of the model that training began with; without [PRED] laid out like the trained one."""
    layout = base.layout if len(base.model.pred) else opened.layout | {"front_pred": False, "reverse": False}
    try:
        _, examples = data.examples_of(conversations, base.tokenizer, base.model.decoder.config.block_size,
                                       len(base.model.pred), too_long=None)
    except UserError as mistake:
        raise UserError(f"--base {args.base}: {mistake}") from None
    return encodings.encode(base.model, examples, args.batch_size, **layout), layout.get("reverse", False)


def converse(args):
    """Answer the question of --ask, or those that are typed."""
    from hf import runs

    device, autocast = hardware(args.device, args.dtype)
    opened = runs.open_model(args.runs[0], device, args.tokenizer)
    if args.data:
        conversations = answers.questions(args.data, args.limit)[0]
        like, codes = conversations[0].messages, ask.Codes(opened, conversations, args)
    else:
        like, codes = ask.trained_on(opened), None
    for question in ask.questions(args.ask):
        try:
            conversation, example = ask.prepared(question, like, opened)
            with autocast():
                _, answer = next(written(opened, args, [conversation], [example]))
            print("\n".join([answer["output"], *(codes.nearest(example) if codes else [])]), flush=True)
            if not answer["stopped"]:
                room = opened.model.decoder.config.block_size + 1 - example.answer_start
                print(f"(cut off: no stop token within {min(room, args.max_new_tokens)} tokens)", file=sys.stderr)
        except UserError as mistake:
            if args.ask:
                raise
            print(f"error: {mistake}", file=sys.stderr)


def main():
    args = check(FLAGS.parse_args())
    if args.ask is not None:
        return converse(args)
    names = report.short_names(args.runs)
    folders = [args.out / name if args.out and len(names) > 1 else args.out or path
               for path, name in zip(args.runs, names, strict=True)]
    report.check_places(args, folders)
    conversations, digest = answers.questions(args.data, args.limit)
    print(f"task: {args.task}" + " (guessed from the name of the data file)" * args.guessed)
    if args.predictions:
        found, conversations = answers.given(args.predictions, conversations)
        system = report.Evaluated(args.predictions.name, scored(found, conversations, args))
        report.show([system], args)
        if args.out:
            cli.write_json(args.out, report.metrics(system, args.task, data=str(args.data)))
        return
    from hf import runs

    for path in filter(None, [*args.runs, args.base]):
        if not runs.is_run(path) and args.out is None and path in args.runs:
            raise UserError(f"{path}: is a Hugging Face folder; say with --out where the results should go")
    systems = []
    for path, name, folder in zip(args.runs, names, folders, strict=True):
        systems.append(evaluate(path, name, folder, conversations, args, asked=digest))
        report.show(systems[-1:], args)
        print(f"{folder}: metrics.json, predictions.jsonl, tsne.png and spectrum.png are written")
    if len(systems) > 1:
        report.show(systems, args)
    if args.report:
        report.write_comparison(systems, folders, args)


if __name__ == "__main__":
    cli.run(main)
