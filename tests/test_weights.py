"""Parity with `transformers` for every family, on tiny models with every parameter random; then files that are bad."""

import dataclasses
import fnmatch
import gc
import json
import os
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import toy_decoder
from safetensors.torch import load_file, save_file

import data
import jepa
from hf import weights
from model import Config, Decoder
from support import cli
from support.cli import UserError

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
WIDE = dict(SIZES, head_dim=16)  # wider heads than hidden_size / heads
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA3 = dict(query_pre_attn_scalar=7, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING])
LINEAR = {FULL: dict(rope_type="linear", rope_theta=500.0, factor=4.0),
          SLIDING: dict(rope_type="default", rope_theta=50.0)}
CASES = {  # class of the model's config, and its fields
    "gpt2": ("GPT2Config", GPT2),
    "gpt2_variant": ("GPT2Config", dict(GPT2, n_inner=50, tie_word_embeddings=False, scale_attn_weights=False,
                                        activation_function="gelu")),
    "llama": ("LlamaConfig", dict(WIDE, rope_parameters=LLAMA3)),
    "llama_variant": ("LlamaConfig", dict(SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                                          rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0))),
    "mistral": ("MistralConfig", dict(SIZES, sliding_window=5)),
    "qwen2": ("Qwen2Config", dict(SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(WIDE, attention_bias=True)),
    "olmo2": ("Olmo2Config", SIZES),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", dict(WIDE, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=2.0,
                                    final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3TextConfig", dict(WIDE, rope_parameters=LINEAR, **GEMMA3)),
    "phi": ("PhiConfig", SIZES),
    "phi_variant": ("PhiConfig", dict(SIZES, qk_layernorm=True, num_key_value_heads=None)),
}


@cache
def reference(case):
    """A Hugging Face model with every parameter drawn at random; eager attention is the one that knows soft caps."""
    name, fields = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.dim() == 1 else 0.25))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """The case as Hugging Face saves it."""
    path = tmp_path_factory.mktemp(case)
    reference(case).save_pretrained(path)
    return path


def theirs(model, ids):
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state, model(ids).logits


def ours(decoder, ids):
    T = ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(len(ids), T, T)
    with torch.no_grad():
        hidden = decoder.hidden(ids, causal, torch.arange(T).expand(ids.shape))
        return hidden, decoder.logits(hidden)


def distance(decoder, model, T=24):
    """Largest difference between two models' states or logits; T is longer than any window above."""
    ids = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(4))
    found = ours(model, ids) if isinstance(model, Decoder) else theirs(model, ids)
    return max((a - b).abs().max().item() for a, b in zip(ours(decoder, ids), found, strict=True))


