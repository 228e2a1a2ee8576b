"""Evaluate runs: generate answers, score them, and report what the encodings look like.

    python eval.py runs/A --data datasets/synth_test.jsonl                      # one run; results go into its folder
    python eval.py runs/A runs/B --data datasets/synth_test.jsonl --report AB.md     # compared, row by row
    python eval.py MODEL_FOLDER --data FILE --out results                       # an untouched Hugging Face model
    python eval.py --predictions OUTPUTS.jsonl --data FILE --out metrics.json   # another system's outputs, no model

Writes predictions.jsonl (one object per row), metrics.json, tsne.png and spectrum.png, and prints a summary of one
screen. Scorers are in score.py and regular.py, figures about encodings in representation.py, pictures in plots.py.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import cli
import data
import generate
import plots
import regular
import representation
import runs
import score
import tokenizer as tokenizers
import weights
from cli import UserError

# Room for an answer, in tokens, by task. Longer gold answers are told of before generation starts.
BUDGET = {"exact": 128, "gsm8k": 512, "spider": 256, "nq_open": 64, "hellaswag": 8, "label": 8}
NAMES = {"exact": "exact match", "prefix": "starts with the gold answer", "contains": "contains the gold answer",
         "stopped": "ended by the stop token", "same_language": "same language as the gold regex",
         "spider": "same result when executed", "gsm8k": "right number after ####", "nq_open": "names a gold answer",
         "label": "right label", "hellaswag": "most likely letter", "ending": "most likely ending, per token"}


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run folder of train.py, or any Hugging Face folder")
    add("--data", type=Path, required=True, help="JSONL of conversations to answer")
    add("--task", choices=sorted(score.TASKS), help="how answers are scored; default: from the data file's name")
    add("--databases", type=Path, help="spider: folder of the databases, DIR/<db_id>/<db_id>.sqlite")
    add("--predictions", type=Path, help='score these outputs, {"output": ...} a row of --data, instead of a RUN')
    add("--limit", type=int, help="only the first so many rows")
    add("--max_new_tokens", type=int, help=f"budget of an answer; default by task: {BUDGET}")
    add("--temperature", type=float, default=0.0, help="0: greedy; otherwise sample from softmax(logits / temperature)")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up this share")
    add("--seed", type=int, default=0, help="of sampling, of the shuffled pairs, of the bootstrap")
    add("--batch_size", type=int, default=128, help="prompts per batch; changes no result")
    add("--too_long", choices=["refuse", "skip"], default="refuse", help="what to do with rows longer than the model")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add("--out", type=Path, help="folder for the results (default: each run's own); with --predictions, a JSON file")
    add("--report", type=Path, metavar="FILE.md", help="write the comparison, with pictures beside it")
    args = p.parse_args()
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be finite and not negative, --top_p above 0 and at most 1")
    if bool(args.runs) == bool(args.predictions):
        raise UserError("give either one or more RUN folders, or --predictions FILE")
    args.task = args.task or score.guess_task(args.data)
    if args.task == "spider" and not (args.databases and args.databases.is_dir()):
        raise UserError("--task spider executes queries: give --databases DIR, the folder of Spider's databases "
                        "(python datasets/download.py spider --databases fetches them)")
    args.max_new_tokens = args.max_new_tokens or BUDGET[args.task]
    return args


# ---- answers


@dataclass
class Subject:
    """One model under evaluation and what was found about it."""

    name: str
    folder: Path  # where results go
    model: object
    tokenizer: tokenizers.Tokenizer
    layout: dict  # how training laid out the views
    seed: int | None  # of training
    weights: str  # which checkpoint, and the start of its sha256
    rows: list = field(default_factory=list)
    shares: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)
    encodings: dict = field(default_factory=dict)


def open_subject(path, args, device):
    """A run (its best checkpoint if it has one, else its last), or a Hugging Face folder without [PRED] vectors."""
    if (path / "config.json").exists() and "model_type" in weights.read_json(path / "config.json"):
        if args.out is None:
            raise UserError(f"{path}: is a Hugging Face folder; say with --out where the results should go")
        folder, name, layout, seed = path, str(path), {}, None
    else:
        settings, _ = runs.read(path)
        folder = next((path / part for part in ("best", "checkpoint") if (path / part).exists()), None)
        if folder is None:
            raise UserError(f"{path}: holds no checkpoint yet; let train.py finish an epoch first")
        name, seed = settings.tokenizer, settings.seed
        layout = {key: getattr(settings, key) for key in ("layout", "front_pred", "reverse")}
    out = args.out / path.name if args.out and len(args.runs) > 1 else args.out or path
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    stamp = " ".join(f"{file.name} {runs.sha256(file)[:16]}" for file in files)
    model = runs.load_model(folder).to(device).eval()
    return Subject(path.name, out, model, tokenizers.load(name), layout, seed, stamp)


def answer(subject, conversations, examples, args):
    """An answer to each example: a list of {"row", "output", "stopped"}.

    Answers are written down as they come. What an interrupted evaluation left, from the same weights and with the same
    settings, is kept, and only the rest is generated.
    """
    path = subject.folder / "predictions.partial.jsonl"
    header = {"data": runs.sha256(args.data), "weights": subject.weights, "task": args.task,
              "max_new_tokens": args.max_new_tokens, "sampling": [args.temperature, args.top_p, args.seed]}
    done = read_answers(path, header)
    todo = [i for i in range(len(examples)) if i + 1 not in done]
    find = likeliest if args.task == "hellaswag" else written
    with open(path, "a" if done else "w", encoding="utf-8") as file:
        if not done:
            file.write(json.dumps(header) + "\n")
        found = find(subject, conversations, examples, todo, args)
        for i, made in tqdm(found, "answers", total=len(examples), initial=len(done), unit="row", leave=False,
                            mininterval=0.2 if sys.stderr.isatty() else 30):
            done[i + 1] = {"row": i + 1, **made}
            file.write(json.dumps(done[i + 1]) + "\n")
            file.flush()
    return [done[i + 1] for i in range(len(examples))]


def written(subject, conversations, examples, todo, args):
    """Yield (index, {"output", "stopped"}): what the model writes after each prompt."""
    choose = generate.most_likely
    if args.temperature:
        choose = generate.sampler(args.temperature, args.top_p, args.seed, names=todo)
    prompts = [examples[i].full[: examples[i].answer_start] for i in todo]
    stop, decode = subject.tokenizer.stop, subject.tokenizer.decode
    for at, made in generate.in_batches(subject.model.decoder, prompts, stop, args.max_new_tokens, args.batch_size,
                                        choose):
        yield todo[at], {"output": decode(made.ids), "stopped": made.stopped}


def likeliest(subject, conversations, examples, todo, args):
    """Yield (index, {"output", "stopped", "ending"}) for a multiple choice "...\\nA) ...\\nB) ...": the letter that is
    most likely as the answer and, with the context alone as the question, the ending most likely per token."""
    encode, decoder = subject.tokenizer.encode, subject.model.decoder
    for i in todo:
        user = conversations[i].messages[-2]["content"]
        context, *choices = re.split(r"\n(?=[A-D]\) )", user)
        letters, endings = [choice[0] for choice in choices] or list("ABCD"), [encode(choice[3:]) for choice in choices]
        prompt = examples[i].full[: examples[i].answer_start]
        scores = generate.log_likelihoods(decoder, prompt, [encode(letter) for letter in letters])
        made = {"output": letters[scores.index(max(scores))], "stopped": True}
        if len(choices) > 1 and all(endings):
            asked = [*conversations[i].messages[:-2], {"role": "user", "content": context},
                     conversations[i].messages[-1]]
            e = data.example(data.Conversation(asked, conversations[i].where), subject.tokenizer)
            scores = generate.log_likelihoods(decoder, e.full[: e.answer_start], endings)
            scores = [value / len(ending) for value, ending in zip(scores, endings, strict=True)]
            made["ending"] = letters[scores.index(max(scores))]
        yield i, made


def read_answers(path, header):
    """{row: answer} of an evaluation that was interrupted, if it was made with the settings in `header`."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is half a line
    if not lines or json.loads(lines[0]) != header:
        return {}
    return {line["row"]: line for line in map(json.loads, lines[1:])}


