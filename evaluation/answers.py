"""Answers in files. In: whatever makes answers. Out: [{"row": line of the data file, "output": str, ...}, ...].

Of an answer's other keys two mean something: "stopped" (did the model end it?) and "ending_letter" (see `likeliest`).
"""

import contextlib
import hashlib
import json
import re
import sys

from tqdm import tqdm

import data
from evaluation import generate
from support.cli import UserError, write

KEYS = {"output": str, "stopped": bool, "ending_letter": str}


def progress(rows, label, **options):
    """A progress bar with an estimate of the time left; in a log file only now and then."""
    return tqdm(rows, label, unit="row", leave=False, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def row_number(conversation):
    """The line of the data file that a conversation stands on."""
    return int(conversation.where.rpartition(":")[2])


def questions(path, limit=None):
    """(the first `limit` conversations of a file to be answered, digest of all of it that answers depend on)."""
    conversations = data.read(path)
    asked = json.dumps([[row_number(conversation), conversation.messages] for conversation in conversations])
    for conversation in conversations[:limit]:
        if [message["role"] for message in conversation.messages[-2:]] != ["user", "assistant"]:
            raise UserError(f"{conversation.where}: must end with a question and its answer, to be scored by")
    return conversations[:limit], hashlib.sha256(asked.encode()).hexdigest()


def kept(folder, header, conversations, examples, make):
    """A model's answers, one for each conversation, as far as they are there from a file named after `header`, all that
    they depend on. make: those not answered yet, and their examples -> (index among these, answer), one by one."""
    path = folder / f"answers-{hashlib.sha256(json.dumps(header).encode()).hexdigest()[:8]}.jsonl"
    found, numbers = answered(path, header), [row_number(conversation) for conversation in conversations]
    todo = [i for i, number in enumerate(numbers) if number not in found]
    if len(todo) < len(numbers):
        print(f"{len(numbers) - len(todo)} of {len(numbers)} answers are already in {path}")
    # What is there is written anew: the last line may be half a line.
    write(path, "".join(json.dumps(line) + "\n" for line in [header, *found.values()]))
    with open(path, "a", encoding="utf-8") as file:
        made = make([conversations[i] for i in todo], [examples[i] for i in todo])
        for at, answer in progress(made, "answers", total=len(numbers), initial=len(numbers) - len(todo)):
            number = numbers[todo[at]]
            found[number] = {"row": number, **answer}
            file.write(json.dumps(found[number]) + "\n")
            file.flush()
    return [found[number] for number in numbers]


def answered(path, header):
    """{row: answer} of a file that `kept` wrote; empty if there is none, or none but half a line."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is half a line
        first, *rest = map(json.loads, lines or [json.dumps(header)])
        kinds = {"row": int} | KEYS
        odd = any(type(value) is not kinds[name] for line in rest for name, value in line.items())
        if first != header or odd or not all("output" in line for line in rest):
            raise ValueError
        return {line["row"]: line for line in rest}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: is damaged; delete it, and its answers are generated anew") from None


def likeliest(opened, args, conversations, examples):
    """Yield (index, {"output", "ending_letter"}) for questions "context, newline, A) ending, newline, B) ending ...":
    the likeliest letter as the answer, and that of the likeliest ending, per token, as the answer to the context."""
    for i, conversation in enumerate(conversations):
        *before, question, _ = conversation.messages
        context, *endings = re.split(r"\n(?=[A-Z]\) )", question["content"])
        letters = [ending[0] for ending in endings] or list("ABCD")
        scores = likelihoods(opened, [*before, question], letters)
        made = {"output": letters[scores.index(max(scores))]}
        if len(endings) > 1 and context.strip() and all(ending[3:].strip() for ending in endings):
            asked = [{"role": "user", "content": context}]
            scores = likelihoods(opened, asked, [ending[3:] for ending in endings], per_token=True)
            made["ending_letter"] = letters[scores.index(max(scores))]
        yield i, made


def likelihoods(opened, messages, choices, per_token=False):
    """log P of each of the choices as the answer to `messages`, in nats; the stop token does not count."""
    asked = [data.Conversation([*messages, {"role": "assistant", "content": choice}], "") for choice in choices]
    examples = [data.example(conversation, opened.tokenizer, stop_label=False) for conversation in asked]
    ids = [[token for token, wanted in zip(e.full, e.trained, strict=True) if wanted] for e in examples]
    prompt = examples[0].full[: examples[0].answer_start]
    found = generate.log_likelihoods(opened.model.decoder, prompt, ids)
    return [value / len(own) if per_token else value for value, own in zip(found, ids, strict=True)]


def given(path, conversations):
    """(answers, the conversations that they answer) from the file of another system, or from an earlier evaluation.
    Line i answers conversation i; or each says by "row" which line of the data it answers, and some may be missing."""
    lines, by_row = objects(path), {row_number(conversation): conversation for conversation in conversations}
    numbered, left, answers = "row" in lines[0], dict(by_row), []
    if len(lines) > len(by_row):
        raise UserError(f"{path}:{len(by_row) + 1}: --data has only {len(by_row)} rows (to --limit); give one for each")
    for number, made in enumerate(lines, 1):
        row = made.get("row") if numbered else next(iter(left))
        if type(row) is not int or row not in by_row:
            raise UserError(f"{path}:{number}: --data has no row {row}; are these the outputs for another file?")
        if left.pop(row, None) is None:
            raise UserError(f"{path}:{number}: is another output for row {row} of --data; give one for each")
        known = {name: made[name] for name, kind in KEYS.items() if isinstance(made.get(name), kind)}
        answers.append({"row": row} | known)
    if left and not numbered:
        missing = next(iter(left.values())).where
        raise UserError(f"{path}:{len(lines) + 1}: the file ends, with no output for {missing} and what follows; "
                        f"give {len(by_row)} outputs, or --limit {len(lines)}")
    if left:
        print(f"{path.name} answers {len(lines)} of {len(by_row)} rows; the others are left out", file=sys.stderr)
    return answers, [by_row[answer["row"]] for answer in answers]


def objects(path):
    """The objects of a JSONL file of outputs: at least one, each with a string "output"."""
    try:
        text = path.read_bytes().decode("utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); give a JSONL file of outputs") from None
    if not text:
        raise UserError(f'{path}: is empty; give {{"output": "..."}}, one line for each row of --data')
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a string may hold U+2028 as it is
        made = None
        with contextlib.suppress(ValueError, RecursionError):
            made = json.loads(line)
        if not isinstance(made, dict) or not isinstance(made.get("output"), str):
            raise UserError(f'{path}:{number}: must be {{"output": "..."}}, one line for each row of --data')
        found.append(made)
    return found
