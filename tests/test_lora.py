"""LoRA: what is trained, what merging and saving keep, and that PEFT and this code read each other's adapters."""

import copy
import json
import re

import pytest
import torch
from conftest import toy_decoder
from safetensors.torch import load_file, save_file
from test_weights import CASES, distance, reference

from hf import lora, weights
from jepa import LLMJEPA
from support.cli import UserError

IDS = torch.arange(1, 11)[None]
CAUSAL = torch.ones(1, 10, 10, dtype=torch.bool).tril()


def logits(decoder):
    with torch.no_grad():
        return decoder.logits(decoder.hidden(IDS, CAUSAL, torch.arange(10)[None]))


def state(decoder):
    """The adapters' tensors by name."""
    return {f"{path}.{kind}": getattr(layer, kind) for path, layer in lora.adapted_layers(decoder).items()
            for kind in "ab"}


def randomise(decoder):
    with torch.no_grad():
        for tensor in state(decoder).values():
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
    assert trained == {"pred"} | {f"decoder.{name}" for name in state(decoder)}
    assert len(state(decoder)) == 2 * matrices


def test_a_step_changes_adapters_alone(decoder):
    lora.add(decoder, 4)
    randomise(decoder)
    before = copy.deepcopy(decoder.state_dict())
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    decoder.logits(decoder.hidden(IDS, CAUSAL, torch.arange(10)[None])).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(state(decoder))


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


# Adapters on disk


