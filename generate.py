"""Batched greedy decoding with a key/value cache. In: a decoder and prompts (lists of ids). Out: answers (likewise).

Prompts of different lengths are padded on the *left*, so that every row's next token lands in the same column. The mask
of the prompt is jepa.mask, the same rule as in training: TEXT sees TEXT, PAD sees PAD. Read next: `eval.py`.
"""

from typing import NamedTuple

import torch

from jepa import PAD, TEXT, mask


class Answer(NamedTuple):
    ids: list[int]  # without the stop token
    stopped: bool  # the model ended it; otherwise the budget did


class Cache:
    """Keys, values and positions of the columns so far; `Decoder.hidden` appends to it. All (B, G, S, D) and (B, S)."""

    def __init__(self):
        self.keys, self.values, self.position = {}, {}, None

    def extend(self, position):
        """Add the positions of new columns, (B, T); returns those of all columns, (B, S)."""
        self.position = position if self.position is None else torch.cat([self.position, position], dim=1)
        return self.position

    def append(self, layer, key, value):
        """Add a layer's new keys and values, (B, G, T, D); returns all of that layer's, (B, G, S, D)."""
        if layer in self.keys:
            key, value = torch.cat([self.keys[layer], key], dim=2), torch.cat([self.values[layer], value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def keep(self, rows):
        """Drop all rows but these."""
        self.position = self.position[rows]
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]


@torch.inference_mode()
def greedy(decoder, prompts, stop, max_new_tokens):
    """The most likely continuation of each prompt: a list of `Answer`, in the order of the prompts.

    Rows that have met `stop`, or have filled the model's block_size, leave the batch and cost nothing more.
    """
    assert prompts and all(prompts), "every prompt needs at least one token"
    assert max(map(len, prompts)) <= decoder.config.block_size, "a prompt is longer than the model's block_size"
    device, width = decoder.embed.weight.device, max(map(len, prompts))
    gap = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]  # (B, 1) columns of padding
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, width)
    column = torch.arange(width, device=device)
    segment = torch.where(column < gap, PAD, TEXT)  # (B, width)
    cache = Cache()
    hidden = decoder.hidden(ids, mask(segment), (column - gap).clamp(min=0), cache)

    answers, stopped = [[] for _ in prompts], [False] * len(prompts)
    alive = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    for step in range(max_new_tokens):
        token = decoder.logits(hidden[:, -1]).argmax(dim=-1)  # (B,)
        going = []
        for row, (prompt, choice) in enumerate(zip(alive, token.tolist(), strict=True)):
            stopped[prompt] = choice == stop
            if not stopped[prompt]:
                answers[prompt].append(choice)
                if len(prompts[prompt]) + len(answers[prompt]) <= decoder.config.block_size:
                    going.append(row)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            alive = [alive[row] for row in going]
            token, segment, gap = token[going], segment[going], gap[going]
            cache.keep(torch.tensor(going, device=device))
        segment = torch.cat([segment, torch.full_like(gap, TEXT)], dim=1)
        seen = (segment == TEXT)[:, None, :]  # (B, 1, S): the new token sees its prompt and its answer so far
        hidden = decoder.hidden(token[:, None], seen, width + step - gap, cache)
    return [Answer(*answer) for answer in zip(answers, stopped, strict=True)]


def in_batches(decoder, prompts, stop, max_new_tokens, batch_size):
    """`greedy` over many prompts, longest first (so that a lack of memory shows at once), yielding (index, Answer)."""
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chunk = by_length[start : start + batch_size]
        yield from zip(chunk, greedy(decoder, [prompts[i] for i in chunk], stop, max_new_tokens), strict=True)
