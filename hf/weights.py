"""Hugging Face folders <-> `Decoder`.

`load(folder)` reads config.json and safetensors (or pytorch_model.bin) into fp32; `save` writes a folder that
`transformers` loads with the same logits; `fetch` turns a Hub name into a folder. What a config.json means and how its
tensors are called is known to `families.py`. Both directions are strict: a tensor left over, missing or of another
shape ends in a UserError that names it. Next: `train.py`, which loads and saves, or `lora.py`.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hf import families
from model import Decoder
from support.cli import UserError, read_json, write, writing

SIDE_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
    tokenizer.model chat_template.jinja chat_template.json generation_config.json""".split()  # copied by `save`


def config(folder):
    """The Config that folder/config.json describes."""
    path = Path(folder) / "config.json"
    return families.parse(read_json(path), path)


def load(folder):
    """The Decoder in a folder, fp32 on the CPU. Takes little more memory than its weights: nothing is held twice."""
    decoder = without_values(config(folder))
    wanted, names, found, spare_heads = decoder.state_dict(), families.names(decoder), {}, []
    prefix = "transformer." if decoder.config.position == "learned" else "model."  # left out by some checkpoints
    for name, tensor, file in _tensors(Path(folder)):
        theirs = name if name in names else prefix + name
        if theirs in names and names[theirs][0] not in found:
            found.update(_convert(tensor, theirs, names[theirs], wanted, f"{file}: tensor {name}"))
        elif name == "lm_head.weight":  # some tied checkpoints hold it all the same
            spare_heads.append((tensor, file))
        elif not re.fullmatch(families.BUFFERS, name):
            raise UserError(f"{file}: tensor {name} has no place in the model that config.json describes")
    missing = [theirs for theirs, ours in names.items() if ours[0] not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise UserError(f"{folder}: tensor {missing[0]}{more} is missing from the weights")
    for head, file in spare_heads:
        rows = zip(head.split(1024), found["embed.weight"].split(1024), strict=False)
        if head.shape != found["embed.weight"].shape or not all(torch.equal(a.float(), b) for a, b in rows):
            raise UserError(f"{file}: tensor lm_head.weight is not the embedding, though config.json ties the two")
    decoder.load_state_dict(found, assign=True)
    return decoder


def save(decoder, folder, source=None, dtype=torch.float32):
    """Write config.json and model.safetensors; a failure leaves what was in the folder as it was.

    source: the folder the decoder came from, whose config.json and tokenizer files go along (of config.json only the
    dtype changes, to that of the tensors). None: a config.json for LlamaForCausalLM or GPT2LMHeadModel is made.
    """
    folder, have = Path(folder), decoder.state_dict()
    fields = families.describe(decoder.config) if source is None else read_json(Path(source) / "config.json")
    if families.parse(fields, folder / "config.json") != decoder.config:
        raise UserError(f"{folder}: not saved: {source or 'a config.json made for it'} does not describe this decoder")
    fields |= {key: str(dtype).removeprefix("torch.") for key in ("torch_dtype", "dtype") if key in fields}
    tensors = {}
    for theirs, ours in families.names(decoder).items():
        joined = torch.cat([have[name] for name in ours]) if ours[1:] else have[ours[0]]
        tensors[theirs] = (joined.t() if families.transposed(theirs) else joined).to("cpu", dtype).contiguous()
    try:
        for name in SIDE_FILES if source else ():
            if (Path(source) / name).exists():
                with writing(folder / name) as unfinished:
                    shutil.copyfile(Path(source) / name, unfinished)
        with writing(folder / "model.safetensors") as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})
        write(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    except SafetensorError as error:
        raise UserError(f"{folder}: cannot write there: {error}") from error


def fetch(name):
    """`name` if it is a folder; otherwise the folder of the Hub model `org/name`, downloaded unless it is cached."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{name}: no such folder, nor a Hugging Face name like org/model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; to download it from the Hub: pip install huggingface_hub") from None
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *SIDE_FILES]
    try:
        folder = snapshot_download(name, allow_patterns=wanted, local_files_only=True)
        read_json(Path(folder) / "config.json"), _files(Path(folder))  # an interrupted download is not a cached model
        return folder
    except (OSError, ValueError, UserError):
        pass
    try:
        return snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # offline, gated, misspelt ...: the Hub's clients have many exceptions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: no such folder, not in the local cache, and no download: {reason}") from error


def without_values(config):
    """A Decoder of shapes alone: nothing allocated, nothing drawn at random."""
    with torch.device("meta"):
        return Decoder(config)


def read_tensors(path):
    """{name: tensor} of a small safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as failure:
        raise UserError(f"{path}: missing, damaged, or not a safetensors file: {failure}") from None


def _convert(tensor, theirs, ours, wanted, where):
    """One of their tensors -> {our name: fp32 tensor}."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"{where} holds {tensor.dtype}; only float32, float16 and bfloat16 weights are supported")
    rows = [wanted[name].shape[0] for name in ours]
    shape = (sum(rows), *wanted[ours[0]].shape[1:])
    shape = shape[::-1] if families.transposed(theirs) else shape
    if tensor.shape != shape:
        raise UserError(f"{where} has shape {tuple(tensor.shape)}, but config.json asks for {tuple(shape)}")
    pieces = (tensor.t() if families.transposed(theirs) else tensor).split(rows)
    return {name: piece.float().contiguous() for name, piece in zip(ours, pieces, strict=True)}


def _files(folder):
    """The files of weights in a folder: one, or the shards that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index}: weight_map is missing")
            for tensor, shard in shards.items():
                if Path(str(shard)).name != shard or not (folder / shard).exists():
                    raise UserError(f"{folder / str(shard)}: no such file, though {index.name} puts {tensor} there")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise UserError(f"{folder}: no weights there (model.safetensors, or pytorch_model.bin, or shards with an index)")


def _tensors(folder):
    """Name, tensor as stored, file: for every tensor of a folder, one at a time, so that memory holds little twice."""
    for file in _files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    sizes = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}
                for name in sorted(sizes, key=sizes.get, reverse=True):  # the largest while there is still room
                    with safe_open(file, "pt") as opened:  # anew each time, or pages of the file would pile up
                        tensor = opened.get_tensor(name).clone()
                    yield name, tensor, file
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: damaged, or not a safetensors file: {error}") from error
            continue
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file provokes
            raise UserError(f"{file}: refused: damaged, or not merely tensors, and then it could run code") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{file}: must hold a dict of tensors and nothing else")
        while state:
            yield *state.popitem(), file