def edit(folder, remove=(), **changes):
    """Change fields of a folder's config.json."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in remove}))


# Parity


def test_states_and_logits_equal_transformers(case, folder):
    decoder = weights.load(folder)
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())
    assert theirs(reference(case), torch.arange(24)[None])[1].std() > 0.1, "logits too small to tell models apart"
    assert distance(decoder, reference(case)) < 1e-5


def test_packed_views_equal_views_alone(folder):
    """A row [TEXT ANSWER PRED CODE] against its three views, each alone: windows go by position, not by column."""
    decoder = weights.load(folder)
    lengths = {jepa.TEXT: 7, jepa.ANSWER: 6, jepa.PRED: 2, jepa.CODE: 8}
    segment = torch.cat([torch.full((n,), s) for s, n in lengths.items()])[None]
    starts = {jepa.TEXT: 0, jepa.ANSWER: 7, jepa.PRED: 7, jepa.CODE: 0}
    position = torch.cat([starts[s] + torch.arange(n) for s, n in lengths.items()])[None]
    ids = torch.randint(0, 61, segment.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        packed = decoder.hidden(ids, jepa.mask(segment), position)
    for view in ((jepa.TEXT, jepa.ANSWER), (jepa.TEXT, jepa.PRED), (jepa.CODE,)):
        columns = torch.isin(segment[0], torch.tensor(view))
        assert (packed[:, columns] - ours(decoder, ids[:, columns])[0]).abs().max() < 1e-5


MUTATIONS = {  # Config field: the cases it is tried on, and a wrong value
    "tied": (("llama",), True),
    "embed_scale": (("gemma", "gemma2", "gemma3"), 1.0),
    "position": (("llama",), "learned"),
    "rope_theta": (("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2", "gemma3", "phi"), 9000.0),
    "rope_fraction": (("phi",), 1.0),
    "rope_scaling": (("llama", "llama_variant", "gemma3"), None),
    "norm": (("llama",), "layer"),
    "norm_eps": (("llama", "gpt2", "olmo2", "gemma3", "phi"), 1e-3),
    "norm_plus_one": (("gemma", "gemma2", "gemma3"), False),
    "pre_norm": (("llama", "gemma2"), False),
    "post_norm": (("olmo2", "gemma2", "gemma3"), False),
    "parallel": (("phi",), False),
    "qk_norm": (("qwen3", "olmo2", "gemma3", "phi_variant"), None),
    "qkv_bias": (("gpt2", "qwen2", "phi"), False),
    "out_bias": (("gpt2", "llama_variant", "phi"), False),
    "mlp_bias": (("gpt2", "llama_variant", "phi"), False),
    "head_bias": (("phi",), False),
    "activation": (("gpt2", "llama", "gemma", "phi"), "gelu"),
    "gated": (("llama",), False),
    "attn_scale": (("gpt2_variant", "gemma2", "gemma3"), None),
    "attn_softcap": (("gemma2",), 2.2),
    "logit_softcap": (("gemma2",), 3.3),
    "window": (("mistral", "qwen2", "gemma2", "gemma3"), 6),
    "windowed": (("mistral", "qwen2", "gemma2", "gemma3"), (False, False, True)),
    "rope_theta_window": (("gemma3",), 60.0),
}
SHAPES = {"vocab_size", "n_layer", "n_head", "d_model", "d_ff", "n_kv_head", "head_dim", "block_size"}


def test_every_field_that_computes_has_a_mutation():
    assert set(MUTATIONS) | SHAPES == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field, case", [(field, case) for field, (cases, _) in MUTATIONS.items() for case in cases])
def test_parity_notices_one_wrong_field(field, case, loaded):
    decoder = loaded(case)
    value = MUTATIONS[field][1]
    assert getattr(decoder.config, field) != value
    torch.manual_seed(0)
    wrong = Decoder(dataclasses.replace(decoder.config, **{field: value}))
    wrong.load_state_dict(decoder.state_dict(), strict=False)
    assert distance(wrong, reference(case)) > 1e-4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @cache
    def load(case):
        path = tmp_path_factory.mktemp("loaded")
        reference(case).save_pretrained(path)
        return weights.load(path)

    return load


# There and back


def test_saved_folder_loads_in_transformers_with_equal_logits(case, folder, tmp_path):
    decoder = weights.load(folder)
    weights.save(decoder, tmp_path, source=folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert distance(decoder, again) < 1e-5
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != decoder.config.tied
    reloaded = weights.load(tmp_path)
    assert reloaded.config == decoder.config
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), decoder.parameters(), strict=True))


@pytest.mark.parametrize("style, changes", [
    ("llama", {}),
    ("llama", {"tied": True, "head_dim": 6, "mlp_bias": True}),
    ("llama", {"qkv_bias": True, "out_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_block_size": 16, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0}}),
    ("gpt2", {}),
    ("gpt2", {"tied": False}),
])  # fmt: skip
def test_a_decoder_made_from_scratch_gets_a_config_json(style, changes, tmp_path):
    decoder = toy_decoder(style, vocab_size=61, **changes)
    weights.save(decoder, tmp_path / "new" / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder").eval()
    assert distance(decoder, again) < 1e-5
    reloaded = weights.load(tmp_path / "new" / "folder")
    assert reloaded.config == decoder.config
    assert distance(decoder, reloaded) == 0


def test_what_has_no_hugging_face_form_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="not saved"):
        weights.save(toy_decoder("llama", qkv_bias=True), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_source_of_another_model_is_refused(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    weights.save(toy_decoder("llama", tied=True), source)
    with pytest.raises(UserError, match="target: not saved: .*source"):
        weights.save(toy_decoder("llama"), target, source)
    assert not target.exists()


def test_side_files_go_along_and_dtype_is_that_of_the_tensors(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    reference("llama").save_pretrained(source)
    edit(source, dtype="bfloat16")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    decoder = weights.load(source)
    weights.save(decoder, target, source)
    copied = {path.name for path in target.iterdir()}
    assert copied > {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    weights.save(decoder, target, target, dtype=torch.bfloat16)  # over itself
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(target / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert not list(target.glob("*.partial"))


def test_the_tokenizer_of_the_training_goes_along_and_its_stop_token_ends_answers(tmp_path, monkeypatch):
    """Not those of the model that training began with, where --tokenizer named another."""
    source, other = tmp_path / "source", tmp_path / "other"
    weights.save(toy_decoder("llama"), source)
    other.mkdir()
    for folder, name in ((source, "tokenizer.json"), (source, "chat_template.jinja"), (other, "tokenizer.json")):
        (folder / name).write_text(folder.name)
    decoder, ends = weights.load(source), lambda: json.loads((tmp_path / "best/generation_config.json").read_text())
    for settings, expected in (({"eos_token_id": 2, "top_k": 5}, [7, 2]), ({"eos_token_id": [3, 2]}, [7, 3, 2]),
                               ({}, [7]), ({"eos_token_id": [2, 7]}, [2, 7])):
        (source / "generation_config.json").write_text(json.dumps(settings))
        weights.save(decoder, tmp_path / "best", source, tokenizer=data.Tokenizer(str(other), 50, 7, None, None, None))
        assert ends() == settings | {"eos_token_id": expected}
    theirs = transformers.GenerationConfig
    assert theirs.from_pretrained(tmp_path / "best").eos_token_id == [2, 7]
    assert (tmp_path / "best/tokenizer.json").read_text() == "other"
    assert not (tmp_path / "best/chat_template.jinja").exists()
    edit(source, eos_token_id=2, bos_token_id=1)
    (source / "generation_config.json").unlink()
    monkeypatch.chdir(tmp_path)
    other.rename("synth")  # a folder that happens to have the name of a tokenizer is not that tokenizer
    weights.save(decoder, tmp_path / "plain", source, tokenizer=data.Tokenizer("synth", 50, 7, None, None, None))
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json"}
    found = theirs.from_pretrained(tmp_path / "plain")
    assert (found.bos_token_id, found.eos_token_id) == (1, [7, 2]), "transformers does not look into both files"
    (source / "generation_config.json").write_text("no JSON")
    weights.save(decoder, tmp_path / "best", source, tokenizer=data.Tokenizer("synth", 50, 7, None, None, None))
    assert (tmp_path / "best/generation_config.json").read_text() == "no JSON", "nothing is lost by it"


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    decoder = toy_decoder("llama")
    weights.save(decoder, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        weights.save(toy_decoder("llama", seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Other forms of the same checkpoint


def test_shards(tmp_path):
    reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert distance(weights.load(tmp_path), reference("llama")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_exactly(tmp_path, dtype):
    decoder = toy_decoder("llama").to(dtype).float()
    weights.save(decoder, tmp_path, dtype=dtype)
    reloaded = weights.load(tmp_path)
    assert all(p.dtype == torch.float32 for p in reloaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), decoder.parameters(), strict=True))


def pickled(folder, state):
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def test_old_gpt2_pickle(tmp_path):
    """As the first GPT-2 checkpoints are: a pickle, names without "transformer.", mask buffers, the tied head twice."""
    model = reference("gpt2")
    model.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    pickled(tmp_path, state)
    assert "lm_head.weight" in state
    assert distance(weights.load(tmp_path), model) < 1e-5


def test_old_llama_buffers(tmp_path):
    model = reference("llama")
    model.save_pretrained(tmp_path)
    pickled(tmp_path, model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert distance(weights.load(tmp_path), model) < 1e-5


@pytest.mark.parametrize("case, old", [
    ("llama", {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    ("llama_variant", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("phi", {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None}),
    ("gemma3", {"rope_theta": 500.0, "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("mistral", {}),
])  # fmt: skip
def test_configs_of_transformers_4(case, old, tmp_path):
    reference(case).save_pretrained(tmp_path)
    edit(tmp_path, remove=("rope_parameters",), **old)
    assert distance(weights.load(tmp_path), reference(case)) < 1e-5


@pytest.mark.parametrize("case, remove", [
    ("gpt2", ("n_inner", "scale_attn_weights", "tie_word_embeddings")),
    ("llama_variant", ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings")),
    ("phi", ("rope_parameters", "qk_layernorm", "tie_word_embeddings")),
    ("gemma", ("rope_parameters", "attention_bias", "tie_word_embeddings")),
    ("gemma2", ("layer_types", "rope_parameters")),
    ("gemma3", ("layer_types", "rope_parameters", "tie_word_embeddings")),
    ("qwen2", ("layer_types", "rope_parameters")),
])  # fmt: skip
def test_defaults_are_those_of_transformers(case, remove, tmp_path):
    """Real checkpoints leave fields out: our Config equals the one from what `transformers` fills in."""
    kept = tmp_path / "kept"
    reference(case).config.save_pretrained(kept)
    edit(kept, remove, sliding_window_pattern=2) if case == "gemma3" else edit(kept, remove)
    short = weights.config(kept)
    transformers.AutoConfig.from_pretrained(kept).save_pretrained(tmp_path)
    assert short == weights.config(tmp_path)


def test_a_window_that_is_in_use_has_a_length(tmp_path):
    """transformers would make it 4096."""
    reference("qwen2").config.save_pretrained(tmp_path)
    edit(tmp_path, remove=("sliding_window",))
    with pytest.raises(UserError, match="sliding_window is missing"):
        weights.config(tmp_path)
    edit(tmp_path, remove=("layer_types",), use_sliding_window=False)
    assert weights.config(tmp_path).window is None


def test_what_older_files_say_of_generation_changes_nothing(tmp_path):
    """In the first Llama-2's config.json: max_length."""
    reference("llama").save_pretrained(tmp_path)
    edit(tmp_path, max_length=4096, do_sample=True, temperature=0.9, top_p=0.6, tokenizer_class="LlamaTokenizer")
    assert distance(weights.load(tmp_path), reference("llama")) < 1e-5


