"""Model families: what a Hugging Face config.json means in `Config` fields, and what its tensors are called.

A family is a set of `Config` fields plus one of four naming schemes (`LLAMA` ... below). `parse` is strict: a field
that it does not know is refused by name, because the alternative is a model that loads and is quietly wrong. No other
file knows a family. Next: `weights.py`, which reads and writes the tensors.
"""

import json
import math
import re

from model import Config
from support.cli import UserError

# Tensor names, theirs: ours. '#' is the layer; each line stands for .weight and, where the Decoder has one, .bias.
LLAMA = {
    "model.embed_tokens": "embed",
    "model.layers.#.input_layernorm": "blocks.#.attn_norm",
    "model.layers.#.self_attn.q_proj": "blocks.#.attn.q_proj",
    "model.layers.#.self_attn.k_proj": "blocks.#.attn.k_proj",
    "model.layers.#.self_attn.v_proj": "blocks.#.attn.v_proj",
    "model.layers.#.self_attn.o_proj": "blocks.#.attn.o_proj",
    "model.layers.#.self_attn.q_norm": "blocks.#.attn.q_norm",
    "model.layers.#.self_attn.k_norm": "blocks.#.attn.k_norm",
    "model.layers.#.post_attention_layernorm": "blocks.#.mlp_norm",  # named for what it follows: it norms MLP input
    "model.layers.#.mlp.gate_proj": "blocks.#.mlp.gate_proj",
    "model.layers.#.mlp.up_proj": "blocks.#.mlp.up_proj",
    "model.layers.#.mlp.down_proj": "blocks.#.mlp.down_proj",
    "model.norm": "norm",
    "lm_head": "head",
}
POST_NORM = LLAMA | {  # OLMo-2, Gemma-2 and 3: the same name as above for another norm
    "model.layers.#.post_attention_layernorm": "blocks.#.attn_post_norm",
    "model.layers.#.pre_feedforward_layernorm": "blocks.#.mlp_norm",
    "model.layers.#.post_feedforward_layernorm": "blocks.#.mlp_post_norm",
}
PHI = {
    "model.embed_tokens": "embed",
    "model.layers.#.input_layernorm": "blocks.#.attn_norm",
    "model.layers.#.self_attn.q_proj": "blocks.#.attn.q_proj",
    "model.layers.#.self_attn.k_proj": "blocks.#.attn.k_proj",
    "model.layers.#.self_attn.v_proj": "blocks.#.attn.v_proj",
    "model.layers.#.self_attn.dense": "blocks.#.attn.o_proj",
    "model.layers.#.self_attn.q_layernorm": "blocks.#.attn.q_norm",
    "model.layers.#.self_attn.k_layernorm": "blocks.#.attn.k_norm",
    "model.layers.#.mlp.fc1": "blocks.#.mlp.up_proj",
    "model.layers.#.mlp.fc2": "blocks.#.mlp.down_proj",
    "model.final_layernorm": "norm",
    "lm_head": "head",
}
GPT2 = {  # c_attn holds q, k and v; all c_ matrices are stored (in, out), the transpose of nn.Linear's
    "transformer.wte": "embed",
    "transformer.wpe": "position_embed",
    "transformer.h.#.ln_1": "blocks.#.attn_norm",
    "transformer.h.#.attn.c_attn": "blocks.#.attn.q_proj blocks.#.attn.k_proj blocks.#.attn.v_proj",
    "transformer.h.#.attn.c_proj": "blocks.#.attn.o_proj",
    "transformer.h.#.ln_2": "blocks.#.mlp_norm",
    "transformer.h.#.mlp.c_fc": "blocks.#.mlp.up_proj",
    "transformer.h.#.mlp.c_proj": "blocks.#.mlp.down_proj",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
BUFFERS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

GEMMA = {"norm_plus_one": True}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
FAMILIES = {  # model_type: what its code fixes, whatever config.json says
    "gpt2": {"position": "learned", "norm": "layer", "gated": False, **BIASES},
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "full", "pre_norm": False, "post_norm": True},
    "gemma": GEMMA,
    "gemma2": {"post_norm": True, **GEMMA},
    "gemma3_text": {"post_norm": True, "qk_norm": "head", **GEMMA},
    "phi": {"norm": "layer", "parallel": True, "gated": False, "head_bias": True, **BIASES},
}
UNSUPPORTED = {  # families that one might expect here
    "openelm": "its layers differ in their number of heads and inner width, and a Config has one of each",
    "gemma3": "it reads images too; only the text models, gemma3_text, are supported",
}
GPT2_SIZES = {  # config.json's name: ours
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "n_positions": "block_size",
}
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "block_size",
}
ACTIVATIONS = {
    "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
HARMLESS = set(  # config.json fields that leave the logits of a model in eval mode alone
    """architectures torch_dtype dtype transformers_version _name_or_path name_or_path model_name use_cache
    cache_implementation initializer_range attention_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id task_specific_params summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout id2label label2id num_labels
    _num_labels problem_type output_past return_dict chunk_size_feed_forward gradient_checkpointing is_decoder
    _attn_implementation attn_implementation _attn_implementation_autoset is_llama_config transformers.js_config
    unsloth_fixed unsloth_version n_ctx sliding_window_size _sliding_window_pattern""".split()
)
NEEDED = object()


class Fields:
    """The fields of config.json, or of a dict in it. What nobody took in the end is unknown, and refused."""

    def __init__(self, values, where):
        self.values, self.where = dict(values), where

    def refuse(self, what):
        raise UserError(f"{self.where}: {what}")

    def take(self, name, kind, default=NEEDED, null=False, least=1):
        """Remove and return a field. Numbers must be positive; null is fine where the default is None, or if `null`."""
        if name not in self.values and default is NEEDED:
            self.refuse(f"field {name} is missing")
        value = self.values.pop(name, default)
        if value is None and (null or default is None):
            return None
        if kind is int:
            good = type(value) is int and value >= least
        elif kind is float:
            good = type(value) in (int, float) and 0 < value < math.inf
        else:
            good = isinstance(value, kind)
        if not good:
            self.refuse(f"{name} = {value!r} should be a {'positive ' * (kind in (int, float))}{kind.__name__}")
        return value

    def choose(self, name, known):
        """Take a field that must be one of the keys of `known`; what stands there."""
        value = self.take(name, str)
        if value not in known:
            self.refuse(f"{name} {value!r} is not supported; these are: {', '.join(known)}")
        return known[value]

    def done(self):
        for name, value in self.values.items():
            if value is not None and value is not False and name not in HARMLESS:
                self.refuse(f"field {name} = {json.dumps(value)[:80]} is unknown, or not supported for this model")


def parse(values, path):
    """config.json -> Config. Every field is honoured, known to be harmless, or refused."""
    f = Fields(values, path)
    family = values.get("model_type")
    if family in UNSUPPORTED:
        f.refuse(f"model_type {family!r} is not supported: {UNSUPPORTED[family]}")
    values = f.choose("model_type", FAMILIES) | (_gpt2(f) if family == "gpt2" else _llama_like(f, family))
    f.done()
    heads, kv_heads, width = values["n_head"], values.get("n_kv_head") or values["n_head"], values["d_model"]
    if heads % kv_heads or (width % heads and not values.get("head_dim")):
        f.refuse(f"{heads} heads do not fit {kv_heads} key/value heads or a width of {width}")
    made = Config(**values)
    if made.position == "rope" and int(made.head_dim * made.rope_fraction) % 2:
        f.refuse(f"RoPE turns pairs of dimensions, but {made.rope_fraction} x head_dim {made.head_dim} is odd")
    return made


def _gpt2(f):
    values = {ours: f.take(theirs, int) for theirs, ours in GPT2_SIZES.items()}
    return values | {
        "d_ff": f.take("n_inner", int, None) or 4 * values["d_model"],
        "tied": f.take("tie_word_embeddings", bool, True),
        "norm_eps": f.take("layer_norm_epsilon", float),
        "activation": f.choose("activation_function", ACTIVATIONS),
        "attn_scale": None if f.take("scale_attn_weights", bool, True) else 1.0,
    }


def _llama_like(f, family):
    """Defaults are those of the family's own code, and only for fields that real checkpoints leave out."""
    phi, gemma, late_gemma = family == "phi", family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    kv_default = None if family in ("llama", "olmo2", "phi") else NEEDED  # None: as many as query heads
    values = {ours: f.take(theirs, int) for theirs, ours in LLAMA_SIZES.items()} | {
        "n_kv_head": f.take("num_key_value_heads", int, kv_default, null=True),
        "head_dim": f.take("head_dim", int, NEEDED if gemma or family == "qwen3" else None),
        "tied": f.take("tie_word_embeddings", bool, gemma),
        "norm_eps": f.take("layer_norm_eps" if phi else "rms_norm_eps", float),
    }
    values |= _rope(f, family) | _windows(f, family, values["n_layer"])
    field, twin = ("hidden_activation", "hidden_act") if late_gemma else ("hidden_act", "hidden_activation")
    legacy = {"gelu": "gelu_tanh"} if family == "gemma" else {}  # what Gemma's first release meant
    values["activation"] = f.choose(field, ACTIVATIONS | legacy)
    if gemma and ACTIVATIONS.get(f.take(twin, str, None), "gelu_tanh") != values["activation"]:
        f.refuse("hidden_act and hidden_activation differ")
    if family in ("llama", "qwen3", "olmo2") or gemma:
        values["qkv_bias"] = values["out_bias"] = f.take("attention_bias", bool, False)
    if family == "llama":
        values["mlp_bias"] = f.take("mlp_bias", bool, False)
    if gemma:
        values["embed_scale"] = values["d_model"] ** 0.5
    if late_gemma:
        values["attn_scale"] = f.take("query_pre_attn_scalar", float) ** -0.5
        values["attn_softcap"] = f.take("attn_logit_softcapping", float, null=True)
        values["logit_softcap"] = f.take("final_logit_softcapping", float, null=True)
    if phi and f.take("qk_layernorm", bool, False):
        values["qk_norm"] = "head"
    if phi and values["tied"]:
        f.refuse("tie_word_embeddings with a bias on the output matrix is not supported")
    return values


def _rope(f, family):
    """From rope_theta and rope_scaling (transformers 4), or from rope_parameters (5), which go before rope_theta."""
    top = {name: f.take(name, float, None) for name in ("rope_theta", "partial_rotary_factor")}
    old, new = f.take("rope_scaling", dict, None) or {}, f.take("rope_parameters", dict, None) or {}
    if old and new:
        f.refuse("rope_scaling and rope_parameters are both given")
    if family == "gemma3_text":  # each type of layer has its own
        layers = Fields(new or {"full_attention": old, "sliding_attention": {}}, f"{f.where}: rope_parameters")
        local = {"rope_theta": f.take("rope_local_base_freq", float, None)} | layers.take("sliding_attention", dict)
        theta, fraction, scaling = _rope_entry(top | layers.take("full_attention", dict), f.where)
        local_theta, local_fraction, local_scaling = _rope_entry(local, f.where)
        layers.done()
        if local_scaling or {fraction, local_fraction} - {None, 1}:
            f.refuse("partial RoPE, or scaled RoPE in sliding_attention, is not supported")
        return {"rope_theta": theta or 1e6, "rope_theta_window": local_theta or 10000.0, "rope_scaling": scaling}
    theta, fraction, scaling = _rope_entry(top | old | new, f.where)
    fraction = fraction or (0.5 if family == "phi" else 1.0)
    if fraction > 1 or (fraction < 1 and family != "phi"):
        f.refuse(f"partial_rotary_factor {fraction} is not supported for {family}")
    return {"rope_theta": theta or 10000.0, "rope_fraction": fraction, "rope_scaling": scaling}


def _rope_entry(entry, where):
    """Theta or None, fraction or None, Config.rope_scaling."""
    r = Fields(entry, f"{where}: rope")
    older = r.take("type", str, "default")  # the name of rope_type before transformers 4.43
    kind = r.take("rope_type", str, older)
    if kind not in ("default", "linear", "llama3"):
        r.refuse(f"rope_type {kind!r} is not supported: default, linear, llama3")
    scaling = None if kind == "default" else {"type": kind, "factor": r.take("factor", float)}
    if kind == "llama3":
        scaling["original_block_size"] = r.take("original_max_position_embeddings", int)
        scaling |= {name: r.take(name, float) for name in ("low_freq_factor", "high_freq_factor")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            r.refuse("low_freq_factor must be less than high_freq_factor")
    theta, fraction = r.take("rope_theta", float, None), r.take("partial_rotary_factor", float, None)
    r.done()
    return theta, fraction, scaling


def _windows(f, family, n_layer):
    """Which layers see only a window, and how long it is."""
    if family == "mistral":
        return {"window": f.take("sliding_window", int, null=True)}
    if family not in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        return {}
    kinds, qwen = f.take("layer_types", list, None), family.startswith("qwen")
    window = f.take("sliding_window", int, None if qwen else NEEDED)
    if qwen:
        window = window if f.take("use_sliding_window", bool, False) else None
        first = f.take("max_window_layers", int, None if kinds or not window else NEEDED, least=0)
        windowed = [window is not None and layer >= (first or 0) for layer in range(n_layer)]
    else:
        every = 2 if family == "gemma2" else f.take("sliding_window_pattern", int, 6)
        windowed = [(layer + 1) % every != 0 for layer in range(n_layer)]
    if kinds is not None:
        if len(kinds) != n_layer or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
            f.refuse(f"layer_types must name sliding_attention or full_attention for each of {n_layer} layers")
        windowed = [kind == "sliding_attention" for kind in kinds]
    if any(windowed) and not window:
        f.refuse("layer_types asks for windows, but no sliding_window is in use")
    return {"window": window, "windowed": windowed} if any(windowed) else {}


def describe(config):
    """The reverse of `parse`, for a Decoder made from scratch in the style of GPT-2 or Llama."""
    c, gpt2 = config, config.position == "learned"
    fields = {
        "model_type": "gpt2" if gpt2 else "llama",
        "architectures": ["GPT2LMHeadModel" if gpt2 else "LlamaForCausalLM"],
        "torch_dtype": "float32",
        "tie_word_embeddings": c.tied,
        "bos_token_id": None,  # transformers would otherwise fill in another vocabulary's
        "eos_token_id": None,
    }
    fields |= {theirs: getattr(c, ours) for theirs, ours in (GPT2_SIZES if gpt2 else LLAMA_SIZES).items()}
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[c.activation]
    if gpt2:
        return fields | {"n_inner": c.d_ff, "activation_function": activation, "layer_norm_epsilon": c.norm_eps}
    renamed = {"type": "rope_type", "original_block_size": "original_max_position_embeddings"}
    return fields | {
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling and {renamed.get(name, name): value for name, value in c.rope_scaling.items()},
    }


def names(decoder):
    """{their tensor name: our names, which are joined along rows}, over all tensors of the Decoder."""
    c, have, found = decoder.config, decoder.state_dict(), {}
    scheme = GPT2 if c.position == "learned" else PHI if c.parallel else POST_NORM if c.post_norm else LLAMA
    for theirs, ours in scheme.items():
        for layer in range(c.n_layer if "#" in theirs else 1):
            for kind in (".weight", ".bias"):
                parts = [(part + kind).replace("#", str(layer)) for part in ours.split()]
                if parts[0] in have:
                    found[(theirs + kind).replace("#", str(layer))] = parts
    left = set(have) - {part for parts in found.values() for part in parts}
    assert not left, f"{min(left)} has no name in Hugging Face's scheme (merge LoRA adapters before saving)"
    return found


def transposed(theirs):
    return re.search(r"\.c_\w+\.weight$", theirs) is not None
