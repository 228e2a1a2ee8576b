"""From a JSONL file to batches. In: rows of chat messages. Out: `Batch`, tensors that say everything the loss needs.

    read(path) -> conversations        one per line, checked; every mistake is reported by file and line
    example(conversation, tokenizer)   ids of the conversation and of its two views, and which ids are targets
    order(...)                         which examples make up which optimizer step: a function of (seed, epoch)
    collate(examples, k) -> Batch      segments cut into rows (see the picture in jepa.py)

Labels are made together with the ids, from what the tokenizer says is the answer: never by searching the ids, never
from "id != pad". `python data.py FILE` shows what becomes of one row. Read next: `train.py`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import cli
from cli import UserError
from jepa import ANSWER, CODE, PAD, PRED, TEXT, mask


@dataclass
class Conversation:
    messages: list[dict]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]; the last is the answer
    where: str  # "file:line"
    text: list[dict] | None = None  # views of the row's own, as turns; None: the user's part and the answer
    code: list[dict] | None = None
    group: str | int | None = None  # rows of one group are paraphrases: each has the next one as its Code


@dataclass
class Example:
    """Token ids of one conversation. `text` and `code` end at the token whose state is the encoding."""

    full: list[int]  # the whole conversation
    trained: list[bool]  # one per id of full: is it a prediction target?
    text_end: int  # TEXT is full[:text_end]: up to the end of the last user turn's content
    text: list[int]  # the user's part alone, without the system turn (what the paper layout encodes)
    code: list[int]  # the answer alone
    text_start: int = 0  # where the user's content begins inside `text`
    answer_start: int = 0  # where the answer begins inside `full`: full[:answer_start] is the prompt
    own_text: bool = False  # `text` came with the row and is not the TEXT inside `full`: needs the paper layout


class Batch(NamedTuple):
    """B rows of T columns and N pairs of views. All tensors int64."""

    ids: torch.Tensor  # (B, T); -1, -2, ... are the first, second, ... [PRED] vector
    segment: torch.Tensor  # (B, T); jepa.TEXT ... jepa.PAD
    position: torch.Tensor  # (B, T); restarts with each view
    label: torch.Tensor  # (B, T); the id to be predicted *from* this column, -100 for none
    text_at: torch.Tensor  # (N, 2); (row, column) where Pred(Enc(Text)) is read
    code_at: torch.Tensor  # (N, 2); where Enc(Code) is read

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in self))


def read(path):
    """The conversations of a JSONL file. Raises UserError naming file and line.

    A row is {"messages": [turns]}, the last turn an answer. Besides, it may have "text" and "code", views of its own
    (a string, or turns): the views are encoded, `messages` is the conversation. {"text": ..., "code": ...} alone
    is a question and its answer, {"text": ...} alone is plain text, to be trained on with train_on="all". Rows of
    plain text or of a user turn alone that share a "group" are paraphrases of one another.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}; give a JSONL file with one conversation a line") from None
    rows = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    conversations = [_conversation(line, where) for where, line in rows]
    groups = {}
    for conversation in conversations:
        if conversation.group is not None:
            groups.setdefault(conversation.group, []).append(conversation)
    for group, members in groups.items():
        if len(members) < 2:
            raise UserError(f"{members[0].where}: no other row has the group {group!r}; a paraphrase needs a partner")
        for member, partner in zip(members, members[1:] + members[:1], strict=True):
            member.code = partner.messages[-1:]
    return conversations


def _conversation(line, where):
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as failure:
        raise UserError(f"{where}: not UTF-8 (byte {failure.start} of the line); save the file as UTF-8") from None
    except (ValueError, RecursionError) as failure:
        raise UserError(f"{where}: not JSON ({failure}); each line must be one JSON object") from None
    if not isinstance(row, dict) or not (isinstance(row.get("messages"), list) or isinstance(row.get("text"), str)):
        raise UserError(f'{where}: needs {{"messages": [...]}}, a list of turns with "role" and "content"')
    text, code = (_turns(row[name], role, where) if name in row else None for name, role in VIEWS.items())
    group = row.get("group")
    if group is not None and not isinstance(group, (str, int)):
        raise UserError(f"{where}: a group must be a string or a number")
    if group is not None and code is not None:
        raise UserError(f"{where}: has a group and a code; the Code of a paraphrase is the next row of its group")
    if "messages" not in row:
        return Conversation(text + (code or []), where, group=group)
    if (text is None) != (code is None):
        raise UserError(f'{where}: has one of "text" and "code"; give both views, or neither')
    messages = _turns(row["messages"], None, where)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    pairs = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != (pairs + ["user"] if group is not None else pairs):
        raise UserError(f"{where}: roles are {roles}; wanted: system (optional), then user, assistant in turn")
    return Conversation(messages, where, text, code, group)


