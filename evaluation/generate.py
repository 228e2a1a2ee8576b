"""Batched decoding with a key/value cache. In: a decoder and prompts (lists of ids). Out: answers (likewise).

First the prompts are taken in (`prefill`). What all of them begin with, a system turn say, is computed once, then the
rest of each, in one forward pass. Shorter ones are padded in front, so that the next token of every row lands in the
same new column:

    what all begin with | . . . a short prompt | answer        dots: padding; `own` is False there, and no token of the
    what all begin with | a longer prompt      | answer        row attends to it

Then (`decode`) every step adds a column. Rows that have ended leave the batch.
"""

import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from jepa import PAD, TEXT, mask


class Answer(NamedTuple):
    ids: list[int]  # without the stop token
    stopped: bool  # the model ended it; otherwise the budget did


class Cache:
    """Keys and values (B, G, S, D) and positions (B, S) of the S columns so far; `Decoder.hidden` appends to it. There
    is room for a quarter more columns, so that a new token seldom copies all earlier ones. New columns of several rows
    may follow earlier ones of a single row, which then belong to each of them."""

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
    return logits.max(dim=-1).indices  # argmax takes three times as long on a CPU


def sampler(temperature, top_p, seed, names):
    """A function like `most_likely` that draws from softmax(logits / temperature), cut to the likeliest `top_p` of it.
    A draw depends on (seed, the prompt's number in `names`, step): not on the batch, nor on an earlier interruption."""

    def choose(logits, rows, step):
        logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)  # finite for any temperature
        share = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
        if top_p < 1:  # a token is kept if the likelier ones do not make up top_p without it
            ordered, order = share.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= max(top_p, 1e-30)] = 0
            share = torch.zeros_like(share).scatter(-1, order, ordered)
        heap = share.cumsum(dim=-1)  # (B, V); in the order of ids: sorting nearly equal shares would depend on rounding
        draw = [1 - np.random.default_rng([seed, names[row], step]).random() for row in rows]  # in (0, 1]
        target = torch.tensor(draw, device=heap.device, dtype=heap.dtype)[:, None] * heap[:, -1:]
        return (heap < target).sum(dim=-1)

    return choose


def states(decoder, rows, start, cache):
    """(states (B, T, C), which of all S columns are a row's own (B, S)) of rows of ids that go on at column `start` of
    a cache. Shorter rows are padded in front, and what a row consists of is seen as TEXT is."""
    device, width = decoder.embed.weight.device, max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    padding = torch.tensor([width - len(row) for row in rows], device=device)[:, None]  # (B, 1)
    column = torch.arange(start + width, device=device)
    own = (column < start) | (column >= start + padding)
    position = (column[start:] - padding).clamp(min=0)  # (B, T); that of padding means nothing
    seen = mask(torch.where(own, TEXT, PAD))[:, start:]  # (B, T, S)
    return decoder.hidden(ids, seen, position, cache), own


def prefill(decoder, prompts):
    """(state of each prompt's last token (B, C), which columns are a row's own (B, S), `Cache`)."""
    cache, shared = Cache(), 0  # tokens that all prompts begin with; one of each must remain to go on from
    if len(prompts) > 1:
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if shared:
        states(decoder, [prompts[0][:shared]], 0, cache)
    state, own = states(decoder, [prompt[shared:] for prompt in prompts], shared, cache)
    return state[:, -1], own, cache


@torch.no_grad()  # in inference mode autocast would cast all weights anew for each token
def decode(decoder, prompts, stop, max_new_tokens, choose=most_likely):
    """Continue each prompt: yields (index of the prompt, `Answer`), the shortest answer first. Rows that have met
    `stop` (an id, or several), or have filled the model's block_size, leave the batch and cost nothing more."""
    stops = {stop} if isinstance(stop, int) else stop
    room, device = decoder.config.block_size, decoder.embed.weight.device
    assert prompts and all(prompts), "every prompt needs at least one token"
    assert max(map(len, prompts)) <= room, "a prompt is longer than the model's block_size"
    state, own, cache = prefill(decoder, prompts)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]  # (B, 1)
    alive, answers = list(range(len(prompts))), [[] for _ in prompts]  # alive: which prompt each row belongs to
    for step in range(max_new_tokens):
        token = choose(decoder.logits(state), alive, step)  # (B,)
        going = []  # rows of the batch
        for row, (i, chosen) in enumerate(zip(alive, token.tolist(), strict=True)):
            if chosen not in stops:
                answers[i].append(chosen)
            full = len(prompts[i]) + len(answers[i]) > room
            if chosen in stops or full or step == max_new_tokens - 1:
                yield i, Answer(answers[i], chosen in stops)
            else:
                going.append(row)
        if not going:
            return
        if len(going) < len(alive):
            going = closed_up(going)
            alive, rows = [alive[row] for row in going], torch.tensor(going, device=device)
            token, length, own = token[rows], length[rows], own[rows]
            cache.keep(rows)
        own = F.pad(own, (0, 1), value=True)  # the column of the new token
        state = decoder.hidden(token[:, None], own[:, None], length + step, cache)[:, -1]


def closed_up(rows):
    """These rows in an order in which most stay where they are, and the last ones fill the places that are free.

    >>> closed_up([0, 2, 4, 5])
    [0, 5, 2, 4]
    """
    last, stay = [row for row in rows if row >= len(rows)], set(rows)
    return [row if row in stay else last.pop() for row in range(len(rows))]


def in_batches(decoder, prompts, stop, max_new_tokens, batch_size, choose=most_likely):
    """`decode` over many prompts, longest first (so that a lack of memory shows at once), yielding (index, Answer)."""
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chunk = by_length[start : start + batch_size]
        here = lambda logits, rows, step, chunk=chunk: choose(logits, [chunk[row] for row in rows], step)  # noqa: E731
        for row, answer in decode(decoder, [prompts[i] for i in chunk], stop, max_new_tokens, here):
            yield chunk[row], answer


@torch.no_grad()
def log_likelihoods(decoder, prompt, choices):
    """log P(choice | prompt) for each choice, summed over its tokens, in nats: a list of numbers."""
    cache, width = Cache(), max(map(len, choices))
    if len(prompt) > 1:
        states(decoder, [prompt[:-1]], 0, cache)
    rows = [[prompt[-1], *tokens[:-1], *[0] * (width - len(tokens))] for tokens in choices]  # padded behind the end
    found, device = states(decoder, rows, len(prompt) - 1, cache)[0], decoder.embed.weight.device.type
    with torch.autocast(device, enabled=False):  # in bfloat16 too many would be equal
        logits = decoder.logits(found.float())  # (choices, width, V)
    found = torch.log_softmax(logits.float(), dim=-1)
    return [found[i, range(len(tokens)), tokens].sum().item() for i, tokens in enumerate(choices)]
