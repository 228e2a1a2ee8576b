"""Hugging Face folders <-> `Decoder`.

`load(folder)` reads config.json and safetensors (or pytorch_model.bin) into fp32; `save` writes a folder that
`transformers` loads with the same logits; `fetch` turns a Hub name into a folder. What a config.json means and how its
tensors are called is known to `families.py`. Both directions are strict: a tensor left over, missing or of another
shape ends in a UserError that names it. Next: `train.py`, which loads and saves, or `lora.py`.
"""

import contextlib
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data
from hf import families, sandbox
from model import Decoder
from support.cli import UserError, read_json, write_json, writing

WHOLE = ("model.safetensors", "pytorch_model.bin")  # files of all weights; of shards there is an index of that name
TEXT_FILES, GENERATION = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "generation_config.json"
SIDE_FILES = (*TEXT_FILES, GENERATION, *"""special_tokens_map.json added_tokens.json vocab.json merges.txt
    tokenizer.model chat_template.json""".split())  # copied by `save`


def config(folder):
    """The Config that folder/config.json describes."""
    path = Path(folder) / "config.json"
    return families.parse(read_json(path), path)


def without_values(config):
    """A Decoder of shapes alone: nothing allocated, nothing drawn at random."""
    with torch.device("meta"):
        return Decoder(config)


def load(folder):
    """The Decoder in a folder, fp32 on the CPU, held once in memory. UserError: it is not as config.json says."""
    folder, found = Path(folder), {}
    decoder = without_values(config(folder))
    size = 4 * sum(parameter.numel() for parameter in decoder.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(f"{folder}: its weights need {size / 2**30:,.1f} GiB, this machine has {memory / 2**30:,.1f}")
    with tempfile.TemporaryDirectory() as spare:
        files = {as_safetensors(file, spare, size): file for file in weight_files(folder)}
        for tensor, theirs, ours in read(places(decoder, files, folder)):
            tensor = tensor.t() if families.transposed(theirs) else tensor
            pieces = tensor.split([len(decoder.get_parameter(name)) for name in ours])
            for name, piece in zip(ours, pieces, strict=True):
                if name not in found:
                    found[name] = piece.float().contiguous()
                elif not torch.equal(piece.float(), found[name]):
                    raise UserError(f"{folder}: lm_head.weight is not the embedding, though config.json ties the two")
    decoder.load_state_dict(found, assign=True)
    return decoder


def check_tokenizer(tokenizer, decoder):
    """Raises UserError where a tokenizer has ids for which the decoder has no embedding."""
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's embedding only "
                        f"{decoder.config.vocab_size}; choose the model's own --tokenizer")


def save(decoder, folder, source=None, dtype=torch.float32, tokenizer=None):
    """Write config.json and model.safetensors; a failure leaves what was in the folder as it was. source: the folder
    the decoder came from, whose tokenizer files and config.json (but for the dtype) go along; None: a config.json for
    LlamaForCausalLM or GPT2LMHeadModel is made. tokenizer: one that is to go along instead, with its stop token."""
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
        for name in SIDE_FILES:
            place = tokenizer.name if tokenizer and name != GENERATION else source
            if place and place not in data.TOKENIZERS and (Path(place) / name).exists():
                with writing(folder / name) as unfinished:
                    shutil.copyfile(Path(place) / name, unfinished)
        if tokenizer:
            end_answers(folder, fields, tokenizer.stop)
        with writing(folder / "model.safetensors") as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})
        write_json(folder / "config.json", fields)
    except SafetensorError as error:
        raise UserError(f"{folder}: cannot write there: {error}") from error


def end_answers(folder, fields, stop):
    """Have `generate` of transformers end at the token `stop`, too: a chat template may end answers with another token
    than the model's own (Qwen2.5's base models: <|im_end|>). fields: of config.json."""
    path = folder / GENERATION
    own = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with contextlib.suppress(UserError):  # a file that is no JSON stays as it is
        settings, known = read_json(path) if path.exists() else own, ends(folder, fields)
        if stop not in known:
            write_json(path, settings | {"eos_token_id": [stop, *known]})


def ends(folder, fields):
    """The ids at which `generate` of transformers ends, by generation_config.json or by the fields of config.json."""
    path = Path(folder, GENERATION)
    eos = (read_json(path) if path.exists() else fields).get("eos_token_id", fields.get("eos_token_id"))
    return [number for number in (eos if isinstance(eos, list) else [eos]) if isinstance(number, int)]


