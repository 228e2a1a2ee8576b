"""Batched, cached decoding against the naive loop: one prompt, no cache, the whole row again for each token."""

import pytest
import torch
from conftest import STYLES, toy_decoder

import generate
from jepa import mask


@torch.no_grad()
def naive(decoder, prompt, stop, budget):
    ids = list(prompt)
    for _ in range(budget):
        row, position = torch.tensor([ids]), torch.arange(len(ids))[None]
        hidden = decoder.hidden(row, mask(torch.zeros_like(row)), position)
        choice = decoder.logits(hidden[0, -1]).argmax().item()
        if choice == stop:
            return ids[len(prompt) :], True
        ids.append(choice)
        if len(ids) > decoder.config.block_size:
            break
    return ids[len(prompt) :], False


def prompts(*lengths):
    torch.manual_seed(3)
    return [torch.randint(0, 50, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("style", STYLES)
def test_batched_and_cached_equals_naive(style):
    decoder = toy_decoder(style)
    ragged = prompts(3, 11, 1, 7, 7, 2)
    free = [naive(decoder, p, -1, 12)[0] for p in ragged]
    stop = free[1][4]  # a token that at least one row meets in mid-answer, and others may not
    expected = [naive(decoder, p, stop, 12) for p in ragged]
    assert len({len(ids) for ids, _ in expected}) > 1, "the rows must end at different times"
    assert generate.greedy(decoder, ragged, stop, 12) == expected


def test_the_order_of_the_prompts_is_kept_over_batches(decoder):
    ragged = prompts(5, 1, 9, 4, 2, 8, 3)
    found = dict(generate.in_batches(decoder, ragged, stop=-1, max_new_tokens=5, batch_size=3))
    assert [found[i] for i in range(7)] == [naive(decoder, p, -1, 5) for p in ragged]


def test_a_row_ends_where_the_models_positions_end(decoder):
    """block_size is 64: the longer prompt fills up first, the other goes on."""
    ragged = prompts(60, 50)
    answers = generate.greedy(decoder, ragged, stop=-1, max_new_tokens=100)
    assert answers == [naive(decoder, p, -1, 100) for p in ragged]
    assert [len(answer.ids) for answer in answers] == [5, 15]


def test_the_budget_is_exact(decoder):
    for budget in (1, 2, 6):
        assert [len(a.ids) for a in generate.greedy(decoder, prompts(4, 2), -1, budget)] == [budget, budget]
