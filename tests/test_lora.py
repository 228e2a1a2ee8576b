"""LoRA: what is trained, what merging and saving keep."""

import copy
import re

import pytest
import torch
from conftest import toy_decoder
from safetensors.torch import load_file, save_file

from hf import lora, weights
from jepa import LLMJEPA
from support.cli import UserError

IDS = torch.arange(1, 11)[None]
CAUSAL = torch.ones(1, 10, 10, dtype=torch.bool).tril()


def logits(decoder):
    with torch.no_grad():
        return decoder.logits(decoder.hidden(IDS, CAUSAL, torch.arange(10)[None]))


def randomise(decoder):
    with torch.no_grad():
        for tensor in lora.state(decoder).values():
            tensor.copy_(0.04 * torch.randn(tensor.shape))


def projections(decoder):
    """{name: weight} of every matrix in attention and MLP, found by shape of name rather than by lora.PROJECTIONS."""
    return {name: p for name, p in decoder.named_parameters() if re.search(r"_proj(\.base)?\.weight$", name)}


def test_new_adapters_change_nothing(decoder):
    before = logits(decoder)
    lora.add(decoder, 4)
    assert torch.equal(logits(decoder), before)


def test_only_adapters_and_pred_are_trained(decoder):
    matrices = len(projections(decoder))
    assert matrices == 2 * (7 if decoder.config.gated else 6)
    model = LLMJEPA(decoder, 2)
    lora.add(decoder, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"pred"} | {f"decoder.{name}" for name in lora.state(decoder)}
    assert len(lora.state(decoder)) == 2 * matrices


def test_a_step_changes_adapters_alone(decoder):
    lora.add(decoder, 4)
    randomise(decoder)
    before = copy.deepcopy(decoder.state_dict())
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    decoder.logits(decoder.hidden(IDS, CAUSAL, torch.arange(10)[None])).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(lora.state(decoder))


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (8, 2.0)])
def test_adapted_layer_is_the_formula(alpha, scale):
    decoder = toy_decoder("gpt2")
    lora.add(decoder, 4, alpha)
    randomise(decoder)
    layer, x = decoder.blocks[1].mlp.up_proj, torch.randn(3, 32)
    expected = x @ (layer.base.weight + scale * layer.b @ layer.a).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


def test_merged_equals_unmerged_and_exports(decoder, tmp_path):
    names, plain = list(decoder.state_dict()), logits(decoder)
    lora.add(decoder, 4, alpha=8)
    randomise(decoder)
    unmerged = logits(decoder)
    assert (unmerged - plain).abs().max() > 0.1
    with pytest.raises(AssertionError, match="merge"):
        weights.save(decoder, tmp_path)
    lora.merge(decoder)
    torch.testing.assert_close(logits(decoder), unmerged, atol=1e-5, rtol=1e-5)
    assert list(decoder.state_dict()) == names and all(p.requires_grad for p in decoder.parameters())
    weights.save(decoder, tmp_path)
    assert torch.equal(logits(weights.load(tmp_path)), logits(decoder))


def test_dropout_only_in_training():
    decoder = toy_decoder("llama")
    lora.add(decoder, 4, dropout=0.5)
    randomise(decoder)
    decoder.eval()
    evaluated = logits(decoder)
    assert torch.equal(logits(decoder), evaluated)
    decoder.train()
    assert not torch.equal(logits(decoder), evaluated)


def test_saved_adapters_are_small_and_load(decoder, tmp_path):
    base = copy.deepcopy(decoder)
    lora.add(decoder, 4, alpha=3)
    randomise(decoder)
    lora.save(decoder, tmp_path / "adapters.safetensors")
    assert load_file(tmp_path / "adapters.safetensors").keys() == lora.state(decoder).keys()
    lora.load(base, tmp_path / "adapters.safetensors")
    assert torch.equal(logits(base), logits(decoder))
    assert {name for name, p in base.named_parameters() if p.requires_grad} == set(lora.state(base))


@pytest.mark.parametrize("style, changes", [("gpt2", {}), ("llama", {"n_kv_head": 4})])
def test_adapters_of_another_model_are_refused_and_change_nothing(style, changes, tmp_path):
    path, decoder = tmp_path / "adapters.safetensors", toy_decoder("llama")
    other = toy_decoder(style, **changes)
    lora.add(other, 4)
    randomise(other)
    lora.save(other, path)
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(UserError, match="adapters.safetensors: blocks.0.*another model") as caught:
        lora.load(decoder, path)
    assert "\n" not in str(caught.value)
    assert decoder.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize("harm", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: torch.save({}, path),
    lambda path: save_file(load_file(path), path),  # without its metadata
    lambda path: save_file({"x": torch.zeros(2)}, path, metadata={"alpha": "4"}),
], ids=["missing", "truncated", "pickle", "no alpha", "other tensors"])  # fmt: skip
def test_bad_files_of_adapters(harm, tmp_path):
    path, decoder = tmp_path / "adapters.safetensors", toy_decoder("llama")
    lora.add(decoder, 4)
    lora.save(decoder, path)
    harm(path)
    with pytest.raises(UserError, match="adapters.safetensors: not a file of adapters"):
        lora.load(toy_decoder("llama"), path)
