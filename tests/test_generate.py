"""Batched, cached decoding against the naive loop: one prompt, no cache, the whole row again for each token."""

import doctest

import numpy as np
import pytest
import torch
from conftest import STYLES, toy_decoder

from evaluation import generate
from jepa import mask


@pytest.fixture(params=[*STYLES, "window"])
def decoder(request):
    """As everywhere; besides, one whose first layer sees only the latest four positions, so that those are held too."""
    if request.param == "window":
        return toy_decoder("llama", window=4, windowed=(True, False))
    return toy_decoder(request.param)


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


def decode(decoder, prompts, stop, budget, **options):
    found = dict(generate.decode(decoder, prompts, stop, budget, **options))
    return [found[i] for i in range(len(prompts))]


def prompts(*lengths):
    torch.manual_seed(3)
    return [torch.randint(0, 50, (n,)).tolist() for n in lengths]


def test_docstring_examples():
    assert doctest.testmod(generate) == (0, 1)


def test_batched_and_cached_equals_naive(decoder):
    ragged = prompts(3, 11, 1, 7, 7, 2)
    free = [naive(decoder, p, -1, 12)[0] for p in ragged]
    stop = free[1][4]  # a token that at least one row meets in mid-answer, and others may not
    expected = [naive(decoder, p, stop, 12) for p in ragged]
    assert len({len(ids) for ids, _ in expected}) > 1, "the rows must end at different times"
    assert decode(decoder, ragged, stop, 12) == expected
    both = {stop, free[0][3]}  # of several, the first that is met
    cut = [next((i for i, token in enumerate(ids) if token in both), 12) for ids in free]
    assert decode(decoder, ragged, both, 12) == [(ids[:end], end < 12) for ids, end in zip(free, cut, strict=True)]


def test_a_shared_beginning_is_computed_once(decoder):
    """The same text, and nothing of it computed twice; one prompt is a beginning of another."""
    head, *tails = prompts(9, 1, 6, 1, 4)
    ragged = [head + tail for tail in tails] + [head + tails[1][:2]]
    computed, hidden = [], decoder.hidden
    decoder.hidden = lambda ids, *rest: computed.append(ids.numel()) or hidden(ids, *rest)
    answers = decode(decoder, ragged, -1, 6)
    decoder.hidden = hidden
    assert answers == [naive(decoder, p, -1, 6) for p in ragged]
    assert computed == [9, 5 * 6] + [5] * 5, "the beginning; then the rest of all, as wide as the longest; then tokens"
    same = [ragged[0]] * 3  # one token of each must remain
    assert decode(decoder, same, -1, 6) == [naive(decoder, p, -1, 6) for p in same]


def test_rows_leave_in_any_order(decoder):
    """Every token of the free answers is tried as the stop token: rows end first, last, in the middle, all at once."""
    ragged = prompts(4, 9, 2, 6, 3)
    for stop in {token for p in ragged for token in naive(decoder, p, -1, 8)[0]}:
        assert decode(decoder, ragged, stop, 8) == [naive(decoder, p, stop, 8) for p in ragged]


def test_the_cache_grows(decoder):
    """One column at a time: the cache outgrows its tensors many times."""
    cache, ids = generate.Cache(), prompts(40)[0]
    whole = decoder.hidden(torch.tensor([ids]), mask(torch.zeros(1, 40).long()), torch.arange(40)[None])
    found = []
    for i, token in enumerate(ids):
        seen = torch.ones(1, 1, i + 1, dtype=torch.bool)
        found.append(decoder.hidden(torch.tensor([[token]]), seen, torch.tensor([[i]]), cache))
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_prompts_is_kept_over_batches(decoder):
    ragged = prompts(5, 1, 9, 4, 2, 8, 3)
    found = dict(generate.in_batches(decoder, ragged, stop=-1, max_new_tokens=5, batch_size=3))
    assert [found[i] for i in range(7)] == [naive(decoder, p, -1, 5) for p in ragged]


