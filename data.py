"""From a JSONL file to batches. In: rows of chat messages. Out: `jepa.Batch`, tensors that hold all the loss needs.

    read(path) -> conversations        one per line, checked by support/rows.py, which lists the formats
    Tokenizer                          text <-> ids; "synth" and "gpt2" are made here, Hugging Face's in hf/
    example(conversation, tokenizer)   ids of the conversation and of its two views, and which ids are targets
    order(...)                         which examples make up which optimizer step: a function of (seed, epoch)
    collate(examples, k) -> Batch      the segments of the picture in jepa.py, cut into rows of one batch

Labels are made together with the ids, from what the tokenizer says is the answer: never by searching the ids for it,
never from where the padding is (pad and stop token may be the same id). `python data.py FILE` shows what becomes of one
row. Read next: `train.py`.
"""

import base64
import math
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jepa import ANSWER, CODE, PAD, PRED, TEXT, Batch
from support import cli, rows, viewer
from support.cli import UserError


@dataclass
class Conversation:
    messages: list[dict]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]; last the answer, if any
    where: str  # "file:line"
    text: list[dict] | None = None  # views of the row's own, as turns; None: the user's part and the answer
    code: list[dict] | None = None


def read(path):
    """The conversations of a JSONL file. Raises UserError naming file and line."""
    return [Conversation(**row) for row in rows.read(path)]


# ---- text to ids


class Piece(NamedTuple):
    """A stretch of a conversation's ids."""

    ids: list[int]
    turn: int | None  # index of the message whose content this is; None: the chat template's own tokens


@dataclass
class Tokenizer:
    """`chat` renders a conversation as pieces, so that `example` is told which ids are the answer."""

    name: str
    vocab_size: int
    stop: int  # the id that ends an answer
    encode: Callable[[str], list[int]]  # text that looks like a special token stays text
    decode: Callable[[list[int]], str]
    chat: Callable[[list[dict]], list[Piece]]  # [{"role": ..., "content": ...}, ...] -> pieces, in reading order