# ---- scores


def judge(answers, conversations, args):
    """Per row: the answer, the question, the gold answer, each score (None: cannot be judged), why it is wrong."""
    rows = []
    is_regex = args.task == "exact" and args.data.name.startswith(("synth", "turk"))
    for made, conversation in zip(answers, conversations, strict=True):
        user, gold = (message["content"] for message in conversation.messages[-2:])
        output = made["output"]
        row = made | {"text": user, "gold": gold, "exact": score.exact(output, gold),
                      "prefix": score.starts_with_gold(output, gold), "contains": gold.strip() in output}
        if is_regex:
            row["same_language"] = regular.same_regex(output, gold)
        if "ending" in made:
            row["ending"] = made["ending"] == gold.strip()
        if args.task != "exact":
            try:
                row[args.task] = score.correct(args.task, output, gold, user, args.databases)
            except score.CannotScore as reason:
                row[args.task] = None
                print(f"{conversation.where}: cannot be scored, left out: {reason}", file=sys.stderr)
        row["wrong_because"] = why(output.strip(), gold.strip())
        rows.append(row)
    return rows


def why(output, gold):
    """None if equal, else how the output differs from the gold answer."""
    if output == gold:
        return None
    return "stopped too early" if gold.startswith(output) else "ran on" if output.startswith(gold) else "other"


