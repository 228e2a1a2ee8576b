"""LoRA: train a small correction to each projection and leave the pretrained weights alone.

Hu et al., arXiv 2106.09685, section 4.1: W x becomes W x + (alpha / rank) B A x, where A (rank, in) is drawn at random
and B (out, rank) starts at zero, so that training begins at the pretrained model. Only A and B are trained.

`add` puts adapters into a `Decoder`; `merge` folds them into its weights, for export with `weights.save`; `save` and
`load` keep the adapters alone, a few megabytes, in the format of PEFT (the library that most people use for LoRA). The
[PRED] vectors live outside the decoder: they stay trainable.
"""

import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hf import families, weights
from support.cli import UserError, read_json, write_json, writing

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
NAME = "base_model.model.{}.lora_{}.weight"


class Adapted(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.alpha, self.scale, self.dropout = base, alpha, alpha / rank, dropout
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **like) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.a)  # (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.b)


def adapted_layers(decoder):
    """{path such as blocks.0.attn.q_proj: its `Adapted`}; empty for a decoder without adapters."""
    return {path: layer for path, layer in decoder.named_modules() if isinstance(layer, Adapted)}


def add(decoder, rank, alpha=None, dropout=0.0):
    """Freeze the decoder and give every projection an adapter, in place. alpha None: rank, a scale of 1."""
    assert not adapted_layers(decoder), "this decoder has adapters already: merge them first"
    decoder.requires_grad_(False)
    for path, layer in list(decoder.named_modules()):
        if path.split(".")[-1] in PROJECTIONS:
            decoder.set_submodule(path, Adapted(layer, rank, rank if alpha is None else alpha, dropout))


@torch.no_grad()
def merge(decoder):
    """Fold every adapter into its weights and take it away, in place; the decoder can be trained whole again."""
    for path, layer in adapted_layers(decoder).items():
        layer.base.weight += layer.scale * (layer.b @ layer.a)
        decoder.set_submodule(path, layer.base)
    decoder.requires_grad_(True)


def modules(config):
    """{a projection's path in the Hugging Face model: ours}, the latter a list: GPT-2's c_attn is q, k and v in one."""
    found = {}
    for theirs, ours in families.names(weights.without_values(config)).items():
        paths = [name.removesuffix(".weight") for name in ours]
        if theirs.endswith(".weight") and paths[0].split(".")[-1] in PROJECTIONS:
            found[theirs.removesuffix(".weight")] = paths
    return found


