"""Model families: what a Hugging Face config.json means in `Config` fields, and what its tensors are called.

A family is a set of `Config` fields plus one of four naming schemes; both are tables in `families.toml`. `parse` is
strict: a field that it does not know is refused by name, because the alternative is a model that loads and is quietly
wrong. No other file knows a family. Next: `weights.py`, which reads and writes the tensors.
"""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from reprlib import repr as shown  # shortened: what a file holds may be long

from model import Config
from support.cli import UserError

TABLES = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
FIXED, FIELDS, ABSENT = TABLES["fixed"], TABLES["fields"], TABLES["absent"]
ACTIVATIONS, NAMES = TABLES["activations"], TABLES["names"]
HARMLESS = {file: set(fields.split()) for file, fields in TABLES["harmless"].items()}  # they change no logits
BUFFERS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
KINDS = {field.name: typing.get_args(field.type) or (field.type,) for field in dataclasses.fields(Config)}
LIMITS = {int: 2**24, float: 1e30}  # every number in a real model's config.json is smaller
MOST_LAYERS = 2000
NEEDED = object()


class Fields:
    """The fields of config.json, or of a dict in it. What nobody took in the end is unknown, and refused."""

    def __init__(self, values, where):
        self.values, self.where = dict(values), where

    def refuse(self, what):
        raise UserError(f"{self.where}: {what}")

    def take(self, name, kind, default=NEEDED, null=False, above=0):
        """Remove and return a field. Numbers must be above `above`; null is fine if it is the default, or if `null`."""
        if name not in self.values and default is NEEDED:
            self.refuse(f"field {name} is missing")
        value = self.values.pop(name, default)
        if value is None and (null or default is None):
            return None
        good = type(value) is kind or (kind is float and type(value) is int)
        if not good or kind in LIMITS and not above < value < LIMITS[kind]:
            a_number = f" above {above} and below {LIMITS[kind]:g}" if kind in LIMITS else ""
            self.refuse(f"{name} = {shown(value)} should be {kind.__name__}{a_number}")
        return value

    def done(self, kind="model"):
        """Refuse what is left, unless it is harmless or switched off."""
        for name, value in self.values.items():
            if not (value is False or value in (None, {}, []) or name in HARMLESS[kind]):
                self.refuse(f"field {name[:80]} = {shown(value)} is unknown, or not supported for this model")


def fields_of(family):
    """{field of config.json: field of Config}, as far as the two mean the same."""
    own, common = FIELDS.get(family, {}), {} if family == "gpt2" else FIELDS["common"]
    return {theirs: ours for theirs, ours in common.items() if ours not in own.values()} | own


def parse(values, path):
    """config.json -> Config. Every field is honoured, known to be harmless, or refused."""
    f = Fields(values, path)
    family = f.take("model_type", str)
    if family not in FIXED:
        reason = TABLES["unsupported"].get(family, f"these are: {', '.join(FIXED)}")
        f.refuse(f"model_type {shown(family)} is not supported: {reason}")
    made, absent = dict(FIXED[family]), ABSENT["common"] | ABSENT.get(family, {})
    for theirs, ours in fields_of(family).items():
        if ours == "activation":
            known = ACTIVATIONS | ({"gelu": "gelu_tanh"} if family == "gemma" else {})  # of Gemma's first release
            if (name := f.take(theirs, str)) not in known:
                f.refuse(f"{theirs} {shown(name)} is not supported; these are: {', '.join(known)}")
            made[ours] = known[name]
        else:
            default = {"null": None, "needed": NEEDED}.get(value := absent.get(theirs, "needed"), value)
            made[ours] = f.take(theirs, KINDS[ours][0], default, null=len(KINDS[ours]) > 1)
    if made["n_layer"] > MOST_LAYERS:
        f.refuse(f"{made['n_layer']} layers are more than any model has")
    made |= further(f, family, made)
    f.done()
    heads, kv_heads, width = made["n_head"], made.get("n_kv_head") or made["n_head"], made["d_model"]
    if heads % kv_heads or (width % heads and not made.get("head_dim")):
        f.refuse(f"{heads} heads do not fit {kv_heads} key/value heads or a width of {width}")
    if heads * (made.get("head_dim") or 1) >= LIMITS[int]:
        f.refuse(f"{heads} heads of {made['head_dim']} are more than any model has")
    made = Config(**made)
    if made.position == "rope" and int(made.head_dim * made.rope_fraction) % 2:
        f.refuse(f"RoPE turns pairs of dimensions, but {made.rope_fraction} x head_dim {made.head_dim} is odd")
    return made


def further(f, family, made):
    """What the table of fields cannot say."""
    if family == "gpt2":
        scaled = f.take("scale_attn_weights", bool, True)
        return {"d_ff": f.take("n_inner", int, None) or 4 * made["d_model"], "attn_scale": None if scaled else 1.0}
    found = rope(f, family) | windows(f, family, made["n_layer"])
    if "attention_bias" in fields_of(family):
        found["out_bias"] = made["qkv_bias"]
    if family.startswith("gemma"):
        found["embed_scale"] = made["d_model"] ** 0.5
        twin = "hidden_activation" if family == "gemma" else "hidden_act"
        if ACTIVATIONS.get(f.take(twin, str, None), "gelu_tanh") != made["activation"]:
            f.refuse("hidden_act and hidden_activation differ")
    if family in ("gemma2", "gemma3_text"):
        found["attn_scale"] = f.take("query_pre_attn_scalar", float) ** -0.5
    if family == "phi" and f.take("qk_layernorm", bool, False):
        found["qk_norm"] = "head"
    if family == "phi" and made["tied"]:
        f.refuse("tie_word_embeddings with a bias on the output matrix is not supported")
    return found