def rates(rows):
    """{metric: {"value", "low", "high", "n"}}: the share of rows, with its 95 % Wilson interval."""
    shares = {}
    for name in NAMES:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            low, high = score.wilson(sum(known), len(known))
            shares[name] = {"value": sum(known) / len(known), "low": low, "high": high, "n": len(known)}
    return shares


def metrics(args, name, rows, shares, **more):
    """What metrics.json holds."""
    wrong = [row["wrong_because"] for row in rows if row["wrong_because"]]
    unscorable = sum(row.get(args.task, True) is None for row in rows)
    return {"system": name, "data": str(args.data), "task": args.task, "n": len(rows), "rates": shares,
            "unscorable": unscorable, "wrong": {reason: wrong.count(reason) for reason in sorted(set(wrong))}, **more}


def given_answers(path, n):
    """The outputs of another system: one {"output": ...} for each of n rows."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{path}: cannot be read ({failure})") from None
    answers = []
    for number, line in enumerate(lines, 1):
        try:
            made = json.loads(line)
        except ValueError:
            made = None
        if not isinstance(made, dict) or not isinstance(made.get("output"), str):
            raise UserError(f'{path}:{number}: must be {{"output": "..."}}, one line for each row of --data')
        answers.append({"row": number, "output": made["output"]})
    if len(answers) != n:
        raise UserError(f"{path}: has {len(answers)} outputs for {n} rows of --data; give one for each, in order")
    return answers


# ---- what people see


def table(subjects, args):
    """Lines of a Markdown table: every metric of every system, differences to the first one, why outputs are wrong."""
    first, rest = subjects[0], subjects[1:]
    lines = ["| | " + " | ".join(s.name for s in subjects) + " |", "|---" * (len(subjects) + 1) + "|"]
    for name in first.shares:
        cells = (s.shares[name] for s in subjects)
        lines.append(f"| {NAMES[name]} | " + " | ".join(
            f"{c['value']:.2%} [{c['low']:.1%}, {c['high']:.1%}]" for c in cells) + " |")
    for metric in [name for name in ("exact", args.task, "same_language") if name in first.shares and rest]:
        pairs = [[(a[metric], b[metric]) for a, b in zip(s.rows, first.rows, strict=True)
                  if None not in (a[metric], b[metric])] for s in rest]
        cells, tests = ["-"], ["-"]
        for pair in pairs:
            ours, theirs = zip(*pair, strict=True)
            middle, low, high = score.paired_bootstrap(ours, theirs, args.seed)
            cells.append(f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]")
            tests.append(f"{score.mcnemar(ours, theirs):.3g}")
        lines.append(f"| {NAMES[metric]}: difference to the first, paired bootstrap | " + " | ".join(cells) + " |")
        lines.append(f"| {NAMES[metric]}: McNemar's p | " + " | ".join(tests) + " |")
    for reason in ("stopped too early", "ran on", "other"):
        counts = [sum(row["wrong_because"] == reason for row in s.rows) for s in subjects]
        lines.append(f"| not exact: {reason} | " + " | ".join(map(str, counts)) + " |")
    shown = {"cosine_aligned": "cosine of pairs", "cosine_shuffled": "cosine of shuffled pairs",
             "retrieval_at_1_text_to_code": "retrieval@1, Text to Code", "effective_rank_code": "effective rank, Code",
             "linear_residual_relative": "residual of the best linear map, held-out rows"}
    for name, label in shown.items():
        if first.figures:
            lines.append(f"| {label} | " + " | ".join(f"{s.figures[name]:.4g}" for s in subjects) + " |")
    return lines


def summary(subject, args):
    """Print what one wants to know about one system, on one screen."""
    print(f"\n{subject.name} on {args.data}: {len(subject.rows)} rows, task {args.task}")
    for name, share in subject.shares.items():
        interval = f"95 % interval [{share['low']:6.1%}, {share['high']:6.1%}]"
        print(f"  {NAMES[name]:32s} {share['value']:7.2%}   {interval}")
    wrong = metrics(args, subject.name, subject.rows, {})["wrong"]
    print("  not exact: " + (", ".join(f"{n} {reason}" for reason, n in wrong.items()) or "none"))
    f = subject.figures
    if f:
        print("Encodings: state of the last [PRED] (k = 0: of Text) against Code")
        print(f"  cosine, pairs {f['cosine_aligned']:.4f}, shuffled pairs {f['cosine_shuffled']:.4f}")
        print(f"  retrieval@1, Text to Code {f['retrieval_at_1_text_to_code']:.1%}, "
              f"Code to Text {f['retrieval_at_1_code_to_text']:.1%}")
        ranks = (f"{name} {f[f'effective_rank_{name}']:.1f}" for name in ("text", "pred", "code"))
        print(f"  effective rank, {', '.join(ranks)}")
        print(f"  residual of the best linear map Text to Code on held-out rows {f['linear_residual_relative']:.3f}; "
              f"absolute, as in the paper, {f['linear_residual_absolute']:.3g}")
        print(f"  {representation.verdict(f)}")


def report(subjects, args):
    """Write the comparison as Markdown, with the loss curves and spectra of all runs overlaid."""
    title = f"{args.data.name}, n = {len(subjects[0].rows)}, task {args.task}"
    lines = [f"# {' against '.join(s.name for s in subjects)}", "", title, "", *table(subjects, args), ""]
    lines += [f"{s.name}: {representation.verdict(s.figures)}" + "\n" for s in subjects]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    spectrum, losses = (args.report.with_name(f"{args.report.stem}-{kind}.png") for kind in ("spectrum", "losses"))
    plots.spectrum({s.name: s.encodings for s in subjects}, title, spectrum)
    lines.append(f"![singular values]({spectrum.name})")
    logged = [path for path in args.runs if (path / "log.jsonl").exists()]
    if logged:
        plots.losses(logged, losses)
        lines.append(f"![loss curves]({losses.name})")
    runs.write_text(args.report, "\n".join(lines) + "\n")


def evaluate(subject, args):
    """Everything about one system: answers, scores, encodings; written into its folder."""
    limit, k = subject.model.decoder.config.block_size, len(subject.model.pred)
    conversations, examples = data.load(args.data, subject.tokenizer, limit, k, args.too_long)
    conversations, examples = conversations[: args.limit], examples[: args.limit]
    if len(examples) < 4:
        raise UserError(f"{args.data}: {len(examples)} rows are too few to compare encodings; give at least 4")
    longest = max(len(e.full) - e.answer_start for e in examples)
    if longest > args.max_new_tokens and args.task != "hellaswag":
        print(f"warning: gold answers have up to {longest} tokens, more than --max_new_tokens {args.max_new_tokens}",
              file=sys.stderr)
    try:
        subject.folder.mkdir(parents=True, exist_ok=True)
        answers = answer(subject, conversations, examples, args)
    except OSError as failure:
        raise UserError(f"{subject.folder}: {failure.strerror}; choose a folder for the results with --out") from None
    subject.rows = judge(answers, conversations, args)
    subject.shares = rates(subject.rows)
    layout = dict(subject.layout)
    if any(e.own_text for e in examples):
        layout["layout"] = "paper"  # a fused row would share the conversation's TEXT
    subject.encodings = representation.encode(subject.model, examples, args.batch_size, **layout)
    subject.figures = representation.report(subject.encodings, args.seed)

    runs.write_text(subject.folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in subject.rows))
    found = metrics(args, subject.name, subject.rows, subject.shares, weights=subject.weights,
                    representation=subject.figures, verdict=representation.verdict(subject.figures))
    runs.write_json(subject.folder / "metrics.json", found)
    seed = "" if subject.seed is None else f", seed {subject.seed}"
    title = f"{subject.name} on {args.data.name}, n = {len(examples)}{seed}"
    plots.tsne(subject.encodings["pred"], subject.encodings["code"], title, subject.folder / "tsne.png")
    plots.spectrum({subject.name: subject.encodings}, title, subject.folder / "spectrum.png")
    (subject.folder / "predictions.partial.jsonl").unlink()


def main():
    args = arguments()
    print(f"task: {args.task}")
    if args.predictions:
        conversations = data.read(args.data)[: args.limit]
        rows = judge(given_answers(args.predictions, len(conversations)), conversations, args)
        system = Subject(args.predictions.name, None, None, None, {}, None, "", rows, rates(rows))
        summary(system, args)
        if args.out:
            runs.write_json(args.out, metrics(args, system.name, rows, system.shares))
        return
    device, _ = runs.hardware(args.device)
    subjects = []
    for path in args.runs:
        subjects.append(open_subject(path, args, device))
        evaluate(subjects[-1], args)
        subjects[-1].model = None  # the next one needs the memory
        summary(subjects[-1], args)
        print(f"{subjects[-1].folder}: metrics.json, predictions.jsonl, tsne.png and spectrum.png are written")
    if len(subjects) > 1:
        print("\n" + "\n".join(table(subjects, args)))
    if args.report:
        report(subjects, args)
        print(f"{args.report} is written")


if __name__ == "__main__":
    cli.run(main)
