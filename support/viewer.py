"""What `python data.py FILE` prints: one row as the model sees it, in colour on a terminal, and the file's lengths."""

import math

import numpy as np

from jepa import ANSWER, CODE, PAD, PRED, TEXT, mask

NAMES = {TEXT: "TEXT", ANSWER: "ANSWER", PRED: "PRED", CODE: "CODE", PAD: "PAD"}
COLOURS = {TEXT: 34, ANSWER: 32, PRED: 35, CODE: 33, PAD: 90}  # ANSI: blue, green, magenta, yellow, grey


def show(batch, tokenizer, colour):
    """Print each row of a batch: its tokens by segment (targets in [brackets]), positions, mask, and encodings."""
    paint = lambda text, code: f"\033[{code}m{text}\033[0m" if colour else text  # noqa: E731
    word = lambda i: f"PRED{-i}" if i < 0 else repr(tokenizer.decode([i]))[1:-1]  # noqa: E731
    step = math.ceil(batch.ids.shape[1] / 64)  # of the mask every so many columns are drawn
    seen, targets = mask(batch.segment[:, ::step]), {(row, column + 1) for row, column in batch.label_at.tolist()}
    for row, (ids, segment) in enumerate(zip(batch.ids.tolist(), batch.segment.tolist(), strict=True)):
        print(f"\nrow {row}: {len(ids)} columns. Tokens between | |; [target]: predicted from the column before it")
        for kind in dict.fromkeys(segment):
            columns = [c for c in range(len(ids)) if segment[c] == kind]
            words = [paint(f"[{word(ids[c])}]", "1;4") if (row, c) in targets else word(ids[c]) for c in columns]
            positions = batch.position[row, columns].tolist()
            label = f"{NAMES[kind]:6s} columns {columns[0]}-{columns[-1]}, positions {positions[0]}-{positions[-1]}"
            print(paint(label, COLOURS[kind]))
            print(f"       |{'|'.join(words)}|")
        print("mask: # may attend, . may not" + (f"; every {step}th token is drawn" if step > 1 else ""))
        for kind, allowed in zip(segment[::step], seen[row].tolist(), strict=True):
            print(paint(f"{NAMES[kind]:6s} {''.join('.#'[each] for each in allowed)}", COLOURS[kind]))
    for name, at in (("Pred(Enc(Text))", batch.text_at), ("Enc(Code)", batch.code_at)):
        for row, column in at.tolist():
            print(f"{name:15s} is the state at row {row}, column {column}: {word(batch.ids[row, column].item())}")


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
