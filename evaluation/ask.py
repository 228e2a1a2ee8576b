"""A person asks: `python eval.py RUN --ask`. In: an opened model. Out: its answers, and the Codes of a file nearest to
each question. Every question stands alone: the model does not see earlier ones.
"""

import contextlib
import sys

import numpy as np

import data
from evaluation import encodings
from support import rows
from support.cli import UserError

SHOWN = 3  # Codes


def questions(question):
    """The one question given, or without one those typed in, up to the end of the input (Ctrl-D)."""
    if question:
        yield question
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (so that arrow keys work and bring earlier questions back)
    sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(EOFError):
        while True:
            typed = input("? " if sys.stdin.isatty() else "")
            if typed.strip():
                yield typed


def trained_on(opened):
    """The turns of the first row that a run was trained on; none if the file is gone, or for a Hugging Face folder."""
    try:
        return next(rows.read(opened.data))["messages"] if opened.data else []
    except UserError as mistake:
        print(f"{mistake} (questions are put without the system turn of the training data)", file=sys.stderr)
        return []


def prepared(question, like, opened):
    """(conversation, `data.Example`) of a question, with the system turn of `like`. UserError: no text, or no room."""
    if not question.strip():
        raise UserError("the question is blank")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not UTF-8") from None
    answer = {"role": "assistant", "content": "?"}  # there must be one, whichever: what comes before does not see it
    system = [turn for turn in like[:1] if turn["role"] == "system"]
    asked = data.Conversation([*system, {"role": "user", "content": question}, answer], "the question:1")
    room, k = opened.model.decoder.config.block_size, len(opened.model.pred)
    (conversation,), (example,) = data.examples_of([asked], opened.tokenizer, room, k, too_long=None)
    return conversation, example


class Codes:
    """The different Codes of a file, to be found by what the model predicts from a question."""

    def __init__(self, opened, conversations, args):
        room, k = opened.model.decoder.config.block_size, len(opened.model.pred)
        conversations, examples = data.examples_of(conversations, opened.tokenizer, room, k, args.too_long)
        own_text = any(e.own_text for e in examples)
        self.model, self.layout = opened.model, opened.layout | ({"layout": "paper"} if own_text else {})
        different = {tuple(e.code): (c, e) for c, e in zip(conversations, examples, strict=True)}.values()
        self.texts = [(c.code or c.messages)[-1]["content"] for c, _ in different]
        text, self.code = self.encoded([e for _, e in different], args.batch_size)
        self.found = (encodings.ranks(text, self.code) <= SHOWN).mean()  # by the file's own questions

    def encoded(self, examples, batch_size=1):
        """What the model predicts from each Text, and each Code: (n, C) twice."""
        states = encodings.encode(self.model, examples, batch_size, **self.layout)
        return encodings.sides(states, self.layout.get("reverse", False)).values()

    def nearest(self, example):
        """Lines: the Codes nearest to a question, or that the encodings do not tell."""
        chance = min(1, SHOWN / len(self.texts))
        if self.found < max(0.1, min(3 * chance, (1 + chance) / 2)):
            return [f"(The encodings do not tell which Codes are near: of the file's own questions {self.found:.1%} "
                    f"have theirs among the nearest {SHOWN} of {len(self.texts)}; by chance {chance:.1%} would.)"]
        question, _ = self.encoded([example])
        cosine = (encodings.unit(question) @ encodings.unit(self.code).T)[0]
        best = [f"  {cosine[i]:.3f}  {self.texts[i]}" for i in np.argsort(-cosine)[:SHOWN]]
        return ["nearest Codes, by cosine:", *best]
