"""The run folder: what train.py leaves on disk, and how eval.py and --resume get it back.

    config.json      every setting, how many rows it trains on, sha256 of all files it depends on, versions
    log.jsonl        one object per logged step, and one per validation
    checkpoint/      where training stands: a Hugging Face folder of the decoder, pred.safetensors ([PRED] vectors),
                     training.pt (optimizer, random states, steps; opened with weights_only: it cannot run code)
    best/            a Hugging Face folder and pred.safetensors: the weights that validation chose; eval.py opens them

Under LoRA, checkpoint/ holds the adapters in PEFT's format; best/ is merged. A folder is written under another name
first and then renamed, so a crash leaves the old state or the new, never half.
"""

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import data
import hf
from hf import lora, weights
from jepa import LLMJEPA
from support import processes
from support.cli import Stopped, UserError, read_json, write, write_json

# ---- what a run depends on


def digest(*paths):
    """sha256 of one file, or of several together."""
    found = []
    for path in paths:
        with open(path, "rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def model_files(folder):
    """What a model in a Hugging Face folder consists of: weights, settings, tokenizer, chat template."""
    folder, found = Path(folder), {"config.json", "pred.safetensors", lora.CONFIG, lora.TENSORS}
    found |= {name for name in weights.SIDE_FILES if name.endswith((".json", ".jinja"))}  # the others are not read here
    found |= {f"{name}.index.json" for name in weights.WHOLE}
    with contextlib.suppress(UserError):  # adapters, or a tokenizer alone
        found |= {path.name for path in weights.weight_files(folder)}
    return sorted(folder / name for name in found if (folder / name).is_file())


def tokenizer_digest(name):
    if name == "synth":
        return digest(data.SYNTH_RANKS)
    if name in data.TOKENIZERS:
        return name
    folder = weights.fetch(name, model=False)
    return digest(*(f for f in model_files(folder) if "token" in f.name or f.suffix == ".jinja"))


def digests(args):
    """{what: sha256} of everything that decides what a run computes, besides its settings."""
    init = None if args.init == "tiny" else digest(*model_files(weights.fetch(args.init)))
    return {"data": digest(args.data), "val": args.val and digest(args.val),
            "tokenizer": tokenizer_digest(args.tokenizer), "init": init}


# ---- the folder


def create(args, rows):
    """Make the folder args.out (chosen here if None) and its config.json; returns its `lock`. What is there already is
    never touched. rows: how many examples it trains on."""
    sums = digests(args)  # takes seconds for a large model
    if args.out is None:
        name = f"runs/lam{args.lam:g}-k{args.k}-seed{args.seed}"
        for path in [Path(name)] + [Path(f"{name}-{i}") for i in range(2, 10000)]:
            with contextlib.suppress(FileExistsError):  # of runs that begin together each makes its own
                path.mkdir(parents=True)
                args.out = path
                break
    if (args.out / "config.json").exists():
        raise UserError(f"{args.out} already holds a run; give another --out, or --resume {shlex.quote(str(args.out))}")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty and holds no run; choose another --out")
    settings = {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in vars(args).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(args.out / "config.json", {"arguments": settings, "rows": rows, "sha256": sums, "versions": versions})
    return lock(args.out)


def lock(run):
    """Hold a run for this process until it ends, however it ends. Keep what is returned. UserError if it is held."""
    file = open(Path(run) / "config.json", "r+")  # NFS locks only what may be written
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run}: another process is training this run; wait for it, or stop it first") from None
    except OSError as failure:
        if failure.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        print(f"{run}: its file system knows no locks, so nothing stops a second process here", file=sys.stderr)
    return file


def settings(run):
    """The config.json of a run folder, checked as far as this project's readers need. UserError where there is none."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise UserError(f"{run}: no run here (no config.json); give a folder that train.py made")
    config = read_json(path)
    arguments, sums = config.get("arguments"), config.get("sha256")
    if not isinstance(arguments, dict) or not isinstance(sums, dict) or not all(
            isinstance(arguments.get(name), str) for name in ("init", "tokenizer", "data", "layout")) or any(
            "\0" in str(value) for value in arguments.values()):  # which no path has
        raise UserError(f"{path}: not the config.json of a run; give a folder that train.py made")
    return config


def flags(run):
    """The settings of a run as command-line flags, so that --resume checks them as it checks what a user types."""
    kept = {"optimizer": "adamw"} | settings(run)["arguments"]  # older runs do not name it
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()
            if name not in ("out", "resume") and value is not None and value is not False]


def check_unchanged(args, run):
    """Refuse to go on with a run if a file that it depends on is another now."""
    before = settings(run)["sha256"]
    for name, now in digests(args).items():
        if name in before and now != before[name]:
            raise UserError(f"{getattr(args, name)}: has changed since {run} began; put the old files back")


def log(run, **line):
    """Append one JSON object to a run's log; what is not a finite number becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    with open(Path(run) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_log(run):
    """The objects of a run's log; none if there is no log yet. Damaged lines (a power cut) are left out."""
    path, found = Path(run) / "log.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = list(filter(None, text.split("\n")))
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
    if len(found) < len(lines):
        print(f"{path}: {len(lines) - len(found)} damaged lines are left out", file=sys.stderr)
    return found


# ---- models


def save_model(model, folder, source=None, training=None, tokenizer=None):
    """Write an `LLMJEPA` as `folder`, in place of an older one, which stays where that fails or a weight is not finite.
    training: the state to resume from; without it the decoder is written as a model of its own, adapters merged.
    source: the Hugging Face folder that the decoder came from. tokenizer: see `weights.save`."""
    folder = Path(folder)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise Stopped(f"{folder}: not saved, {name} is not finite; what was saved before is still there")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    decoder, adapted = model.decoder, bool(lora.adapted_layers(model.decoder))
    try:
        if adapted and training is None:
            on_cpu = {id(p): nn.Parameter(p.detach().to("cpu", copy=True)) for p in decoder.parameters()}
            decoder = copy.deepcopy(decoder, on_cpu)  # a GPU may have no room for another
            lora.merge(decoder)
        if adapted and training is not None:
            lora.save(decoder, new, source)
        else:
            weights.save(decoder, new, source, tokenizer=tokenizer)
        save_file({"pred": model.pred.detach().cpu().contiguous()}, new / "pred.safetensors")
        if training is not None:
            torch.save(training, new / "training.pt")
        for path in new.iterdir():
            path.chmod(new.stat().st_mode & 0o666)  # safetensors makes its files for the owner alone
            with open(path) as file:
                os.fsync(file.fileno())  # on the disk before it is renamed: the power may fail, too
    except (RuntimeError, OSError, SafetensorError, UserError) as failure:  # a full disk shows itself in many ways
        shutil.rmtree(new, ignore_errors=True)
        reason = str(failure).splitlines()[0]
        raise Stopped(f"{folder}: cannot be written ({reason}); what was saved before is still there") from None
    replace(folder)


def save_checkpoint(model, optimizer, args, source, state):
    """Leave in checkpoint/ what a run goes on from. state: {"step", "bad", "random"}. All processes call this."""
    folder = args.out / "checkpoint"
    if args.shard:
        if not processes.finite_everywhere(model):
            raise Stopped(f"{folder}: not saved, a weight is not finite; what was saved before is still there")
        processes.save_shards(model, optimizer, folder.with_name("checkpoint.new"))
        if processes.RANK == 0:
            torch.save(state, folder.with_name("checkpoint.new") / "training.pt")
            replace(folder)
    elif processes.RANK == 0:
        base = args.init if args.lora_rank else source  # adapters name their base model, and may be moved
        save_model(model, folder, base, state | {"optimizer": optimizer.state_dict()})


def save_best(model, args, source, tokenizer):
    """Write the weights as best/. All processes call this: of a sharded model each holds a part only."""
    if args.shard:
        state = processes.whole_weights(model)
        if processes.RANK == 0:
            model = LLMJEPA(weights.without_values(model.decoder.config), len(model.pred))
            model.load_state_dict(state, assign=True)
    if processes.RANK == 0:
        save_model(model, args.out / "best", source, tokenizer=tokenizer)


def load_checkpoint(model, optimizer, args):
    """Put optimizer, random states, and the weights of a sharded model back as they were; returns the step, and how
    many were not taken: in a row up to then, and in all."""
    folder = standing(args.out, "checkpoint")
    if folder is None:
        return 0, (0, 0)  # stopped before its first checkpoint: it goes on from the beginning
    if args.shard:
        processes.load_shards(model, optimizer, folder)
    path = folder / "training.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, bad, random = state["step"], state.get("bad", (0, 0)), state["random"]
        if not args.shard:
            moments = state["optimizer"]["state"]
            wanted = [p.shape for group in optimizer.param_groups for p in group["params"]]
            if [moments[i]["exp_avg"].shape for i in range(len(moments))] != wanted:
                raise UserError(f"{path}: is of a model of another shape than {folder}; this run cannot go on")
            optimizer.load_state_dict(state["optimizer"])
        cpu, *gpus = random[processes.RANK % len(random)]
        torch.set_rng_state(cpu)
        if torch.cuda.is_available() and len(gpus) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(gpus)
        assert all(isinstance(number, int) and number >= 0 for number in (step, *bad)) and len(bad) == 2
    except UserError:
        raise
    except Exception as failure:  # a damaged file provokes whatever it likes
        reason = "it is no checkpoint" if isinstance(failure, pickle.UnpicklingError) else repr(failure)[:200]
        raise UserError(f"{path}: cannot be read ({reason}); this run cannot go on, start another") from None
    return step, bad


def replace(folder):
    """Put what stands in FOLDER.new in the place of FOLDER; the old one stays until the new one is there."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(old):  # a link to another disk, or on NFS what another process has open
            os.rename(old, f"{old}.{new.stat().st_mtime_ns}")
        os.rename(folder, old)  # from here to the next line `old` is the state: see `standing`
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def standing(run, *names):
    """The first of these folders of a run that exists, also if a crash came between the two renames of `replace`."""
    folders = (Path(run) / f"{name}{end}" for name in names for end in ("", ".old"))
    return next((folder for folder in folders if folder.exists()), None)


def load_model(folder, lora_dropout=0.0):
    """The `LLMJEPA` that save_model wrote; a Hugging Face folder without [PRED] vectors has k = 0."""
    adapted, path = Path(folder, "adapter_config.json").exists(), Path(folder, "pred.safetensors")
    decoder = weights.load(weights.fetch(lora.base_of(folder)) if adapted else folder)
    if adapted:
        lora.load(decoder, folder, lora_dropout)
    model = LLMJEPA(decoder, 0)
    if path.exists():
        pred = weights.read_tensors(path).get("pred", torch.zeros(0))
        if pred.dim() != 2 or pred.shape[1] != decoder.config.d_model:
            raise UserError(f"{path}: pred has shape {list(pred.shape)}, the decoder wants [k, "
                            f"{decoder.config.d_model}]; the two files are not of one run")
        model.pred = nn.Parameter(pred.float().clone())
    return model


def cut_log(run, step):
    """Drop what a run logged after `step`; returns the validations that are left."""
    kept = [line for line in read_log(run) if line["step"] <= step]
    if (Path(run) / "log.jsonl").exists():
        write(Path(run) / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    return [line for line in kept if "val_lm" in line]


@dataclass
class Opened:
    """A model to be evaluated."""

    model: LLMJEPA
    tokenizer: data.Tokenizer
    stops: set  # ids that end an answer: the template's, and those that the model itself has been given
    layout: dict  # how training laid out the views; empty for a Hugging Face folder
    seed: int | None  # of training
    data: str | None  # what it was trained on
    stamp: str  # digest of every file that its answers depend on


def is_run(path):
    """Is this a run folder of train.py? Otherwise it is a Hugging Face folder. UserError where it is neither."""
    if (Path(path) / lora.CONFIG).exists():
        return False  # adapters: they name their base model
    if not (Path(path) / "config.json").exists():
        raise UserError(f"{path}: no run and no model here (no config.json); give a folder of train.py or Hugging Face")
    return "arguments" in read_json(Path(path) / "config.json")


def open_model(path, device, tokenizer=None):
    """The `Opened` model of a run folder (its best checkpoint if it has one, else its last), of such a checkpoint, or
    of a Hugging Face folder. tokenizer: the name of another one than the model's own."""
    folder, layout, seed, trained_on = Path(path), {}, None, None
    name = os.path.abspath(path) if str(path) in data.TOKENIZERS else str(path)
    run, within = folder, folder.resolve().parent
    if not is_run(path) and folder.resolve().name in ("best", "checkpoint") and (within / "log.jsonl").exists():
        run = within
    if is_run(run):
        arguments = settings(run)["arguments"]
        kinds = ["best"] if arguments.get("shard") else ["best", "checkpoint"]  # a part of a model cannot be opened
        folder = standing(run, *kinds) if run == folder else folder
        seed, trained_on = arguments.get("seed"), arguments["data"]
        if folder is None:
            raise UserError(f"{path}: holds no checkpoint yet; try: python train.py --resume {shlex.quote(str(path))}")
        best = folder.name.startswith("best") and arguments["tokenizer"] not in data.TOKENIZERS  # has that of training
        own = (folder / "tokenizer.json").exists() and (best or arguments["tokenizer"] == arguments["init"])
        name = str(folder) if own else arguments["tokenizer"]
        layout = {"layout": arguments["layout"]} | {key: bool(arguments.get(key)) for key in ("front_pred", "reverse")}
    files, name, home = model_files(folder), tokenizer or name, folder  # home: of config.json
    if (folder / lora.CONFIG).exists():
        home = Path(weights.fetch(lora.base_of(folder)))
        files += model_files(home)
        if name == str(path) and not (folder / "tokenizer.json").exists():
            name = str(home)
    before = [file.stat() for file in files]
    model, stamp = load_model(folder), f"{digest(*files)[:16]} {tokenizer_digest(name)[:16]}"
    if any(not os.path.samestat(file.stat(), known) for file, known in zip(files, before, strict=True)):
        raise UserError(f"{folder}: has changed while it was read; try again")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{folder}: its weights are not finite, so it has no answers; evaluate another checkpoint")
    opened = hf.tokenizer(name)
    weights.check_tokenizer(opened, model.decoder)
    own = name in (str(folder), os.path.abspath(folder), str(home))
    stops = {opened.stop, *(weights.ends(home, read_json(home / "config.json")) if own else [])}
    return Opened(model.to(device).eval(), opened, stops, layout, seed, trained_on, stamp)