VIEWS = {"text": "user", "code": "assistant"}  # who says a view that is given as a string


def _turns(value, role, where):
    """Turns of a conversation or a view; the last user's and the last assistant's must not be empty."""
    messages = [{"role": role, "content": value}] if role and isinstance(value, str) else value
    if not isinstance(messages, list) or not messages and role:
        raise UserError(f'{where}: a view must be a string or a list of turns with "role" and "content"')
    messages = [_message(message, where) for message in messages]
    for message in messages[-2:]:
        system = message["role"] == "system" and not (role and message is messages[-1])  # a view is read at its end
        if not system and not message["content"].strip():
            raise UserError(f"{where}: the {message['role']}'s last turn is empty; nothing can be learnt from it")
    return messages


def _message(message, where):
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UserError(f'{where}: a turn must be {{"role": system, user or assistant, "content": "..."}}')
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: a lone surrogate (half of a \\ud83d\\ude00) is not text; mend the row") from None
    return {"role": role, "content": content}


def example(conversation, tokenizer, train_on="answer", stop_label=True):
    """Tokenize a conversation: `Example`.

    train_on: "answer" makes the last answer and its stop token targets, "all" every id but the first.
    stop_label=False takes the target off every stop token, as the official code does by accident.
    """
    messages, last = conversation.messages, len(conversation.messages) - 1
    answered = messages[last]["role"] == "assistant"
    question = last - 1 if answered else last
    if not answered and train_on == "answer":
        raise UserError(f"{conversation.where}: plain text has no answer to train on; use --train_on all")
    full, trained, start, end = [], [], {}, {}
    for ids, turn in tokenizer.chat(messages):
        if turn is not None:
            start[turn], end[turn] = len(full), len(full) + len(ids)
        full += ids
        trained += [turn == last] * len(ids)
    if answered:
        if tokenizer.stop not in full[end[last] :]:
            raise UserError(f"{conversation.where}: the chat template puts no stop token after the answer")
        stop = full.index(tokenizer.stop, end[last])  # where the answer ends is known; some templates put a blank here
        trained[end[last] : stop + 1] = [True] * (stop + 1 - end[last])
    if train_on == "all":
        trained = [False] + [True] * (len(full) - 1)
    if not stop_label:
        trained = [target and token != tokenizer.stop for token, target in zip(full, trained, strict=True)]
    asked = [message for message in messages[: question + 1] if message["role"] != "system"]
    text, text_start = _view(tokenizer, conversation.text or asked)
    code, _ = _view(tokenizer, conversation.code or messages[question + 1 :])
    answer_start = start[last] if answered else len(full)
    own_text = conversation.text is not None
    return Example(full, trained, end[question], text, code, text_start, answer_start, own_text)


def _view(tokenizer, messages):
    """ids of these turns up to the end of the last one's content, and where that content begins. No turns: no ids."""
    ids = []
    if not messages:
        return ids, 0
    for piece in tokenizer.chat(messages):
        ids = ids + piece.ids
        if piece.turn == len(messages) - 1:
            return ids, len(ids) - len(piece.ids)
    raise AssertionError("a chat template must render the content of every turn")


def longest_view(example, k):
    """Positions that the example needs, whatever the layout."""
    return max(len(example.full), example.text_end + k, len(example.text) + k, len(example.code) + k)


def load(path, tokenizer, limit, k=0, too_long="refuse", **options):
    """(conversations, examples) of a file, as many as `fitting` lets pass."""
    return fitting(read(path), tokenizer, limit, k, too_long, **options)


def fitting(conversations, tokenizer, limit, k=0, too_long="refuse", **options):
    """(conversations, examples). Rows that need over `limit` positions are refused, or skipped and told."""
    kept, skipped = [], []
    for conversation in conversations:
        made = example(conversation, tokenizer, **options)
        if longest_view(made, k) <= limit:
            kept.append((conversation, made))
        elif too_long == "skip":
            skipped.append(conversation.where)
        else:
            raise UserError(
                f"{conversation.where}: needs {longest_view(made, k)} tokens, the model has room for {limit}; "
                "take a model with more room, or leave such rows out with --too_long skip"
            )
    if skipped:
        some = ", ".join(skipped[:5]) + (", ..." if skipped[5:] else "")
        print(f"skipped {len(skipped)} rows longer than {limit} tokens: {some}", file=sys.stderr)
    if not kept:
        raise UserError(f"{conversations[0].where}: neither this row nor any other fits into {limit} tokens")
    conversations, examples = zip(*kept, strict=True)
    return list(conversations), list(examples)


