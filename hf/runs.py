"""The run folder: what train.py leaves on disk, and how eval.py and --resume read it back.

    config.json      every setting, how many rows it trains on, the sha256 of the data files, versions
    log.jsonl        one object per logged step, and one per validation
    checkpoint/      where training stands: a Hugging Face folder of the decoder, pred.safetensors ([PRED] vectors),
                     training.pt (optimizer, random state, step; opened with weights_only: it cannot run code)
    best/            a Hugging Face folder and pred.safetensors: the weights with the best validation score, or
                     without validation the last; what eval.py reads

Under LoRA, checkpoint/ holds the adapters and base.json, which names the folder they belong to; best/ is merged.

Everything is written under another name first and then renamed, so a crash leaves the old state or the new, never half.
"""

import argparse
import copy
import hashlib
import json
import os
import pickle
import platform
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf import lora, weights
from jepa import LLMJEPA
from support.cli import UserError, read_json, write, write_json

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of processes, set by torchrun
PATHS = ("data", "val", "out")  # the settings that are paths


def hardware(name="auto", dtype="float32"):
    """(device, autocast): where to run, and a context in which matrix products run in bfloat16 where that is wanted."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and WORLD > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as failure:
        raise UserError(f"--device {name}: {str(failure).splitlines()[0]}; leave the flag out, or give cpu") from None
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if dtype == "bfloat16" and not has_bf16:
        raise UserError(f"--dtype bfloat16: {device} has no fast bfloat16; leave the flag out")
    return device, partial(torch.autocast, device.type, torch.bfloat16, enabled=has_bf16 and dtype != "float32")


def create(args, rows):
    """Make the folder args.out (chosen here if None) and its config.json. An existing run is never touched.

    rows: how many examples it trains on.
    """
    if args.out is None:
        name = f"runs/lam{args.lam:g}-k{args.k}-seed{args.seed}"
        names = [name] + [f"{name}-{i}" for i in range(2, 10000)]
        args.out = next(path for path in map(Path, names) if not path.exists())
    if (args.out / "config.json").exists():
        raise UserError(f"{args.out} already holds a run; choose another --out, or go on with --resume {args.out}")
    settings = {n: str(v.resolve()) if isinstance(v, Path) else v for n, v in vars(args).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    config = {"arguments": settings, "rows": rows, "sha256": data_hashes(args), "versions": versions}
    write_json(args.out / "config.json", config)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def data_hashes(args):
    """{"data": sha256 of that file, "val": ... or None}"""
    return {"data": sha256(args.data), "val": args.val and sha256(args.val)}


def read(run):
    """(arguments, config) of a run folder. Raises UserError where `run` is none."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise UserError(f"{run}: no run here (no config.json); give a folder that train.py made")
    settings = field(path, "arguments")
    try:
        settings |= {name: Path(settings[name]) if settings[name] else None for name in PATHS}
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the config.json of a run; give a folder that train.py made") from None
    return argparse.Namespace(**settings), {"arguments": settings, "sha256": field(path, "sha256")}


def field(path, key):
    """One value of a JSON object that this file's functions wrote."""
    try:
        return read_json(path)[key]
    except KeyError:
        raise UserError(f"{path}: has no {key!r} as a run's file does; is this the folder of a run?") from None


def save_model(model, folder, source=None, training=None):
    """Write a model as `folder`, replacing the one that was there.

    source: the Hugging Face folder that the decoder came from. training: the state to resume from; without it the
    decoder is written as a model of its own, adapters merged.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    adapted = bool(lora.state(model.decoder))
    if adapted and training is not None:
        new.mkdir(parents=True)
        lora.save(model.decoder, new / "adapter.safetensors")
        write_json(new / "base.json", {"base": str(Path(source).resolve())})
    elif adapted:
        merged = copy.deepcopy(model.decoder)
        lora.merge(merged)
        weights.save(merged, new, source)
    else:
        weights.save(model.decoder, new, source)
    save_file({"pred": model.pred.detach().cpu().contiguous()}, new / "pred.safetensors")
    if training is not None:
        torch.save(training, new / "training.pt")
    if folder.exists():
        os.rename(folder, old)  # from here to the next line `old` is the state: see `resume`
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder, lora_dropout=0.0):
    """The `LLMJEPA` that save_model wrote; a Hugging Face folder without [PRED] vectors has k = 0."""
    folder = Path(folder)
    if (folder / "adapter.safetensors").exists():
        decoder = weights.load(field(folder / "base.json", "base"))
        lora.load(decoder, folder / "adapter.safetensors", lora_dropout)
    else:
        decoder = weights.load(folder)
    path = folder / "pred.safetensors"
    if not path.exists():
        return LLMJEPA(decoder, 0)
    try:
        pred = load_file(path)["pred"]
    except (SafetensorError, KeyError, OSError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); restore it from a copy, or train again") from None
    if pred.dim() != 2 or pred.shape[1] != decoder.config.d_model:
        raise UserError(
            f"{path}: pred has shape {list(pred.shape)}, the decoder wants [k, {decoder.config.d_model}]; "
            "the two files are not of one run"
        )
    model = LLMJEPA(decoder, len(pred))
    with torch.no_grad():
        model.pred.copy_(pred)
    return model


def resume(run):
    """(arguments, folder of the last checkpoint) of a run that is to go on."""
    args, config = read(run)
    args.out = Path(run)  # the folder may have been moved
    for name, now in data_hashes(args).items():
        if now != config["sha256"][name]:
            raise UserError(f"{getattr(args, name)}: has changed since {run} began; put the old file back")
    folder = args.out / "checkpoint"
    if not folder.exists():
        folder = args.out / "checkpoint.old"  # a crash came between the two renames of save_model
    if not folder.exists():
        raise UserError(f"{run}: holds no checkpoint to go on from; start the run anew with another --out")
    return args, folder


def restore(folder, optimizer, args):
    """Put optimizer and random state back as they were, cut the log back to that step; returns (step, best score)."""
    path = Path(folder) / "training.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wanted = [p.shape for group in optimizer.param_groups for p in group["params"]]
        found = [saved["optimizer"]["state"][i]["exp_avg"].shape for i in range(len(saved["optimizer"]["state"]))]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); this run cannot go on, start another") from None
    if found != wanted:
        raise UserError(f"{path}: is of a model of another shape than {folder}; this run cannot go on, start another")
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    log = args.out / "log.jsonl"
    if RANK > 0 or not log.exists():
        return saved["step"], saved["best"]
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= saved["step"]]
    write(log, "".join(kept))
    return saved["step"], saved["best"]