def fetch(name, model=True):
    """The folder `name`, or that of the Hub's `org/name`, downloaded unless cached. model=False: tokenizer alone."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{name}: no such folder, nor a Hugging Face name like org/model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; to download it from the Hub: pip install huggingface_hub") from None
    wanted = ["config.json", *SIDE_FILES, *(["model*.safetensors", "model.safetensors.index.json"] if model else [])]
    complete = revision = None
    for cached in (True, False):  # without a network, the latter gives what is in the cache, too
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=cached))
            revision = folder.name  # what is in the cache may be completed, but stays the version that it is
            text, settings, template = (folder / name for name in TEXT_FILES)
            if model:
                read_json(folder / "config.json"), weight_files(folder)  # a download that broke off is no model
            elif cached and not text.exists():
                continue
            complete = str(folder)
            if text.exists() and settings.exists() and (template.exists() or "chat_template" in read_json(settings)):
                break  # otherwise other programs may have fetched a part
        except Exception as failure:  # offline, gated, misspelt ...: the Hub's clients have many exceptions
            reason = str(failure).strip().split("\n")[0] or type(failure).__name__
    if complete is None:
        raise UserError(f"{name}: no such folder, not in the local cache, and no download: {reason}")
    return complete


# ---- files of weights


def weight_files(folder):
    """The files of weights in a folder: one, or the shards that an index lists."""
    for name in WHOLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index}: weight_map is missing")
            shards = sorted({str(shard) for shard in shards.values()})
            for shard in shards:
                if Path(shard).name != shard or not os.path.isfile(folder / shard):
                    raise UserError(f"{folder}/{shard[:200]}: no such file, though {index.name} lists it")
            return [folder / shard for shard in shards]
    raise UserError(f"{folder}: no weights there (model.safetensors, or pytorch_model.bin, or shards with an index)")


@contextlib.contextmanager
def opened(path):
    """A context: the safetensors file there."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as failure:  # ValueError: a name that is not UTF-8
        raise UserError(f"{path}: missing, damaged, or not a safetensors file ({failure})") from None


def read_tensors(path):
    """{name: tensor} of a small safetensors file."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def places(decoder, files, folder):
    """[(safetensors file, -elements, name there, (their name, our names)), ...], each held against config.json.
    files: {safetensors file: the file it was made from}."""
    wanted, names, found = decoder.state_dict(), families.names(decoder), []
    missing = dict(names)
    spare = {"lm_head.weight": ["embed.weight"]} if decoder.config.tied else {}  # some checkpoints hold it all the same
    names |= spare
    prefix = "transformer." if decoder.config.position == "learned" else "model."  # left out by some checkpoints
    for path, file in files.items():
        with opened(path) as header:
            for name in header.keys():
                theirs, where = name if name in names else prefix + name, f"{file}: tensor {name[:200]}"
                if theirs not in names and re.fullmatch(families.BUFFERS, name):
                    continue
                if missing.pop(theirs, None) is None and theirs not in spare:
                    raise UserError(f"{where} has no place in the model that config.json describes")
                ours, stored = names[theirs], header.get_slice(name)
                shape = (sum(len(wanted[part]) for part in ours), *wanted[ours[0]].shape[1:])
                shape = shape[::-1] if families.transposed(theirs) else shape
                if stored.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(f"{where} holds {stored.get_dtype()}; only F32, F16, BF16 weights are supported")
                if tuple(stored.get_shape()) != shape:
                    raise UserError(f"{where} has shape {tuple(stored.get_shape())}, but config.json asks for {shape}")
                found.append((path, -math.prod(shape), name, (theirs, ours)))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {next(iter(missing))}{more} is missing from the weights")
    return found


def read(places):
    """(tensor, their name, our names), one at a time; of each file the largest first, while there is room."""
    file, at, taken = None, None, 0
    for path, _, name, known in sorted(places):
        if path != at or taken > 2**22:  # anew now and then, or the file's pages would pile up in memory
            file, at, taken = safe_open(path, "pt"), path, 0
        tensor = file.get_tensor(name).clone()
        taken += tensor.nbytes
        yield tensor, *known


def as_safetensors(file, spare, size):
    """The file, or what a pickle's tensors, `size` bytes of them, become in the folder `spare`."""
    if file.suffix == ".safetensors":
        return file
    target = Path(spare, file.name)
    sandbox.start("hf.weights", file, size)("convert", str(target))
    return target


def convert(file, target):
    """Write the tensors of a pickle (pytorch_model.bin) as safetensors; in a process with limits, see sandbox.py."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    except Exception:  # whatever a damaged or hostile file provokes
        raise UserError(f"{file}: refused: damaged, or not just a dict of tensors: it could run code") from None
    save_file(state, target)


if __name__ == "__main__":
    sandbox.serve(lambda file: {"convert": lambda target: convert(file, target)})