def order(lengths, size, seed, epoch, window=64):
    """One epoch as a list of optimizer steps, each a list of at most `size` indices: a function of (seed, epoch).

    Examples are shuffled; within each `window` steps' worth they are sorted by length, so that the rows of a step are
    about equally long and little is padding; then the steps are shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    steps = []
    for start in range(0, len(shuffled), window * size):
        chunk = sorted(shuffled[start : start + window * size], key=lambda index: lengths[index])
        steps += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    return [steps[i] for i in random.permutation(len(steps))]


def derangement(n, *seed):
    """A random permutation of n >= 2 that leaves nothing in its place: along a random cycle, each goes to the next."""
    cycle = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, dtype=int)
    partner[cycle] = np.roll(cycle, -1)
    return partner.tolist()


def dropped(probability, seed, step):
    """Does JEPA-loss dropout drop the other views of this optimizer step? A function of (seed, step)."""
    return np.random.default_rng([seed, step, 1]).random() < probability


class Row:
    """One row under construction: columns of (id, segment, position, label)."""

    def __init__(self):
        self.ids, self.segment, self.position, self.label = [], [], [], []

    def add(self, ids, segment, start=0, label=None):
        """Append a piece whose positions count from `start`; returns the column of its last token."""
        self.ids += ids
        self.segment += [segment] * len(ids)
        self.position += range(start, start + len(ids))
        self.label += label or [-100] * len(ids)
        return len(self.ids) - 1


def collate(examples, k, layout="fused", jepa=True, front_pred=False, reverse=False):
    """Lay the examples out in rows: `Batch`.

    layout "fused": one row [TEXT ANSWER PRED CODE] each; "paper": [TEXT ANSWER] and [user turn alone + PRED | CODE].
    jepa=False: the conversation only, which is plain fine-tuning. reverse: PRED follows CODE, Code predicts Text.
    front_pred (paper layout only): PRED stands before the user's content, read at Text's last token.
    """
    assert layout in ("fused", "paper"), f"layout {layout!r} is neither fused nor paper"
    assert not (front_pred and layout == "fused"), "front_pred would let ANSWER see PRED: it needs the paper layout"
    assert not (front_pred and reverse), "front_pred puts PRED into Text, reverse behind Code: choose one"
    pred = [-1 - i for i in range(k)]
    rows, text_at, code_at = [], [], []
    for e in examples:
        row = Row()
        rows.append(row)
        # The label of a column is the next column's id, where that is a target.
        target = [token if wanted else -100 for token, wanted in zip(e.full, e.trained, strict=True)][1:] + [-100]
        text_column = row.add(e.full[: e.text_end], TEXT, label=target[: e.text_end])
        row.add(e.full[e.text_end :], ANSWER, start=e.text_end, label=target[e.text_end :])
        if not jepa:
            continue
        assert e.code, "an example without Code has no views to compare: jepa must be False"
        assert layout == "paper" or not e.own_text, "an example with a text view of its own needs the paper layout"
        text_length = e.text_end
        if layout == "paper":
            row, text_length = Row(), len(e.text)
            rows.append(row)
            if front_pred:  # what follows PRED sees it, so the user's content counts as PRED here
                row.add(e.text[: e.text_start], TEXT)
                text_column = row.add(pred + e.text[e.text_start :], PRED, start=e.text_start)
            else:
                text_column = row.add(e.text, TEXT)
        if pred and not front_pred and not reverse:
            text_column = row.add(pred, PRED, start=text_length)
        code_column = row.add(e.code + (pred if reverse else []), CODE)
        text_at.append([len(rows) - 1, text_column])
        code_at.append([len(rows) - 1, code_column])

    width = max(len(row.ids) for row in rows)
    padded = lambda columns, fill: torch.tensor([c + [fill] * (width - len(c)) for c in columns])  # noqa: E731
    return Batch(
        ids=padded([row.ids for row in rows], 0),
        segment=padded([row.segment for row in rows], PAD),
        position=padded([row.position for row in rows], 0),
        label=padded([row.label for row in rows], -100),
        text_at=torch.tensor(text_at, dtype=torch.long).reshape(-1, 2),
        code_at=torch.tensor(code_at, dtype=torch.long).reshape(-1, 2),
    )


def count(examples, jepa=True):
    """(labelled tokens, pairs of views) of an optimizer step: what its losses are averaged over."""
    return sum(sum(e.trained[1:]) for e in examples), len(examples) if jepa else 0


# ---- python data.py FILE: look at what the model will see

NAMES = {TEXT: "TEXT", ANSWER: "ANSWER", PRED: "PRED", CODE: "CODE", PAD: "PAD"}
COLOURS = {TEXT: 34, ANSWER: 32, PRED: 35, CODE: 33, PAD: 90}  # ANSI: blue, green, magenta, yellow, grey


def show(batch, tokenizer, colour):
    """Print each row of a batch: tokens by segment (targets in [brackets]), positions, mask, and what is read."""
    paint = lambda text, code: f"\033[{code}m{text}\033[0m" if colour else text  # noqa: E731
    word = lambda i: f"PRED{-i}" if i < 0 else repr(tokenizer.decode([i]))[1:-1]  # noqa: E731
    seen = mask(batch.segment)
    for row, (ids, segment) in enumerate(zip(batch.ids.tolist(), batch.segment.tolist(), strict=True)):
        print(f"\nrow {row}: {len(ids)} columns. Tokens between | |; [target]: predicted from the column before it")
        target = [False] + [label != -100 for label in batch.label[row].tolist()[:-1]]
        for kind in dict.fromkeys(segment):
            columns = [c for c in range(len(ids)) if segment[c] == kind]
            words = [paint(f"[{word(ids[c])}]", "1;4") if target[c] else word(ids[c]) for c in columns]
            positions = batch.position[row, columns].tolist()
            label = f"{NAMES[kind]:6s} columns {columns[0]}-{columns[-1]}, positions {positions[0]}-{positions[-1]}"
            print(paint(label, COLOURS[kind]))
            print(f"       |{'|'.join(words)}|")
        step = -(-len(ids) // 64)  # one character stands for `step` columns
        print("mask: # may attend, . may not" + (f"; every {step}th token is drawn" if step > 1 else ""))
        for q in range(0, len(ids), step):
            cells = "".join("#" if seen[row, q, c] else "." for c in range(0, len(ids), step))
            print(paint(f"{NAMES[segment[q]]:6s} {cells}", COLOURS[segment[q]]))
    for name, at in (("Pred(Enc(Text))", batch.text_at), ("Enc(Code)", batch.code_at)):
        for row, column in at.tolist():
            print(f"{name:15s} is read at row {row}, column {column}: {word(batch.ids[row, column].item())}")


def statistics(path, examples, tokenizer, k):
    """Print the lengths, in tokens, of everything in a file."""
    lengths = {
        "conversation": [len(e.full) for e in examples],
        "Text alone": [len(e.text) for e in examples],
        "Code alone": [len(e.code) for e in examples],
        "targets": [sum(e.trained) for e in examples],
        f"fused row, k={k}": [len(e.full) + k + len(e.code) for e in examples],
    }
    print(f"\n{path}: {len(examples)} rows, tokenizer {tokenizer.name} ({tokenizer.vocab_size} tokens)")
    print(f"{'tokens':16s} {'min':>6s} {'median':>6s} {'mean':>7s} {'p99':>6s} {'max':>6s} {'total':>10s}")
    for name, n in lengths.items():
        middle, p99 = np.median(n), np.percentile(n, 99)
        print(f"{name:16s} {min(n):6d} {middle:6.0f} {np.mean(n):7.1f} {p99:6.0f} {max(n):6d} {sum(n):10d}")


def main():
    parser = cli.parser("Show one row of a file as the model sees it, then the file's length statistics.\n\n"
                        "    python data.py datasets/synth_val.jsonl --row 7 --layout paper")
    parser.add_argument("file", type=Path, help="JSONL file of conversations")
    parser.add_argument("--row", type=int, default=1, help="which row of the file to show, from 1")
    parser.add_argument("--tokenizer", default="synth", help="synth, gpt2, or a Hugging Face folder")
    parser.add_argument("--k", type=int, default=1, help="number of [PRED] tokens")
    parser.add_argument("--layout", choices=["fused", "paper"], default="fused", help="see the picture in jepa.py")
    parser.add_argument("--train_on", choices=["answer", "all"], default="answer", help="which tokens are targets")
    args = parser.parse_args()

    import tokenizer as tokenizers

    tokenizer = tokenizers.load(args.tokenizer)
    conversations = read(args.file)
    if not 1 <= args.row <= len(conversations):
        raise UserError(f"{args.file}: has rows 1 to {len(conversations)}, there is no row {args.row}")
    if args.k < 0:
        raise UserError(f"--k {args.k}: the number of [PRED] tokens cannot be negative")
    examples = [example(conversation, tokenizer, args.train_on) for conversation in conversations]
    chosen = examples[args.row - 1]
    if chosen.own_text and args.layout == "fused":
        raise UserError(f"{args.file}: its rows have a text view of their own; add --layout paper")
    show(collate([chosen], args.k, args.layout, jepa=bool(chosen.code)), tokenizer, colour=sys.stdout.isatty())
    statistics(args.file, examples, tokenizer, args.k)


if __name__ == "__main__":
    cli.run(main)
