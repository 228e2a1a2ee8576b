"""Batched decoding with a key/value cache. In: a decoder and prompts (lists of ids). Out: answers (likewise).

    in_batches(decoder, prompts, ...)           generate: greedy, or with choose=sampler(...)
    log_likelihoods(decoder, prompts, choices)  nothing is generated: how likely is each of the given answers?

What all prompts of a batch begin with (a system turn, say) is computed once. Behind it, prompts of different lengths
are padded on the left, so that every row's next token lands in the same column:

    | shared | . . . . rest of one prompt | answer          The mask of the prompts is jepa.mask, the same rule as in
    |        | . rest of a longer prompt  | answer          training: TEXT sees TEXT, PAD (the dots) sees PAD.

Read next: `eval.py`.
"""

import os
from typing import NamedTuple

import numpy as np
import torch

from jepa import PAD, TEXT, mask


class Answer(NamedTuple):
    ids: list[int]  # without the stop token
    stopped: bool  # the model ended it; otherwise the budget did


class Cache:
    """Keys and values (B, G, S, D) and positions (B, S) of the columns so far; `Decoder.hidden` appends to it.

    Tensors have room for a quarter more columns than are used, so that a new token seldom copies all earlier ones. New
    columns of several rows may follow earlier ones of one row, which then belong to each of them.
    """

    def __init__(self):
        self.start, self.end, self.position, self.tensors = 0, 0, None, {}

    def extend(self, position):
        """Add the positions of new columns, (B, T); returns those of all columns, (B, S)."""
        earlier = position[:, :0] if self.position is None else self.position.expand(len(position), -1)
        self.position = torch.cat([earlier, position], dim=1)
        self.start, self.end = self.end, self.position.shape[1]
        return self.position

    def append(self, layer, key, value):
        """Add a layer's new keys and values, (B, G, T, D); returns all of that layer's, (B, G, S, D)."""
        return self._append((layer, "key"), key), self._append((layer, "value"), value)

    def _append(self, name, new):
        held = self.tensors.get(name)
        if held is None or held.shape[2] < self.end or len(held) < len(new):
            B, G, _, D = new.shape
            grown = new.new_empty(B, G, self.end + self.end // 4 + 1, D)
            if held is not None:
                grown[:, :, : self.start] = held[:, :, : self.start]
            self.tensors[name] = held = grown
        held[:, :, self.start : self.end] = new
        return held[:, :, : self.end]

    def keep(self, rows):
        """Row i becomes what row rows[i] was, (B,); all others are dropped. Rows that stay in place are not copied."""
        self.position = self.position[rows]
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for name, held in self.tensors.items():
            held[moved, :, : self.end] = held[rows[moved], :, : self.end]
            self.tensors[name] = held[: len(rows)]


def most_likely(logits, rows, step):
    """Greedy decoding: the next token of each row, (B,), from its logits, (B, V)."""
    return logits.argmax(dim=-1)


def sampler(temperature, top_p, seed, names):
    """A function like `most_likely` that draws from softmax(logits / temperature), cut to the likeliest `top_p` of it.

    names: a number for each prompt. A draw depends on (seed, name, step) alone: not on the batch, nor on what was
    generated before an interruption.
    """

    def choose(logits, rows, step):
        share = torch.softmax(logits.float() / temperature, dim=-1)
        if top_p < 1:  # a token is kept if the likelier ones do not make up top_p without it
            ordered, order = share.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
            share = torch.zeros_like(share).scatter(-1, order, ordered)
        heap = share.cumsum(dim=-1)  # (B, V); in the order of ids: sorting nearly equal shares would depend on rounding
        draw = [1 - np.random.default_rng([seed, names[row], step]).random() for row in rows]  # in (0, 1]
        target = torch.tensor(draw, device=heap.device, dtype=heap.dtype)[:, None] * heap[:, -1:]
        return (heap < target).sum(dim=-1)

    return choose


def common(prompts):
    """How many tokens all prompts begin with, where at least one token of each must remain to go on from."""
    if len(prompts) == 1:
        return 0
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


@torch.inference_mode()
def decode(decoder, prompts, stop, max_new_tokens, choose=most_likely):
    """Continue each prompt: yields (index of the prompt, `Answer`), the shortest answer first.

    Rows that have met `stop`, or have filled the model's block_size, leave the batch and cost nothing more.
    """
    assert prompts and all(prompts), "every prompt needs at least one token"
    assert max(map(len, prompts)) <= decoder.config.block_size, "a prompt is longer than the model's block_size"
    device, width = decoder.embed.weight.device, max(map(len, prompts))
    shared = common(prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [prompt[:shared] + [0] * gap + prompt[shared:] for prompt, gap in zip(prompts, gaps, strict=True)]
    ids, gap = torch.tensor(ids, device=device), torch.tensor(gaps, device=device)[:, None]  # (B, width), (B, 1)
    column = torch.arange(width, device=device)
    seen = (column < shared) | (column >= shared + gap)  # (B, width): columns that new tokens may attend to
    may_see, cache = mask(torch.where(seen, TEXT, PAD)), Cache()  # (B, width, width)
    if shared:  # the same in every row: the first row's columns become those of all
        decoder.hidden(ids[:1, :shared], may_see[:1, :shared, :shared], column[None, :shared], cache)
    hidden = decoder.hidden(ids[:, shared:], may_see[:, shared:], (column - gap).clamp(min=0)[:, shared:], cache)

    answers, alive = [[] for _ in prompts], list(range(len(prompts)))  # alive: which prompt each row belongs to
    for step in range(max_new_tokens):
        token = choose(decoder.logits(hidden[:, -1]), alive, step)  # (B,)
        going = []
        for row, (prompt, choice) in enumerate(zip(alive, token.tolist(), strict=True)):
            if choice != stop:
                answers[prompt].append(choice)
            full = len(prompts[prompt]) + len(answers[prompt]) > decoder.config.block_size
            if choice == stop or full or step == max_new_tokens - 1:
                yield prompt, Answer(answers[prompt], choice == stop)
            else:
                going.append(row)
        if not going:
            return
        if len(going) < len(alive):  # the last rows move to where rows have ended
            tail, stays = [row for row in going if row >= len(going)], set(going)
            rows = [row if row in stays else tail.pop() for row in range(len(going))]
            alive = [alive[row] for row in rows]
            rows = torch.tensor(rows, device=device)
            token, gap, seen = token[rows], gap[rows], seen[rows]
            cache.keep(rows)
        seen = torch.cat([seen, torch.ones_like(gap, dtype=torch.bool)], dim=1)
        hidden = decoder.hidden(token[:, None], seen[:, None], width + step - gap, cache)


def greedy(decoder, prompts, stop, max_new_tokens):
    """The most likely continuation of each prompt, in one batch: a list of `Answer`, in the order of the prompts."""
    return [answer for _, answer in sorted(decode(decoder, prompts, stop, max_new_tokens))]


def in_batches(decoder, prompts, stop, max_new_tokens, batch_size, choose=most_likely):
    """`decode` over many prompts, longest first (so that a lack of memory shows at once), yielding (index, Answer)."""
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chunk = by_length[start : start + batch_size]

        def choose_here(logits, rows, step, chunk=chunk):
            return choose(logits, [chunk[row] for row in rows], step)

        for row, answer in decode(decoder, [prompts[i] for i in chunk], stop, max_new_tokens, choose_here):
            yield chunk[row], answer


@torch.inference_mode()
def log_likelihoods(decoder, prompt, choices):
    """log P(choice | prompt) for each choice, summed over its tokens, in nats: a list of numbers.

    All choices stand in one row behind the prompt. Each sees the prompt and itself, and its positions go on from there.
    """
    ids, choice, position = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    source, target = [], []  # the columns that predict the choices' tokens, and those tokens
    for number, tokens in enumerate(choices, 1):
        source += [len(prompt) - 1, *range(len(ids), len(ids) + len(tokens) - 1)]
        target += tokens
        ids += tokens
        choice += [number] * len(tokens)
        position += range(len(prompt), len(prompt) + len(tokens))
    device = decoder.embed.weight.device
    ids, choice, position, target = (torch.tensor(x, device=device) for x in (ids, choice, position, target))
    seen = ((choice == 0) | (choice == choice[:, None])).tril()
    hidden = decoder.hidden(ids[None], seen[None], position[None])[0, source]  # (tokens of all choices, C)
    found = torch.log_softmax(decoder.logits(hidden).float(), dim=-1).gather(1, target[:, None])[:, 0]
    return [part.sum().item() for part in found.split([len(tokens) for tokens in choices])]