def test_gelu_in_gemmas_first_release_means_the_tanh_form(tmp_path):
    """As Google's checkpoints were first published: the field says gelu, the model was trained with the other."""
    reference("gemma").config.save_pretrained(tmp_path)
    edit(tmp_path, remove=("hidden_activation",), hidden_act="gelu")
    assert weights.config(tmp_path).activation == "gelu_tanh"


# What is refused, in one line that names it


@pytest.mark.parametrize("case, changes, match", [
    ("llama", {"model_type": "openelm"}, "model_type 'openelm' is not supported: its layers differ"),
    ("llama", {"model_type": "mamba"}, "model_type 'mamba'.*llama"),
    ("llama", {"model_type": "gemma3"}, "model_type 'gemma3'"),
    ("llama", {"model_type": None}, "model_type"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"model_type": "m" * 10**6}, "model_type 'mmm"),
    ("llama", {"num_hidden_layers": 10**5}, "100000 layers are more"),
    ("qwen2", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    ("llama", {"hidden_size": 2**62}, "hidden_size"),
    ("llama", {"vocab_size": 10**400}, "vocab_size"),
    ("llama", {"head_dim": 2**20, "num_attention_heads": 2**20, "num_key_value_heads": 1}, "heads"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
    ("llama", {"never_heard_of": [[[[[[[[[[0]] * 9] * 9] * 9] * 9] * 9]]]]}, "never_heard_of"),
    ("llama", {"never_heard_of" * 10**5: 1}, "never_heard_of"),
    ("llama", {"never_heard_of": 0}, "never_heard_of"),
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": "32"}, "hidden_size"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"num_key_value_heads": 3}, "key/value heads"),
    ("llama", {"head_dim": None, "hidden_size": 34}, "width of 34"),
    ("llama", {"head_dim": 7}, "is odd"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"sliding_window": 5}, "sliding_window"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor"),
    ("llama", {"never_heard_of": 1}, "never_heard_of"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types"),
    ("qwen2", {"use_sliding_window": False}, "layer_types asks for windows"),
    ("qwen2", {"layer_types": [FULL]}, "layer_types must name"),
    ("qwen2", {"layer_types": None, "max_window_layers": None}, "max_window_layers"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act"),
    ("gemma3", {"rope_parameters": LINEAR | {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention"),
    ("gemma3", {"rope_parameters": {"rope_theta": 500.0}}, "sliding_attention"),
    ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings"),
])  # fmt: skip
def test_unsupported_config(case, changes, match, tmp_path):
    reference(case).config.save_pretrained(tmp_path)
    weights.config(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=match) as caught:
        weights.config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


NEEDED = {
    "gpt2": "model_type vocab_size n_embd n_layer n_head n_positions layer_norm_epsilon activation_function",
    "llama": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
             "rms_norm_eps hidden_act",
    "mistral": "sliding_window num_key_value_heads",
    "qwen3": "num_key_value_heads head_dim",
    "gemma2": "sliding_window query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping hidden_activation",
    "phi": "layer_norm_eps",
}  # fmt: skip


@pytest.mark.parametrize("case, field", [(case, field) for case, fields in NEEDED.items() for field in fields.split()])
def test_missing_config_field(case, field, tmp_path):
    reference(case).config.save_pretrained(tmp_path)
    edit(tmp_path, remove=(field,))
    with pytest.raises(UserError, match=f"field {field} is missing"):
        weights.config(tmp_path)


class Hostile:
    def __reduce__(self):
        return open, ("hostile_code_ran", "w")


def change_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder):
    (folder / "model.safetensors").unlink()
    reference("llama").save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def escape(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
BAD_FILES = {  # what breaks the folder, and what the message must name
    "truncated": (truncate, "model.safetensors"),
    "lost shard": (lose_shard, r"model-00002-of-\d+\.safetensors: no such file"),
    "shard elsewhere": (escape, "outside.safetensors"),
    "empty index": (lambda f: ((f / "model.safetensors").rename(f / "x"),
                               (f / "model.safetensors.index.json").write_text("{}")), "index.json.*weight_map"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json.*JSON object"),
    "integers": (lambda f: change_tensors(f, lambda s: s.update({NORM: s[NORM].int()})), f"{NORM} holds I32"),
    "shape": (lambda f: change_tensors(f, lambda s: s.update({QUERY: s[QUERY][:-1].clone()})),
              rf"{QUERY} has shape \(63, 32\).*\(64, 32\)"),
    "missing": (lambda f: change_tensors(f, lambda s: s.pop(QUERY)), f"{QUERY} is missing"),
    "two missing": (lambda f: change_tensors(f, lambda s: (s.pop(QUERY), s.pop(NORM))), r"\(and 1 more\) is missing"),
    "left over": (lambda f: change_tensors(f, lambda s: s.update({"model.layers.3.mlp.up_proj.weight": s[QUERY] * 2})),
                  "model.layers.3.mlp.up_proj.weight has no place"),
    "like a buffer": (lambda f: change_tensors(f, lambda s: s.update({"model.layers.0.inv_freq": s[NORM] * 2})),
                      "model.layers.0.inv_freq has no place"),
    "head not tied": (lambda f: edit(f, tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    "pickle as safetensors": (lambda f: torch.save({}, f / "model.safetensors"), "model.safetensors"),
    "hostile pickle": (lambda f: pickled(f, {NORM: Hostile()}), "pytorch_model.bin: refused"),
    "damaged pickle": (lambda f: (pickled(f, {}), (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04")),
                       "pytorch_model.bin: refused"),
    "nested pickle": (lambda f: pickled(f, {"state_dict": {}}), "pytorch_model.bin.*dict of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_end_in_one_line_and_exit_code_2(name, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    reference("llama").save_pretrained(folder)
    harm, match = BAD_FILES[name]
    harm(folder)
    with pytest.raises(UserError, match=match) as caught:
        weights.load(folder)
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: weights.load(folder))
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not Path("hostile_code_ran").exists()


# Hostile files: refused, or read as what they are, in bounded time and memory


def used():
    """Seconds of computing of this process and of those that it has seen end."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def refusal(action):
    """The line in which a hostile input ends, after less than 10 s of computing and with less than 1 GB."""
    gc.collect()  # processes of earlier tests, whose time counts when they end
    subprocess.run(["true"], check=True)  # Linux counts a process's peak from its parent's: this one has nothing more
    began, before = used(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of all processes that earlier tests started
    try:
        action()
    except UserError as caught:
        line = str(caught)
    else:
        pytest.fail("this was not refused")
    gc.collect()  # the process with limits ends when nobody can ask it any more
    assert used() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(largest, 2**20)
    assert "\n" not in line and len(line) < 1500
    return line


@pytest.fixture
def toy(tmp_path):
    """A folder with a toy model."""
    weights.save(toy_decoder("llama"), tmp_path / "toy")
    return tmp_path / "toy"


def write_safetensors(path, header, size=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)  # a sparse file: it claims this size, and takes no room


LYING_HEADERS = {
    "longer than the file": b"\xff" * 8,
    "nested": b'{"a":' + b"[" * 100_000,
    "a tensor beyond the end": {"a": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}},
    "a shape beyond all numbers": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
    "backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "of a type that nobody knows": {"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}},
    "overlapping": {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
}


@pytest.mark.parametrize("header", LYING_HEADERS)
def test_lying_safetensors_headers(header, toy):
    write_safetensors(toy / "model.safetensors", LYING_HEADERS[header], size=4)
    assert "model.safetensors: missing, damaged" in refusal(lambda: weights.load(toy))


def test_a_model_larger_than_memory(toy):
    """config.json and a sparse file of 2 TB agree with each other: only the machine can refuse them."""
    edit(toy, vocab_size=2**20, hidden_size=2**18, head_dim=2**16)
    write_safetensors(toy / "model.safetensors", {"model.embed_tokens.weight": {
        "dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}}, size=2**40)
    assert "this machine has" in refusal(lambda: weights.load(toy))


def test_twenty_thousand_empty_tensors_are_refused_at_once(toy):
    state = load_file(toy / "model.safetensors")
    save_file(state | {f"empty.{i}": torch.zeros(0) for i in range(20_000)}, toy / "model.safetensors")
    began = used()
    assert "empty." in refusal(lambda: weights.load(toy)) and used() - began < 2


def test_many_small_tensors_are_read_from_few_openings(tmp_path, monkeypatch):
    openings = []
    real = weights.safe_open
    weights.save(toy_decoder("gpt2"), tmp_path)
    monkeypatch.setattr(weights, "safe_open", lambda *arguments: openings.append(arguments) or real(*arguments))
    weights.load(tmp_path)
    assert len(openings) == 2  # for the header, and for the tensors


def deflated(path):
    """A pickle of 14 MB that unpacks to 3 GB: torch writes none of that kind, but reads them."""
    torch.save({"a": torch.arange(1000.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, part in parts.items():
            with archive.open(name, "w", force_zip64=True) as file:
                if name.endswith("/data/0"):
                    for _ in range(48):
                        file.write(bytes(2**26))
                else:
                    file.write(part.replace(b"M\xe8\x03", b"J\0\0\0\x30"))  # 1000 -> 48 * 2**24 numbers


class Calls:
    """Unpickles as function(*arguments)."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


PICKLES = {  # what torch.save is given, or a function that writes the file
    "unpacks to 3 GB": deflated,
    "asks for 10 GB": {"a": Calls(bytearray, 10**10)},
    "one number spread out to 4 TB": {"a": torch.zeros(1).expand(10**6, 10**6)},
    "names that are numbers": {3: torch.zeros(2)},
    "no values": {"a": torch.zeros(2, device="meta")},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "complex": {"model.norm.weight": torch.zeros(32, dtype=torch.complex64)},
    "a list": [torch.zeros(2)],
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_pickles(kind, toy):
    (toy / "model.safetensors").unlink()
    made = PICKLES[kind]
    made(toy / "pytorch_model.bin") if callable(made) else torch.save(made, toy / "pytorch_model.bin")
    assert "pytorch_model.bin: " in refusal(lambda: weights.load(toy))


@pytest.mark.parametrize("shards", [
    {"a": "../outside.safetensors"}, {"a": "/etc/passwd"}, {"a": "sub/model.safetensors"}, {"a": ".."}, {"a": ""},
    {"a": 7}, {"a": None}, {"a": ["model.safetensors"]}, {"a": "n" * 300}, {"a": "nul\0"}, [], {},
])
def test_hostile_shard_lists(shards, toy):
    (toy / "model.safetensors").rename(toy.parent / "outside.safetensors")
    (toy / "sub").mkdir()
    (toy / "sub/model.safetensors").write_bytes(b"")
    (toy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert str(toy) in refusal(lambda: weights.load(toy))


def test_a_pipe_is_no_file_of_weights(toy):
    (toy / "model.safetensors").unlink()
    os.mkfifo(toy / "model.safetensors")
    assert "no weights there" in refusal(lambda: weights.load(toy))


def test_nested_settings(toy):
    (toy / "config.json").write_text("[" * 100_000)
    assert "config.json" in refusal(lambda: weights.load(toy))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_utf8(toy):
    strange = toy.rename(os.fsdecode(os.fsencode(toy.parent) + b"/m\xff"))
    assert "not valid UTF-8" in refusal(lambda: weights.load(strange))


# Memory and randomness


def test_loading_draws_nothing_at_random(tmp_path):
    weights.save(toy_decoder("gpt2"), tmp_path)
    before = torch.get_rng_state()
    weights.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.init.normal_(torch.zeros(4)).abs().sum() > 0, "torch's own initialisation was not put back"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(tmp_path, dtype):
    big = Config(vocab_size=8000, n_layer=4, n_head=8, d_model=512, d_ff=2048, tied=False)  # 100 MB
    weights.save(Decoder(big), tmp_path, dtype=dtype)
    code = """
        import sys
        from hf import weights
        memory = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
        before = memory("VmRSS")
        decoder = weights.load(sys.argv[1])
        print((memory("VmHWM") - before) / sum(4 * p.numel() for p in decoder.parameters()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(weights.__file__).parents[1], check=True)
    assert 0.5 < float(ran.stdout) < 1.3


# The Hub


def test_fetch_prefers_a_folder_then_the_cache_then_the_network(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(name, allow_patterns, local_files_only, revision):
        calls.append((name, local_files_only))
        assert revision == (None if local_files_only else tmp_path.name), "what is in the cache stays that version"
        if not local_files_only and not (tmp_path / "config.json").exists():
            weights.save(toy_decoder("llama"), tmp_path)
        elif not local_files_only:
            [(tmp_path / name).write_text("{}") for name in ("tokenizer.json", "tokenizer_config.json")]
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert weights.fetch(str(tmp_path)) == str(tmp_path) and not calls
    assert weights.fetch("org/name") == str(tmp_path)  # the cached folder holds no model yet
    assert calls == [("org/name", True), ("org/name", False)]
    assert weights.fetch("org/name") == str(tmp_path)
    assert calls[2:] == [("org/name", True), ("org/name", False)], "there were weights, but no tokenizer"
    assert weights.fetch("org/name") == str(tmp_path)
    assert calls[4:] == [("org/name", True), ("org/name", False)], "is there no chat template, or was it not fetched?"
    for name, content in (("chat_template.jinja", "x"), ("tokenizer_config.json", '{"chat_template": "x"}')):
        del calls[:]
        (tmp_path / name).write_text(content)
        assert weights.fetch("org/name") == str(tmp_path) and calls == [("org/name", True)]
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)


def test_fetch_without_a_network_takes_what_is_cached(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(name, allow_patterns, local_files_only, revision):
        if not local_files_only or not (tmp_path / "config.json").exists():
            raise OSError("403 Forbidden")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="no download: 403 Forbidden"):
        weights.fetch("org/name")
    weights.save(toy_decoder("llama"), tmp_path)
    assert weights.fetch("org/name") == str(tmp_path)
    with pytest.raises(UserError, match="no download: 403 Forbidden"):
        weights.fetch("org/name", model=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert weights.fetch("org/name", model=False) == str(tmp_path)


@pytest.mark.parametrize("name", ["no_such_folder", "../x/y", "/no/such/folder", ""])
def test_fetch_refuses_what_is_no_name(name):
    with pytest.raises(UserError, match="no such folder"):
        weights.fetch(name)


def test_fetch_offline(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="org/name: .*no download") as caught:
        weights.fetch("org/name")
    assert "\n" not in str(caught.value)


def test_fetch_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        weights.fetch("org/name")


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    weights.save(toy_decoder("llama"), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert weights.weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    weights.load(tmp_path)


def test_what_is_downloaded(tmp_path, monkeypatch):
    hub, wanted = pytest.importorskip("huggingface_hub"), []
    weights.save(toy_decoder("llama"), tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns, **how: wanted.extend(
        allow_patterns) or str(tmp_path))
    weights.fetch("org/name")
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in wanted) for file in files)
    assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in wanted)


def test_of_a_tokenizer_the_model_is_not_downloaded(tmp_path, monkeypatch):
    hub, wanted = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns, **how: wanted.extend(
        allow_patterns) or str(tmp_path))
    assert weights.fetch("org/name", model=False) == str(tmp_path)  # what is missing, if anything, its reader says
    assert "tokenizer.json" in wanted and not any("safetensors" in pattern for pattern in wanted)