def test_a_row_ends_where_the_models_positions_end(decoder):
    """block_size is 64: the longer prompt fills up first, the other goes on."""
    ragged = prompts(60, 50)
    answers = decode(decoder, ragged, -1, 100)
    assert answers == [naive(decoder, p, -1, 100) for p in ragged]
    assert [len(answer.ids) for answer in answers] == [5, 15]


def test_the_budget_is_exact(decoder):
    for budget in (1, 2, 6):
        assert [len(a.ids) for a in decode(decoder, prompts(4, 2), -1, budget)] == [budget, budget]


def test_samples_do_not_depend_on_the_batch(decoder):
    ragged = prompts(5, 1, 9, 4, 2, 8, 3)
    choose = generate.sampler(temperature=1.5, top_p=0.9, seed=4, names=list(range(7)))
    runs = [dict(generate.in_batches(decoder, ragged, -1, 6, size, choose)) for size in (7, 2)]
    assert runs[0] == runs[1]
    other = generate.sampler(temperature=1.5, top_p=0.9, seed=5, names=list(range(7)))
    assert dict(generate.in_batches(decoder, ragged, -1, 6, 7, other)) != runs[0]


def test_samples_follow_the_distribution_cut_to_top_p():
    """Shares .5 .3 .15 .05: with top_p 0.7 the first two remain, as 5 to 3; nearly cold, only the first."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    rows = list(range(4000))

    def counts(temperature, top_p):
        choose = generate.sampler(temperature, top_p, seed=0, names=rows)
        return np.bincount(choose(logits.expand(4000, 4), rows, step=0).numpy(), minlength=4) / 4000

    assert np.abs(counts(1.0, 1.0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(counts(1.0, 0.7) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert counts(1.0, 1e-46).tolist() == [1, 0, 0, 0]
    logits = logits.flip(-1)  # or what NaN gives, token 0, would be right
    for temperature in (0.01, 1e-40, 1e-300):
        assert counts(temperature, 1.0).tolist() == [0, 0, 0, 1]
    assert counts(1.0, 1e-46).tolist() == [0, 0, 0, 1]


def test_log_likelihoods_equal_each_choice_alone(decoder):
    prompt, *choices = prompts(6, 1, 4, 2)
    found = generate.log_likelihoods(decoder, prompt, choices)
    for choice, value in zip(choices, found, strict=True):
        row = torch.tensor([prompt + choice])
        position = torch.arange(row.shape[1])[None]
        with torch.no_grad():
            logits = decoder.logits(decoder.hidden(row, mask(torch.zeros_like(row)), position))[0].log_softmax(-1)
        alone = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice))
        assert value == pytest.approx(alone, abs=1e-4)


def test_a_sample_is_drawn_anew_at_each_step():
    choose = generate.sampler(1.0, 1.0, seed=0, names=list(range(50)))
    drawn = [choose(torch.zeros(50, 9), list(range(50)), step).tolist() for step in (0, 1)]
    assert drawn[0] != drawn[1]


def test_a_prompt_that_fills_the_model_gets_one_token(decoder):
    (_, answer), = generate.decode(decoder, [[1] * 64], -1, 9)
    assert len(answer.ids) == 1 and not answer.stopped


def test_the_longest_prompts_come_first(decoder, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "decode", lambda decoder, prompts, *_: asked.extend(map(len, prompts)) or ())
    list(generate.in_batches(decoder, [[1] * n for n in (2, 5, 1, 4)], -1, 1, batch_size=2))
    assert asked == [5, 4, 2, 1]


def test_autocast_casts_a_weight_once_and_not_for_each_token(decoder):
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(record_shapes=True) as seen:
        answers = [answer.ids for _, answer in generate.decode(decoder, prompts, stop=-1, max_new_tokens=6)]
    up = decoder.blocks[0].mlp.up_proj.weight
    casts = [each for each in seen.events() if each.name == "aten::_to_copy" and each.input_shapes[0] == [*up.shape]]
    matrices = [p for block in decoder.blocks for p in block.mlp.parameters() if p.shape == up.shape]
    assert len(casts) == len(matrices) and [len(ids) for ids in answers] == [6, 6]