def rope(f, family):
    """From rope_theta and rope_scaling (transformers 4), or from rope_parameters (5), which go before rope_theta."""
    top = {name: f.take(name, float, None) for name in ("rope_theta", "partial_rotary_factor")}
    old, new = f.take("rope_scaling", dict, None) or {}, f.take("rope_parameters", dict, None) or {}
    if old and new:
        f.refuse("rope_scaling and rope_parameters are both given")
    if family == "gemma3_text":  # each type of layer has its own
        layers = Fields(new or {"full_attention": old, "sliding_attention": {}}, f"{f.where}: rope_parameters")
        local = {"rope_theta": f.take("rope_local_base_freq", float, None)} | layers.take("sliding_attention", dict)
        theta, fraction, scaling = rope_entry(top | layers.take("full_attention", dict), f.where)
        local_theta, local_fraction, local_scaling = rope_entry(local, f.where)
        layers.done()
        if local_scaling or {fraction, local_fraction} - {None, 1}:
            f.refuse("partial RoPE, or scaled RoPE in sliding_attention, is not supported")
        return {"rope_theta": theta or 1e6, "rope_theta_window": local_theta or 10000.0, "rope_scaling": scaling}
    theta, fraction, scaling = rope_entry(top | old | new, f.where)
    fraction = fraction or (0.5 if family == "phi" else 1.0)
    if fraction > 1 or (fraction < 1 and family != "phi"):
        f.refuse(f"partial_rotary_factor {fraction} is not supported for {family}")
    return {"rope_theta": theta or 10000.0, "rope_fraction": fraction, "rope_scaling": scaling}


def rope_entry(entry, where):
    """Theta or None, fraction or None, Config.rope_scaling."""
    r = Fields(entry, f"{where}: rope")
    older = r.take("type", str, "default")  # the name of rope_type before transformers 4.43
    kind = r.take("rope_type", str, older)
    if kind not in ("default", "linear", "llama3"):
        r.refuse(f"rope_type {shown(kind)} is not supported: default, linear, llama3")
    scaling = None if kind == "default" else {"type": kind, "factor": r.take("factor", float)}
    if kind == "llama3":
        scaling["original_block_size"] = r.take("original_max_position_embeddings", int)
        scaling |= {name: r.take(name, float) for name in ("low_freq_factor", "high_freq_factor")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            r.refuse("low_freq_factor must be less than high_freq_factor")
    theta, fraction = r.take("rope_theta", float, None), r.take("partial_rotary_factor", float, None)
    r.done()
    return theta, fraction, scaling


def windows(f, family, n_layer):
    """Which layers see only a window, and how long it is."""
    if family == "mistral":
        return {"window": f.take("sliding_window", int, null=True)}
    if family not in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        return {}
    kinds, qwen = f.take("layer_types", list, None), family.startswith("qwen")
    used = not qwen or f.take("use_sliding_window", bool, False)
    window = f.take("sliding_window", int, NEEDED if used else None, null=qwen)
    window = window if used else None
    if qwen:
        first = f.take("max_window_layers", int, None if kinds or not window else NEEDED, above=-1)
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
    family = "gpt2" if config.position == "learned" else "llama"
    fields = {
        "model_type": family, "torch_dtype": "float32",
        "architectures": ["GPT2LMHeadModel" if family == "gpt2" else "LlamaForCausalLM"],
        "bos_token_id": None, "eos_token_id": None,  # transformers would otherwise fill in another vocabulary's
    }
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    for theirs, ours in fields_of(family).items():
        value = getattr(config, ours)
        fields[theirs] = activations[value] if ours == "activation" else value
    if family == "gpt2":
        return fields | {"n_inner": config.d_ff}
    renamed = {"type": "rope_type", "original_block_size": "original_max_position_embeddings"}
    scaling = config.rope_scaling and {renamed.get(name, name): value for name, value in config.rope_scaling.items()}
    return fields | {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def names(decoder):
    """{their tensor name: our names, which are joined along rows}, over all tensors of the Decoder."""
    c, have, found = decoder.config, decoder.state_dict(), {}
    if c.position == "learned" or c.parallel:
        scheme = NAMES["gpt2" if c.position == "learned" else "phi"]
    else:
        scheme = NAMES["llama"] | (NAMES["post_norm"] if c.post_norm else {})
    for theirs, ours in scheme.items():
        for layer in range(c.n_layer if "#" in theirs else 1):
            for kind in (".weight", ".bias"):
                parts = [(part + kind).replace("#", str(layer)) for part in ours.split()]
                if parts[0] in have:
                    found[(theirs + kind).replace("#", str(layer))] = parts
    left = set(have) - {part for parts in found.values() for part in parts}
    assert not left, f"{min(left)} has no name in Hugging Face's scheme (merge LoRA adapters first)"
    return found


def transposed(theirs):
    return re.search(r"\.c_\w+\.weight$", theirs) is not None