def save(decoder, folder, base):
    """Write the adapters of a decoder that came from the folder, or Hub name, `base`. PEFT has one adapter for GPT-2's
    c_attn: the three here, together one of three times the rank, A below A below A, and B along the diagonal."""
    folder, adapters, tensors, ranks, alphas = Path(folder), adapted_layers(decoder), {}, {}, {}
    for theirs, ours in modules(decoder.config).items():
        if ours[0] in adapters:
            layers = [adapters[path] for path in ours]
            a, b = torch.cat([layer.a for layer in layers]), torch.block_diag(*[layer.b for layer in layers])
            tensors |= {NAME.format(theirs, "A"): a.detach().cpu(), NAME.format(theirs, "B"): b.detach().cpu()}
            ranks[theirs], alphas[theirs] = len(a), len(layers) * layers[0].alpha
    first = next(iter(adapters.values()))
    rank, alpha = len(first.a), first.alpha
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else str(base),
        "r": rank, "lora_alpha": alpha, "lora_dropout": first.dropout,
        "target_modules": sorted({theirs.split(".")[-1] for theirs in ranks}),
        "rank_pattern": {theirs: value for theirs, value in ranks.items() if value != rank},
        "alpha_pattern": {theirs: value for theirs, value in alphas.items() if value != alpha},
        "fan_in_fan_out": any(families.transposed(f"{theirs}.weight") for theirs in ranks),  # as in the base model
    }
    with writing(folder / TENSORS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    write_json(folder / CONFIG, fields)


def base_of(folder):
    """The folder, or Hub name, of the model that the adapters in a folder belong to."""
    path = Path(folder) / CONFIG
    return families.Fields(read_json(path), path).take("base_model_name_or_path", str)


def read_config(path):
    """(rank, alpha, is it adapted?), each a function of a module's path, from adapter_config.json."""
    f = families.Fields(read_json(path), path)
    named = lambda module, name: f".{module}".endswith(f".{name}")  # noqa: E731  by the last parts of its path

    def by_module(field, kind, default):
        given = families.Fields(f.take(field, dict, None) or {}, f"{path}: {field}")
        values = {name: given.take(name, kind) for name in list(given.values)}
        if not all(re.fullmatch(r"[\w.]+", name) for name in values):
            f.refuse(f"{field} must give names of modules, not regular expressions")
        return lambda module: next((value for name, value in values.items() if named(module, name)), default)

    if f.take("peft_type", str) != "LORA" or f.take("bias", str, "none") != "none":
        f.refuse("only LORA adapters without biases are supported")
    if f.values.pop("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        f.refuse("init_lora_weights names a method that changes the base model, too; that is not supported")
    if f.values.pop("revision", None) not in (None, "main"):
        f.refuse("revision names another version of the base model than main; that is not supported")
    rank = by_module("rank_pattern", int, f.take("r", int))
    alpha = by_module("alpha_pattern", float, f.take("lora_alpha", float))
    targets = f.take("target_modules", list)
    f.done("adapter")
    return rank, alpha, lambda module: any(named(module, target) for target in targets)


@torch.no_grad()
def load(decoder, folder, dropout=0.0):
    """Add the adapters in a folder, written by `save` or by PEFT, to a decoder without any, in place. UserError where
    they do not fit it, or are of another kind than here; the decoder is then left as it was."""
    path, adapters = Path(folder) / TENSORS, {}
    rank_of, alpha_of, targeted = read_config(Path(folder) / CONFIG)
    tensors = weights.read_tensors(path)
    for theirs, ours in modules(decoder.config).items():
        a, b = (tensors.pop(NAME.format(theirs, matrix), None) for matrix in "AB")
        if a is None and b is None and not targeted(theirs):
            continue
        layers, rank = [decoder.get_submodule(name) for name in ours], rank_of(theirs)
        shapes = [(rank, layers[0].in_features), (sum(layer.out_features for layer in layers), rank)]
        if [tensor is not None and tuple(tensor.shape) for tensor in (a, b)] != shapes:
            raise UserError(f"{path}: {theirs} needs lora_A and lora_B of shapes {shapes}; these adapters are another "
                            f"model's, or do not fit their {CONFIG}")
        adapters |= zip(ours, apart(layers, a, b, alpha_of(theirs), dropout), strict=True)
    if tensors:
        raise UserError(f"{path}: {min(tensors)[:200]} has no place in this model")
    decoder.requires_grad_(False)
    for name, adapter in adapters.items():
        decoder.set_submodule(name, adapter)


def apart(layers, a, b, alpha, dropout):
    """An `Adapted` for each of the layers that have the adapter (a, b) together."""
    n, rank = len(layers), len(a) // len(layers)
    parts = b.split([layer.out_features for layer in layers])
    own = torch.block_diag(*[torch.ones(len(part), rank) for part in parts])
    if n == 1 or len(a) % n == 0 and not b[own == 0].any():  # as `save` writes them
        halves = [(a[i * rank : (i + 1) * rank], part[:, i * rank : (i + 1) * rank]) for i, part in enumerate(parts)]
    else:  # as PEFT trains them: one A for all
        halves, n, rank = [(a, part) for part in parts], 1, len(a)
    made = [Adapted(layer, rank, alpha / n, dropout) for layer in layers]
    for adapter, (own_a, own_b) in zip(made, halves, strict=True):
        adapter.a.copy_(own_a), adapter.b.copy_(own_b)
    return made
