"""The cost formula against torch's own counter; no timing is asserted."""

from argparse import Namespace

import pytest
import torch
from conftest import STYLES, toy_decoder

import data
from experiments import bench
from jepa import LLMJEPA, PAD, TEXT, Batch


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", bench.KINDS)
def test_the_formula_is_what_torch_counts(style, kind, examples):
    model = LLMJEPA(toy_decoder(style), 2)
    batch = data.collate(examples, 2, **bench.KINDS[kind])
    assert bench.step_flops(model.decoder.config, batch) == bench.counted_flops(model, batch)


def test_fused_is_the_cheapest_way_to_all_three_views(examples):
    """Per example, in columns: plain n, fused n + k + c, paper n + (t + k + c); separate passes the same as paper."""
    k, e = 2, max(examples, key=lambda e: len(e.full))
    n, t, c = len(e.full), len(e.text), len(e.code)
    columns = {kind: data.collate([e], k, **how).segment for kind, how in bench.KINDS.items()}
    used = {kind: (segment != PAD).sum().item() for kind, segment in columns.items()}
    assert list(used.values()) == [n, n + k + c, n + t + k + c]
    decoder = toy_decoder("llama")
    cost = {kind: bench.step_flops(decoder.config, data.collate([e], k, **how)) for kind, how in bench.KINDS.items()}
    assert cost["plain fine-tuning"] < cost["LLM-JEPA, fused"] < cost["LLM-JEPA, paper"]


def test_separate_passes_cost_what_the_readme_says(examples):
    """A pass for each of conversation, Text with [PRED], Code: the formula, counted; in tokens the same as paper."""
    model, e, k = LLMJEPA(toy_decoder("llama"), 2), examples[1], 2
    tokens = 0
    for ids in (e.full, e.text + [-1, -2], e.code):
        row, nowhere = torch.tensor([ids]), torch.zeros(0, 2, dtype=torch.long)
        position = torch.arange(len(ids))[None]
        batch = Batch(row, torch.full_like(row, TEXT), position, nowhere, nowhere[:, 0], nowhere, nowhere)
        with bench.FlopCounterMode(display=False) as counter, bench.sdpa_kernel(bench.SDPBackend.MATH):
            model.hidden(batch).sum().backward()
        assert bench.step_flops(model.decoder.config, batch) == counter.get_total_flops()
        tokens += len(ids)
    paper = data.collate([e], k, "paper")
    assert tokens == (paper.segment != PAD).sum() == len(e.full) + len(e.text) + k + len(e.code)


def test_every_way_of_decoding_is_timed_on_the_same_prompts(examples):
    """Three rows in four turns: each is decoded once by either slow way, all four prompts in every turn by the fast."""
    decoder, prompts = toy_decoder("llama"), [e.full for e in examples]
    found = bench.time_decoding(decoder, prompts, -1, Namespace(rows=3, new_tokens=6, decode_batch=2))
    naive, cached, batched = (answers for _, answers in found.values())
    expected = [bench.one_by_one(decoder, prompt, -1, 6) for prompt in prompts]
    assert naive == cached == expected[:3] and batched == expected * 4


def test_the_naive_loop_is_the_same_text(examples):
    decoder = toy_decoder("llama")
    with torch.no_grad():
        for e in examples:
            (_, answer), = bench.generate.decode(decoder, [e.full], -1, 6)
            assert bench.one_by_one(decoder, e.full, -1, 6) == answer.ids