SYNTH_RANKS = Path(__file__).parent / "datasets" / "synth.tiktoken"
SYNTH_SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Words with their leading space, single digits, runs of other characters: GPT-2's idea without English contractions.
SYNTH_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def synth_tokenizer():
    """The 512-token byte-level BPE that this repository ships (datasets/make_tokenizer.py)."""
    import tiktoken

    if not SYNTH_RANKS.exists():
        raise UserError(f"{SYNTH_RANKS} is missing; make it with python datasets/make_tokenizer.py")
    ranks = read_ranks(SYNTH_RANKS)
    specials = {token: len(ranks) + i for i, token in enumerate(SYNTH_SPECIALS)}
    bpe = tiktoken.Encoding("synth", pat_str=SYNTH_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    tags = {role: [specials[f"<|{role}|>"]] for role in ("system", "user", "assistant")}
    stop = specials["<|end|>"]
    chat = partial(plain_chat, bpe.encode_ordinary, tags, [], stop)
    return Tokenizer("synth", bpe.n_vocab, stop, bpe.encode_ordinary, partial(decode, bpe), chat)


def read_ranks(path):
    """{token bytes: id} from tiktoken's own file format: one base64 token and its id a line."""
    lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def gpt2_tokenizer():
    """tiktoken's GPT-2 encoding, which tiktoken downloads once."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as failure:  # offline: an exception of whatever library tiktoken downloads with
        raise UserError(f"tiktoken cannot fetch gpt2 ({type(failure).__name__}); go online once, or set "
                        "TIKTOKEN_CACHE_DIR") from None
    tags = {role: bpe.encode_ordinary(f"{role.capitalize()}:\n") for role in ("system", "user", "assistant")}
    chat = partial(plain_chat, bpe.encode_ordinary, tags, bpe.encode_ordinary("\n\n"), bpe.eot_token)
    return Tokenizer("gpt2", bpe.n_vocab, bpe.eot_token, bpe.encode_ordinary, partial(decode, bpe), chat)


TOKENIZERS = {"synth": synth_tokenizer, "gpt2": gpt2_tokenizer}


def plain_chat(encode, tags, between, stop, messages):
    """The template of models that have none: role tag, content, then `stop` after an assistant's turn.

    tags: ids in front of each role's content; between: ids after a system or user turn.
    """
    pieces = []
    for turn, message in enumerate(messages):
        role = message["role"]
        after = [stop] if role == "assistant" else between
        pieces += [Piece(tags[role], None), Piece(encode(message["content"]), turn), Piece(after, None)]
    return pieces


def decode(bpe, ids):
    """Text of ids. An embedding may have more rows than the vocabulary has tokens; such an id becomes U+FFFD."""
    tokens = (bpe.decode_single_token_bytes(i) if i < bpe.n_vocab else b"\xef\xbf\xbd" for i in ids)
    return b"".join(tokens).decode("utf-8", errors="replace")


# ---- ids and labels


@dataclass(slots=True)
class Example:
    """Token ids of one conversation. `text` and `code` end at the token whose state is the encoding."""

    full: list[int]  # the whole conversation
    trained: list[bool]  # one per id of full: is it a prediction target?
    text_end: int  # TEXT is full[:text_end]: up to the end of the last user turn's content
    text: list[int]  # the turns up to the question, without the system's; or the row's own (Text of the paper layout)
    code: list[int]  # the answer alone, with its role tag, or the row's own
    text_start: int = 0  # where the user's content begins inside `text`
    answer_start: int = 0  # where the answer begins inside `full`: full[:answer_start] is the prompt
    own_text: bool = False  # `text` came with the row and is not the TEXT inside `full`: needs the paper layout


def example(conversation, tokenizer, train_on="answer", stop_label=True):
    """Tokenize a conversation: `Example`.

    train_on: "answer" makes the last answer and its stop token targets, "all" every id but the first.
    stop_label=False removes stop tokens from the targets, as the official code does by accident.
    """
    messages, last = conversation.messages, len(conversation.messages) - 1
    answered = messages[last]["role"] == "assistant"  # plain text and paraphrases (see support/rows.py) have no answer
    question = last - 1 if answered else last
    if not answered and train_on == "answer":
        raise UserError(f"{conversation.where}: plain text has no answer to train on; use --train_on all")
    full, trained, start, end = [], [], {}, {}
    for ids, turn in tokenizer.chat(messages):
        if turn is not None:
            start[turn], end[turn] = len(full), len(full) + len(ids)
        full += ids
        trained += [answered and turn == last] * len(ids)
    if answered:
        if tokenizer.stop not in full[end[last] :]:
            raise UserError(f"{conversation.where}: the chat template puts no stop token after the answer")
        after = full.index(tokenizer.stop, end[last]) + 1  # some templates put a blank between answer and stop token
        trained[end[last] : after] = [True] * (after - end[last])
    if train_on == "all":
        trained = [False] + [True] * (len(full) - 1)
    if not stop_label:
        trained = [target and token != tokenizer.stop for token, target in zip(full, trained, strict=True)]
    asked = [message for message in messages[: question + 1] if message["role"] != "system"]
    text, text_start = view(tokenizer, conversation.text or asked)
    code, _ = view(tokenizer, conversation.code or messages[question + 1 :])
    answer_start = start[last] if answered else len(full)
    return Example(full, trained, end[question], text, code, text_start, answer_start, conversation.text is not None)


def view(tokenizer, messages):
    """ids of these turns up to the end of the last one's content, and where that content begins. No turns: no ids."""
    ids = []
    if not messages:
        return ids, 0
    for piece in tokenizer.chat(messages):
        ids += piece.ids
        if piece.turn == len(messages) - 1:
            return ids, len(ids) - len(piece.ids)
    raise AssertionError("a chat template must render the content of every turn")


def longest_view(example, k):
    """Positions that the example may need, in any layout and with all its views."""
    return max(len(example.full), example.text_end + k, len(example.text) + k, len(example.code) + k)


def examples_of(conversations, tokenizer, limit, k=0, too_long="refuse", **how):
    """(conversations, examples) of the rows that need at most `limit` positions. how: options of `example`.

    Longer rows raise UserError (which names --too_long, unless that is None), or with "skip" are left out and reported.
    """
    make = partial(example, tokenizer=tokenizer, **how)
    fitting = rows.fitting(conversations, make, partial(longest_view, k=k), limit, too_long)
    conversations, examples = zip(*fitting, strict=True)
    return list(conversations), list(examples)


def training_set(path, tokenizer, limit, k=0, too_long="refuse", **how):
    """(places, examples) of a file that may be large: as `examples_of`, but of the text only "file:line" is kept, and
    ids are arrays: about 10 bytes of memory a token, 1 kB for a row of the shipped data."""
    make, pack = partial(example, tokenizer=tokenizer, **how), partial(array, "i")
    conversations = (Conversation(**row) for row in rows.read(path))
    places, examples = [], []
    for conversation, e in rows.fitting(conversations, make, partial(longest_view, k=k), limit, too_long):
        places.append(conversation.where)
        examples.append(replace(e, full=pack(e.full), trained=bytes(e.trained), text=pack(e.text), code=pack(e.code)))
    return places, examples


# ---- the order of the data


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
    """A random permutation of n >= 2 without fixed points: each goes to the next on a random cycle."""
    cycle = np.random.default_rng([*seed, 2]).permutation(n)  # 2: a draw of its own, not that of `order`
    partner = np.empty(n, dtype=int)
    partner[cycle] = np.roll(cycle, -1)
    return partner.tolist()


def dropped(probability, seed, step):
    """Does JEPA-loss dropout drop the other views of this optimizer step? A function of (seed, step)."""
    return np.random.default_rng([seed, step, 1]).random() < probability


def count(examples, jepa=True):
    """(labels, pairs of views) of an optimizer step: what its losses are averaged over."""
    return sum(sum(e.trained[1:]) for e in examples), len(examples) if jepa else 0


# ---- batches


def add(row, ids, segment, start=0):
    """Append columns (id, segment, position) to a row, positions from `start` on; returns the column of the last."""
    row += [(token, segment, position) for position, token in enumerate(ids, start)]
    return len(row) - 1


def collate(examples, k, layout="fused", jepa=True, front_pred=False, reverse=False, multiple=1):
    """Lay the examples out in rows: `jepa.Batch`.

    layout "fused": one row [TEXT ANSWER PRED CODE] each; "paper": [TEXT ANSWER], [TEXT without system, PRED, CODE].
    jepa=False: the conversation only, which is plain fine-tuning. reverse: [PRED] ends CODE, which predicts Text.
    front_pred (paper layout only): [PRED] is a part of TEXT, before the user's content; Text's last token predicts.
    multiple: rows are padded to a multiple of this many columns.
    """
    assert layout in ("fused", "paper"), f"layout {layout!r} is neither fused nor paper"
    assert not (front_pred and layout == "fused"), "front_pred would let ANSWER see PRED: it needs the paper layout"
    assert not (front_pred and reverse), "front_pred puts PRED into Text, reverse behind Code: choose one"
    pred = [-1 - i for i in range(k)]
    made, label_at, label, text_at, code_at = [], [], [], [], []
    for e in examples:
        row, number = [], len(made)
        made.append(row)
        text_column = add(row, e.full[: e.text_end], TEXT)
        add(row, e.full[e.text_end :], ANSWER, start=e.text_end)
        targets = [column for column in range(1, len(e.full)) if e.trained[column]]
        label_at += [(number, column - 1) for column in targets]  # the column before a target predicts it
        label += [e.full[column] for column in targets]
        if not jepa:
            continue
        assert e.code, "an example without Code has no views to compare: jepa must be False"
        assert layout == "paper" or not e.own_text, "an example with a text view of its own needs the paper layout"
        text_length = e.text_end
        if layout == "paper":
            row, number, text_length = [], len(made), len(e.text)
            made.append(row)
            in_front = pred if front_pred else []
            text_column = add(row, [*e.text[: e.text_start], *in_front, *e.text[e.text_start :]], TEXT)
        if pred and not front_pred and not reverse:
            text_column = add(row, pred, PRED, start=text_length)
        code_column = add(row, [*e.code, *(pred if reverse else [])], CODE)
        text_at.append((number, text_column))
        code_at.append((number, code_column))

    width = math.ceil(max(map(len, made)) / multiple) * multiple
    columns = np.array([row + [(0, PAD, 0)] * (width - len(row)) for row in made])  # (B, T, 3); quicker than torch
    ids, segment, position = torch.from_numpy(columns).long().permute(2, 0, 1).contiguous()  # (B, T) each
    places = lambda pairs: torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)  # noqa: E731
    label = torch.tensor(label, dtype=torch.long)
    return Batch(ids, segment, position, places(label_at), label, places(text_at), places(code_at))