def test_saved_adapters_are_small_and_load(decoder, tmp_path):
    base = copy.deepcopy(decoder)
    lora.add(decoder, 4, alpha=3)
    randomise(decoder)
    lora.save(decoder, tmp_path, "org/base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert lora.base_of(tmp_path) == "org/base"
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    own = sum(tensor.numel() for tensor in state(decoder).values())
    assert saved == own if decoder.config.gated else own < saved < 2 * own  # GPT-2's zeros
    lora.load(base, tmp_path)
    assert torch.equal(logits(base), logits(decoder))
    assert all(torch.equal(tensor, state(decoder)[name]) for name, tensor in state(base).items())
    assert {name for name, p in base.named_parameters() if p.requires_grad} == set(state(base))


def test_new_adapters_come_back_as_they_were(decoder, tmp_path):
    """B is zero: nothing in it tells GPT-2's three adapters apart."""
    base = copy.deepcopy(decoder)
    lora.add(decoder, 4, alpha=3)
    lora.save(decoder, tmp_path, tmp_path)
    assert lora.base_of(tmp_path) == str(tmp_path.resolve())
    lora.load(base, tmp_path, dropout=0.1)
    assert all(torch.equal(tensor, state(decoder)[name]) for name, tensor in state(base).items())
    assert {(layer.scale, layer.dropout) for layer in lora.adapted_layers(base).values()} == {(0.75, 0.1)}


@pytest.fixture(params=CASES)
def family(request, tmp_path):
    """(reference model of `transformers`, its folder)"""
    reference(request.param).save_pretrained(tmp_path / "base")
    return copy.deepcopy(reference(request.param)), tmp_path / "base"


def test_peft_loads_our_adapters(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, folder = family
    decoder = weights.load(folder)
    lora.add(decoder, 3, alpha=5)
    randomise(decoder)
    assert distance(decoder, model) > 1e-3
    lora.save(decoder, tmp_path / "adapters", folder)
    assert distance(decoder, peft.PeftModel.from_pretrained(model, tmp_path / "adapters").get_base_model()) < 1e-5


SETTINGS = {
    "all": dict(target_modules="all-linear"),
    "default": dict(),  # for most families: q_proj and v_proj
    "patterns": dict(target_modules="all-linear", rank_pattern={"layers.1.mlp.down_proj": 6, "c_attn": 9},
                     alpha_pattern={"k_proj": 7, "c_attn": 4, "fc1": 2}),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys", "ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("settings", SETTINGS)
def test_we_load_pefts_adapters(family, settings, tmp_path):
    peft = pytest.importorskip("peft")
    model, folder = family
    settings = SETTINGS[settings] or {"target_modules": None}
    if model.config.model_type in ("olmo2", "gemma3_text", "qwen3") and not settings["target_modules"]:
        settings = {"target_modules": ["q_proj", "v_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.04 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapters")
    decoder = weights.load(folder)
    lora.load(decoder, tmp_path / "adapters")
    assert distance(decoder, adapted.get_base_model()) < 1e-5
    assert distance(decoder, weights.load(folder)) > 1e-3
    lora.save(decoder, tmp_path / "again", folder)  # and back, by way of our format
    again = weights.load(folder)
    lora.load(again, tmp_path / "again")
    assert distance(decoder, again) < 1e-6


@pytest.mark.parametrize("style, changes", [("gpt2", {}), ("llama", {"n_kv_head": 4})])
def test_adapters_of_another_model_are_refused_and_change_nothing(style, changes, tmp_path):
    decoder, other = toy_decoder("llama"), toy_decoder(style, **changes)
    lora.add(other, 4)
    randomise(other)
    lora.save(other, tmp_path, "other")
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(UserError, match="adapter_model.safetensors: .*(another model|no place)") as caught:
        lora.load(decoder, tmp_path)
    assert "\n" not in str(caught.value)
    assert decoder.state_dict().keys() == before.keys() and all(p.requires_grad for p in decoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / lora.TENSORS)
    change(tensors)
    save_file(tensors, folder / lora.TENSORS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS = {  # what breaks the folder, and what the message must say
    "no config": (lambda f: (f / lora.CONFIG).unlink(), "adapter_config.json: no such file"),
    "no tensors": (lambda f: (f / lora.TENSORS).unlink(), "safetensors: missing"),
    "truncated": (lambda f: (f / lora.TENSORS).write_bytes((f / lora.TENSORS).read_bytes()[:-9]), "damaged"),
    "a pickle": (lambda f: torch.save({}, f / lora.TENSORS), "not a safetensors file"),
    "half an adapter": (lambda f: edit_tensors(f, lambda t: t.pop(FIRST)), "layers.0.self_attn.q_proj needs lora_A"),
    "none where one must be": (lambda f: edit_tensors(f, lambda t: [t.pop(n) for n in list(t) if "0.mlp.up" in n]),
                               "layers.0.mlp.up_proj needs lora_A"),
    "more": (lambda f: edit_tensors(f, lambda t: t.update({"lm_head.lora_A.weight": torch.ones(2)})), "no place"),
    "another rank": (lambda f: edit(f, r=5), "do not fit their adapter_config"),
    "a huge rank": (lambda f: edit(f, r=10**400), "r = "),
    "another method": (lambda f: edit(f, peft_type="LOHA"), "only LORA"),
    "biases": (lambda f: edit(f, bias="all"), "without biases"),
    "another scale": (lambda f: edit(f, use_rslora=True), "use_rslora"),
    "a changed base": (lambda f: edit(f, init_lora_weights="pissa_niter_16"), "changes the base model"),
    "another base": (lambda f: edit(f, revision="v1.1"), "revision names another version"),
    "dora": (lambda f: edit(f, use_dora=True), "use_dora"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "some layers": (lambda f: edit(f, layers_to_transform=[1]), "layers_to_transform"),
    "an expression": (lambda f: edit(f, alpha_pattern={"(a+)+$": 2.0}), "not regular expressions"),
    "targets by expression": (lambda f: edit(f, target_modules=".*"), "target_modules"),
    "never heard of": (lambda f: edit(f, velocity=3), "velocity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_files_of_adapters(name, tmp_path):
    decoder = toy_decoder("llama")
    lora.add(decoder, 4)
    lora.save(decoder, tmp_path, "base")
    harm, match = BAD_ADAPTERS[name]
    harm(tmp_path)
    with pytest.raises(UserError, match=match) as caught:
        lora.load(toy_decoder("llama"), tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_dropout_is_in_front_of_the_adapter_alone(decoder, tmp_path):
    """While B is zero, dropout changes nothing."""
    batch = torch.arange(1, 11)[None]
    before = decoder(batch)
    lora.add(decoder, 4, dropout=0.5)
    assert decoder.training and torch.equal(decoder(batch), before)
    a = torch.cat([layer.a.flatten() * layer.base.in_features**0.5 for layer in lora.adapted_layers(decoder).values()])
    assert a.std().item() == pytest.approx(1, abs=0.1)
    lora.save(decoder, tmp_path, "base")
    assert json.loads((tmp_path / lora.CONFIG).read_text())["lora_dropout"] == 0.5
