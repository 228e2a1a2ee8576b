"""Our losses and gradients against those of the official LLM-JEPA code, on the same token ids and weights.

tests/oracle/official.json holds what class RepresentationTrainer of the official code computes in fp32 for 8 rows of
NL-RX-SYNTH on the tiny random Llama in tests/oracle/model, with three separate rows per example and with its packed 4-D
mask. The paper layout here takes the same ids, so every figure must agree to 1e-5.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

import data
from hf import weights
from jepa import LLMJEPA

ORACLE = Path(__file__).parent / "oracle"
TRUTH = json.loads((ORACLE / "official.json").read_text())
STOP = 4  # <|eot_id|>, at the end of every view; the state before it is read
# Hugging Face's names for our parameters, as weights.py has them, written out once more.
NAMES = {"embed_tokens": "embed", "layers": "blocks", "self_attn": "attn", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "mlp_norm", "lm_head": "head"}


@cache
def oracle_decoder():
    return weights.load(ORACLE / "model")


def examples_of(case):
    """The oracle's rows as `Example`s, and the ids of its predictor tokens in reading order."""
    predictors = set(TRUTH["predictor_ids"].values())
    examples, order = [], []
    for view in TRUTH["views"][case["views"]]:
        text, code = view["user"], view["assistant"]
        if case["order"] == "reverse_pred":  # there the official code swaps the two
            text, code = code, text
        assert text[-1] == code[-1] == STOP
        with_pred = code if case["order"] == "reverse_pred" else text
        order = [i for i in with_pred if i in predictors]
        start = next((n for n, i in enumerate(text) if i in predictors), 0)
        text, code = ([i for i in ids[:-1] if i not in predictors] for ids in (text, code))
        trained = [label != -100 for label in view[f"labels_{case['labels']}"]]
        end = len(view["full"]) // 2  # anywhere: in the paper layout TEXT and ANSWER are one causal row
        examples.append(data.Example(view["full"], trained, end, text, code, text_start=start))
    return examples, order


def measured(case):
    """What we compute for a case, under the oracle's names; once for its packed and its separate variant."""
    return compute(json.dumps({name: case[name] for name in ("views", "k", "order", "distance", "labels")}))


@cache
def compute(setting):
    case = json.loads(setting)
    examples, order = examples_of(case)
    model = LLMJEPA(oracle_decoder(), case["k"])
    assert len(order) == case["k"]
    with torch.no_grad():
        model.pred.copy_(model.decoder.embed.weight[order])
    batch = data.collate(examples, case["k"], "paper", front_pred=case["order"] == "front_pred",
                         reverse=case["order"] == "reverse_pred")
    found = {}
    for term in ("jepa", "total"):
        model.zero_grad()
        losses = model(batch, TRUTH["lam"], case["distance"], TRUTH["gamma"])
        getattr(losses, term).backward()
        squares = {name: p.grad.double().square().sum().item() for name, p in model.named_parameters()
                   if p.grad is not None}
        found[f"grad_norm_{term}"] = math.sqrt(sum(squares.values()))
        found[term] = getattr(losses, term).item()
    squares["decoder.embed.weight"] += squares.pop("pred", 0.0)  # the official predictors are rows of the embedding
    found["lm"] = losses.lm.item()
    return found, {name: math.sqrt(square) for name, square in squares.items()}


def our_name(theirs):
    parts = theirs.removeprefix("model.").split(".")
    return ".".join(["decoder"] + [NAMES.get(part, part) for part in parts])


def test_all_cases_are_there():
    cases = TRUTH["cases"]
    assert len(cases) == 68
    assert {c["order"] for c in cases} == {"base", "front_pred", "reverse_pred"}
    assert {c["distance"] for c in cases} == {"cosine", "l2", "mse", "infonce"}
    assert {c["labels"] for c in cases} == {"official", "assistant_only"}
    assert {c["packed_mask"] for c in cases} == {True, False} and {c["k"] for c in cases} == {0, 1, 2}


@pytest.mark.parametrize("case", TRUTH["cases"], ids=lambda c: "-".join(
    [c["views"], c["distance"], c["labels"], "packed" if c["packed_mask"] else "separate"]))
def test_equals_the_official_code(case):
    found, norms = measured(case)
    for name, value in found.items():
        assert value == pytest.approx(case[name], rel=1e-5), name
    assert {our_name(theirs) for theirs in case["param_grad_norm_total"]} == set(norms)
    for theirs, value in case["param_grad_norm_total"].items():
        assert norms[our_name(theirs)] == pytest.approx(value, rel=1e-5), theirs


def test_a_wrong_order_of_predictors_would_be_seen():
    """The tolerance is tight enough: two [PRED] vectors swapped, or one label more, change the figures by more."""
    case = next(c for c in TRUTH["cases"] if c["views"] == "k2/base" and c["distance"] == "cosine")
    examples, order = examples_of(case)
    model = LLMJEPA(oracle_decoder(), 2)
    with torch.no_grad():
        model.pred.copy_(model.decoder.embed.weight[order[::-1]])
        swapped = model(data.collate(examples, 2, "paper"), TRUTH["lam"])
    assert swapped.jepa.item() != pytest.approx(case["jepa"], rel=1e-4)
    assert swapped.lm.item() == pytest.approx(case["lm"], rel=1e-5)
