"""LoRA: train a small correction to each projection and leave the pretrained weights alone.

Hu et al., arXiv 2106.09685, section 4.1: W x becomes W x + (alpha / rank) B A x, where A (rank, in) is drawn at random
and B (out, rank) starts at zero, so that training begins at the pretrained model. Only A and B are trained.

`add` puts adapters into a `Decoder`; `merge` folds them into its weights, for export with `weights.save`; `save` and
`load` keep the adapters alone, a few megabytes. The [PRED] vectors live outside the decoder: they stay trainable.
Next: `train.py`, which has one flag for this.
"""

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.cli import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def _places(decoder, kind):
    """(parent, name, layer, layer's full name) of every attention and MLP projection that is a `kind`."""
    for path, parent in list(decoder.named_modules()):
        for name, layer in list(parent.named_children()):
            if name in PROJECTIONS and isinstance(layer, kind):
                yield parent, name, layer, f"{path}.{name}"


def add(decoder, rank, alpha=None, dropout=0.0):
    """Freeze the decoder and give every projection an adapter, in place. alpha None: rank, a scale of 1."""
    assert rank > 0, "an adapter needs a rank of at least 1"
    assert not list(_places(decoder, Adapted)), "this decoder has adapters already: merge them first"
    decoder.requires_grad_(False)
    for parent, name, layer, _ in _places(decoder, nn.Linear):
        setattr(parent, name, Adapted(layer, rank, rank if alpha is None else alpha, dropout))


@torch.no_grad()
def merge(decoder):
    """Fold every adapter into its weights and take it away, in place; the decoder can be trained whole again."""
    for parent, name, layer, _ in _places(decoder, Adapted):
        layer.base.weight += layer.scale * (layer.b @ layer.a)
        setattr(parent, name, layer.base)
    decoder.requires_grad_(True)


def state(decoder):
    """The adapters' tensors by name, such as blocks.0.attn.q_proj.a; they share memory with the decoder."""
    return {f"{path}.{k}": getattr(layer, k).detach() for _, _, layer, path in _places(decoder, Adapted) for k in "ab"}


def save(decoder, path):
    """Write the adapters alone; alpha goes along as metadata."""
    path, adapters = Path(path), [layer for _, _, layer, _ in _places(decoder, Adapted)]
    assert adapters, "this decoder has no adapters"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state(decoder).items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": "pt", "alpha": repr(adapters[0].alpha)})
    os.replace(part, path)


@torch.no_grad()
def load(decoder, path, dropout=0.0):
    """Add the adapters that `save` wrote to a decoder without any, in place."""
    try:
        with safe_open(path, "pt") as file:
            saved, alpha = {name: file.get_tensor(name) for name in file.keys()}, float(file.metadata()["alpha"])
        rank = len(saved["blocks.0.attn.q_proj.a"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a file of adapters, or damaged ({error})") from error
    add(decoder, rank, alpha, dropout)
    wanted = state(decoder)
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape:
            merge(decoder)  # B is still zero: this leaves the decoder as it was
            raise UserError(f"{path}: {name} is not as this decoder needs it; the adapters are another model's")
    for name, tensor in wanted.items():
        tensor.copy_(saved[name])
