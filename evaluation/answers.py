"""One model under evaluation: open it, let it answer, look at its encodings. In: a folder. Out: a `results.Result`.

`evaluate` is what eval.py calls for each RUN; the rest stands in the order in which it is used. Answers are written as
they come, behind a header that says how they were made, to a file named after that header. A later call with the same
header takes them from there: an interrupted evaluation goes on, a finished one is not generated again.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass

import data
import hf
from evaluation import encodings as representation
from evaluation import generate, plots
from evaluation import report as results
from hf import runs
from jepa import LLMJEPA
from support import cli
from support.cli import UserError


@dataclass
class Subject:
    model: LLMJEPA
    tokenizer: data.Tokenizer
    layout: dict  # how training laid out the views; empty for a model that has no [PRED]
    seed: int | None  # of training
    stamp: str  # which weights: files and the start of their sha256


def evaluate(path, name, out, args, device):
    """(`results.Result`, {name: encodings}) of the model in the folder `path`; files and pictures go to `out`.

    The encodings are those of the model and, with --base, of the one before training.
    """
    subject = open_folder(path, device, args.tokenizer)
    conversations, examples = load(subject, args)
    found = answers(subject, conversations, examples, args, out)
    result = results.Result(name, results.judge(found, conversations, args.task, args.databases, args.is_regex))
    codes, reverse = len({tuple(e.code) for e in examples}), subject.layout.get("reverse", False)
    encodings = encode(subject, examples, args.batch_size, subject.layout)
    result.figures = representation.report(encodings, args.seed, codes, reverse)
    result.verdict = representation.verdict(result.figures)
    seed = "" if subject.seed is None else f", seed {subject.seed}"
    spectra = {f"{name}{seed}": encodings}
    if args.base:
        spectra[f"{args.base.name} (before)"] = earlier = encode_base(subject, conversations, args, device)
        result.before = representation.report(earlier, args.seed, codes, reverse)

    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    cli.write(out / "predictions.jsonl", lines)
    about = {"data": str(args.data), "weights": subject.stamp}
    cli.write_json(out / "metrics.json", results.metrics(result, args.task, **about))
    title = f"{name} on {args.data.name}, n = {len(examples)}{seed}"
    aligned, shuffled = (result.figures[f"cosine_{which}"] for which in ("aligned", "shuffled"))
    cosines = f"cosine of pairs {aligned:.3f}, of shuffled pairs {shuffled:.3f}"  # t-SNE would not show a collapse
    plots.tsne(representation.sides(encodings, reverse), f"{title}\n{cosines}", out / "tsne.png")
    plots.spectrum(spectra, title, out / "spectrum.png")
    return result, spectra


def is_run(path):
    """Is this a run folder of train.py? Otherwise it is a Hugging Face folder. Raises UserError where it is neither."""
    if not (path / "config.json").exists():
        raise UserError(f"{path}: no run and no model here (no config.json); give a folder of train.py or Hugging Face")
    return "arguments" in cli.read_json(path / "config.json")


def open_folder(path, device, tokenizer=None):
    """The `Subject` in a run folder (its best checkpoint if it has one, else its last) or a Hugging Face folder.

    tokenizer: the name of another one than the model's own.
    """
    folder, name, layout, seed = path, str(path), {}, None
    if is_run(path):
        settings, _ = runs.read(path)
        folder = next((path / part for part in ("best", "checkpoint") if (path / part).exists()), None)
        if folder is None:
            raise UserError(f"{path}: holds no checkpoint yet; let train.py finish an epoch first")
        own = settings.tokenizer == settings.init and (folder / "tokenizer.json").exists()
        name, seed = str(folder) if own else settings.tokenizer, settings.seed
        layout = {key: getattr(settings, key) for key in ("layout", "front_pred", "reverse")}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    stamp = " ".join(f"{file.name} {runs.sha256(file)[:16]}" for file in files)
    model, tokenizer = runs.load_model(folder), hf.tokenizer(tokenizer or name)
    vocabulary = model.decoder.config.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise UserError(f"{path}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's embedding "
                        f"only {vocabulary}; name the model's own with --tokenizer")
    return Subject(model.to(device).eval(), tokenizer, layout, seed, stamp)


def load(subject, args):
    """(conversations, examples) of args.data that the model has room for. Warns of gold answers beyond the budget."""
    limit, k = subject.model.decoder.config.block_size, len(subject.model.pred)
    conversations = data.read(args.data)[: args.limit]
    results.check_answered(conversations)
    conversations, examples = data.examples_of(conversations, subject.tokenizer, limit, k, args.too_long)
    if len(examples) < 4:
        raise UserError(f"{args.data}: {len(examples)} rows are too few to compare encodings; give at least 4")
    lengths = [len(e.full) - e.answer_start for e in examples]
    over = sum(length > args.max_new_tokens for length in lengths)
    if over and args.task != "hellaswag":
        print(f"warning: {over} gold answers are longer than --max_new_tokens {args.max_new_tokens} (the longest has "
              f"{max(lengths)} tokens): the model cannot write them", file=sys.stderr)
    return conversations, examples


# ---- answers


def answers(subject, conversations, examples, args, out):
    """A list of {"row": line of the data file, "output": str, ...}, one for each example, kept in a file of `out`."""
    header = {"data": runs.sha256(args.data), "weights": subject.stamp, "tokenizer": subject.tokenizer.name,
              "task": args.task, "max_new_tokens": args.max_new_tokens}
    if args.temperature:
        header |= {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    path = out / f"answers-{hashlib.sha256(json.dumps(header).encode()).hexdigest()[:8]}.jsonl"
    found, numbers = read(path, header), [results.row_number(conversation) for conversation in conversations]
    todo = [i for i, number in enumerate(numbers) if number not in found]
    if len(todo) < len(numbers):
        print(f"{len(numbers) - len(todo)} of {len(numbers)} answers are already in {path}")
    make = likeliest if args.task == "hellaswag" else written
    # What is there is written anew: the last line may be half a line.
    cli.write(path, "".join(json.dumps(line) + "\n" for line in [header, *found.values()]))
    with open(path, "a", encoding="utf-8") as file:
        made = make(subject, [conversations[i] for i in todo], [examples[i] for i in todo], args)
        for at, answer in results.progress(made, "answers", total=len(numbers), initial=len(numbers) - len(todo)):
            number = numbers[todo[at]]
            found[number] = {"row": number, **answer}
            file.write(json.dumps(found[number]) + "\n")
            file.flush()
    return [found[number] for number in numbers]


def read(path, header):
    """{row: answer} from a file that `answers` wrote; empty if there is none, or none but half a line."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is half a line
        if not lines:
            return {}
        first, *rest = map(json.loads, lines)
        if first != header or not all(isinstance(line["output"], str) for line in rest):
            raise ValueError
        return {line["row"]: line for line in rest}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is damaged; delete it, and its answers are generated anew") from None