def main():
    import hf  # the command opens any tokenizer; the module above knows two

    parser = cli.parser("Show one row of a file as the model sees it, then the file's length statistics.\n\n"
                        "    python data.py datasets/synth_val.jsonl --row 7 --layout paper")
    parser.add_argument("file", type=Path, help="JSONL file of conversations")
    parser.add_argument("--row", type=cli.whole(1), default=1, help="which row of the file to show, from 1")
    parser.add_argument("--tokenizer", default="synth", help="synth, gpt2, or a Hugging Face folder or repo id")
    parser.add_argument("--k", type=cli.whole(0, 10_000), default=1, help="number of [PRED] tokens")
    parser.add_argument("--layout", choices=["fused", "paper"], default="fused",
                        help="fused: all views in one row; paper: two rows, Text encoded anew without the system turn")
    parser.add_argument("--train_on", choices=["answer", "all"], default="answer",
                        help="targets: the answer and its stop token, or the whole conversation")
    args = parser.parse_args()
    tokenizer, conversations = hf.tokenizer(args.tokenizer), read(args.file)
    if args.row > len(conversations):
        raise UserError(f"{args.file}: has rows 1 to {len(conversations)}, there is no row {args.row}")
    _, examples = examples_of(conversations, tokenizer, math.inf, train_on=args.train_on)
    chosen = examples[args.row - 1]
    if chosen.own_text and args.layout == "fused":
        raise UserError(f"{args.file}: its rows have a text view of their own; add --layout paper")
    batch = collate([chosen], args.k, args.layout, jepa=bool(chosen.code))
    viewer.show(batch, tokenizer, colour=sys.stdout.isatty())
    viewer.statistics(args.file, examples, tokenizer, args.k)


if __name__ == "__main__":
    cli.run(main)
