"""A real pretrained checkpoint, SmolLM2-135M-Instruct, in the folder that LLMJEPA_SMOLLM2 names."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import hf
from evaluation import generate
from hf import weights
from jepa import LLMJEPA, mask

FOLDER = os.environ.get("LLMJEPA_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not Path(FOLDER, "model.safetensors").exists(),
                                reason="LLMJEPA_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
PUBLISHED = os.environ.get("LLMJEPA_PUBLISHED")  # a folder with the published data, *.jsonl
PROMPTS = ["What is the capital of France?", "Write a haiku about the sea.", "def add(a, b):", "2 + 2 =",
           "Name three colours, separated by commas."]
QUERIES = [("How many singers are there?", "SELECT count(*) FROM singer"),
           ("List the names of all students.", "SELECT name FROM student"),
           ("What is the average age of dogs?", "SELECT avg(age) FROM dogs"),
           ("Which cities have an airport?", "SELECT DISTINCT city FROM airports")]


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return (transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(),
            transformers.AutoTokenizer.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def tokenizer():
    return hf.tokenizer(FOLDER)


@torch.inference_mode()
def logits_of(decoder, ids):
    hidden = decoder.hidden(ids, mask(torch.zeros_like(ids)), torch.arange(ids.shape[1]).expand_as(ids))
    return decoder.logits(hidden)


def test_logits_equal_transformers(reference, tokenizer):
    decoder = weights.load(FOLDER).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            wanted = reference[0](ids).logits
        assert (logits_of(decoder, ids) - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_greedy_text_equals_transformers(reference, tokenizer):
    """Five ragged prompts in one batch against `generate`, one at a time."""
    model, theirs = reference
    decoder, prompts, wanted = weights.load(FOLDER).eval(), [], []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": tokenizer.stop, "pad_token_id": 0}
        done = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **greedy)
        wanted.append(done[0, len(ids) :].tolist())
        answered = data.Conversation([*messages, {"role": "assistant", "content": "x"}], "x:1")
        e = data.example(answered, tokenizer)
        prompts.append(e.full[: e.answer_start])
        assert prompts[-1] == ids
    answers = dict(generate.decode(decoder, prompts, tokenizer.stop, 24))
    assert [answers[i].ids + [tokenizer.stop] * answers[i].stopped for i in range(len(prompts))] == wanted


def test_ids_equal_the_tokenizers_library(tokenizer):
    import tokenizers as library

    theirs = library.Tokenizer.from_file(str(Path(FOLDER, "tokenizer.json")))
    lines = ["naïve café", "日本語 🙂", "def f(x):\n    return x ** 2\n", "3.14159 1,000,000", " \t\n\n ", "", 99 * "a"]
    if PUBLISHED:
        rows = [line for path in sorted(Path(PUBLISHED).glob("*_test.jsonl")) for line in path.read_text().splitlines()]
        lines += [json.loads(row)["messages"][-2]["content"] for row in random.Random(0).sample(rows, 500)]
    for line in lines:
        assert tokenizer.encode(line) == theirs.encode(line, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_three_steps_lower_both_losses_and_the_export_loads(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = []
    for question, query in QUERIES:
        said = {"system": "Convert natural language to SQL.", "user": question, "assistant": query}
        rows.append([{"role": role, "content": content} for role, content in said.items()])
    examples = [data.example(data.Conversation(messages, "x:1"), tokenizer) for messages in rows]
    torch.manual_seed(0)
    model, batch = LLMJEPA(weights.load(FOLDER), 1), data.collate(examples, 1)
    vocabulary = model.decoder.embed.weight.shape
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=2e-5), []
    for _ in range(4):
        losses = model(batch, lam=2.0)
        seen.append([loss.item() for loss in losses])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert all(last < first for first, last in zip(seen[0], seen[3], strict=True)), seen
    weights.save(model.decoder, tmp_path / "out", FOLDER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([examples[0].full])
    with torch.inference_mode():
        wanted = theirs(ids).logits
    assert theirs.get_input_embeddings().weight.shape == vocabulary
    assert_close(logits_of(model.decoder.eval(), ids), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