def written(subject, conversations, examples, args):
    """Yield (index, {"output", "stopped"}): what the model writes after each prompt."""
    choose = generate.most_likely
    if args.temperature:
        names = [results.row_number(conversation) for conversation in conversations]
        choose = generate.sampler(args.temperature, args.top_p, args.seed, names)
    prompts, tokenizer = [e.full[: e.answer_start] for e in examples], subject.tokenizer
    for i, made in generate.in_batches(subject.model.decoder, prompts, tokenizer.stop, args.max_new_tokens,
                                       args.batch_size, choose):
        yield i, {"output": tokenizer.decode(made.ids), "stopped": made.stopped}


def likeliest(subject, conversations, examples, args):
    """Yield (index, {"output", "ending_letter"}) for questions "context, newline, A) ending, newline, B) ending ...".

    output: the letter most likely as the answer. ending_letter: that of the ending most likely, per token, as the
    answer to the context alone.
    """
    for i, conversation in enumerate(conversations):
        *before, question, _ = conversation.messages
        context, *endings = re.split(r"\n(?=[A-Z]\) )", question["content"])
        letters = [ending[0] for ending in endings] or list("ABCD")
        scores = likelihoods(subject, [*before, question], letters)
        made = {"output": letters[scores.index(max(scores))]}
        if len(endings) > 1 and context.strip() and all(ending[3:].strip() for ending in endings):
            asked = [{"role": "user", "content": context}]
            scores = likelihoods(subject, asked, [ending[3:] for ending in endings], per_token=True)
            made["ending_letter"] = letters[scores.index(max(scores))]
        yield i, made


def likelihoods(subject, messages, choices, per_token=False):
    """log P of each of `choices` as the answer to `messages`, in nats; the stop token does not count."""
    prompt, ids = [], []
    for choice in choices:
        conversation = data.Conversation([*messages, {"role": "assistant", "content": choice}], "")
        e = data.example(conversation, subject.tokenizer)
        prompt = e.full[: e.answer_start]
        ids.append([token for token, wanted in zip(e.full, e.trained, strict=True) if wanted][:-1])
    found = generate.log_likelihoods(subject.model.decoder, prompt, ids)
    return [value / len(own) if per_token else value for value, own in zip(found, ids, strict=True)]


# ---- encodings


def encode(subject, examples, batch_size, layout):
    """What `representation.encode` finds, the views laid out as in training."""
    if any(e.own_text for e in examples):
        layout = layout | {"layout": "paper"}  # a fused row would share the conversation's TEXT
    return representation.encode(subject.model, examples, batch_size, **layout)


def encode_base(subject, conversations, args, device):
    """The same rows, encoded by the model in args.base; without [PRED] of its own, in the layout of `subject`."""
    base = open_folder(args.base, device, args.tokenizer)
    k, room = len(base.model.pred), base.model.decoder.config.block_size
    layout = base.layout if k else {name: value for name, value in subject.layout.items() if name == "layout"}
    examples = [data.example(conversation, base.tokenizer) for conversation in conversations]
    longest = max(data.longest_view(e, k) for e in examples)
    if longest > room:
        raise UserError(f"--base {args.base}: has room for {room} tokens, the rows need up to {longest}; use --limit")
    return encode(base, examples, args.batch_size, layout)
