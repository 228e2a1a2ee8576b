"""Train a decoder with LLM-JEPA, on one CPU or GPU (or several, under torchrun).

    python train.py --lam 2 --k 1                 # the default data, a tiny decoder from scratch
    python train.py --lam 0                       # plain fine-tuning: the same code path without the other views
    python train.py --resume runs/lam2-k1-seed0   # go on after Ctrl-C or a crash, to the same numbers

A run folder holds config.json (every setting), log.jsonl (one object per logged step and validation), loss.png,
checkpoint/ (where training stands; --resume takes it from there) and best/ (the weights that --val chose, or the last).
In this file: the flags, then one optimizer step, then what happens around the steps. Read next: `eval.py`.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import hf
from evaluation import plots
from evaluation.validation import is_best, validate
from hf import lora, runs, weights
from jepa import DISTANCES, IN_BATCH, LLMJEPA, PAD
from model import Config, Decoder
from support import cli, processes
from support.cli import Stopped, UserError
from support.muon import Muon
from support.processes import RANK, WORLD

SYNTH = Path(os.path.relpath(Path(__file__).parent / "datasets"))  # relative, so that --help and messages are short

FLAGS = cli.parser(__doc__)

add = FLAGS.add_argument_group("data").add_argument
add("--data", type=Path, default=SYNTH / "synth_train.jsonl", help="JSONL of conversations to train on")
add("--val", type=Path, help="JSONL to validate on after each epoch; default for the default data: synth_val.jsonl")
add("--tokenizer", help="synth, gpt2 or a Hugging Face folder or repo id; default: that of --init, synth for tiny")
add("--too_long", choices=["refuse", "skip"], default="refuse",
    help="rows that do not fit into the model's context are refused, or skipped and reported")
add("--train_on", choices=["answer", "all"], default="answer",
    help="targets: the answer and its stop token, or the whole conversation (plain text, pretraining)")
add("--no_stop_label", action="store_true",
    help="never train on the stop token; with --train_on all this is what the official code really optimises")
add("--shuffle_pairs", action="store_true",
    help="control: JEPA pairs each Text with another example's Code, anew each epoch. A gain that survives this "
    "does not come from the pairing")

add = FLAGS.add_argument_group("model").add_argument
add("--init", default="tiny", help="tiny (from scratch), or a Hugging Face folder or repo id to start from")
add("--n_layer", type=cli.whole(1, 2000), default=4, help="tiny: number of blocks")
add("--n_head", type=cli.whole(1, 10_000), default=4, help="tiny: attention heads")
add("--d_model", type=cli.whole(1, 100_000), default=128, help="tiny: hidden width")
add("--block_size", type=cli.whole(1, 2**24 - 1), default=512, help="tiny: the longest view, in tokens")
add("--lora_rank", type=cli.whole(0, 100_000), default=0,
    help="train adapters of this rank on all projections; 0: train all weights")
add("--lora_alpha", type=cli.number(above=True), help="the adapters' scale is alpha / rank; default: the rank")
add("--lora_dropout", type=cli.number(0, 0.999), default=0.0, help="dropout in front of the adapters")

add = FLAGS.add_argument_group("method").add_argument
add("--lam", type=cli.number(), default=1.0, help="weight of the JEPA loss; 0 is plain fine-tuning")
add("--k", type=cli.whole(0, 10_000), default=1,
    help="number of [PRED] tokens after Text; 0: Text's own last state predicts")
add("--distance", choices=DISTANCES, default="cosine",
    help="between predicted and actual encoding of Code. cosine is the paper's, l2 and mse are variants of it; infonce "
    "and uniform also push different examples of a forward pass apart, so that collapse is no minimum")
add("--gamma", type=cli.number(), default=1.0, help="weight of the next-token loss")
add("--loss_dropout", type=cli.number(0, 1), default=0.0,
    help="probability that a step has the next-token loss only and costs no more than plain fine-tuning")
add("--layout", choices=["fused", "paper"], default="fused",
    help="fused: all views in one row; paper: two rows, Text encoded anew without the system turn")
add("--front_pred", action="store_true",
    help="[PRED] before the user's content, not after it; needs --layout paper. The paper found it worse: "
    "68.07 %% against 71.46 %% exact match (NL-RX-SYNTH, Llama-3.2-1B)")
add("--reverse", action="store_true",
    help="Code predicts Text: [PRED] after Code. The paper found it worse: 65.70 %% against 71.46 %%")
add("--stop_grad", choices=["none", "text", "code"], default="none",
    help="view whose encoding is a constant in the JEPA loss; the one that predicts takes [PRED] with it")

add = FLAGS.add_argument_group("optimisation").add_argument
add("--optimizer", choices=["adamw", "muon"],
    help="muon (blocks' matrices; adamw for the rest) learns faster from scratch: default for tiny, else adamw")
add("--epochs", type=cli.whole(1), default=4, help="passes over the data")
add("--max_steps", type=cli.whole(1), help="at most this many optimizer steps; the schedule ends there, too")
add("--batch_size", type=cli.whole(1),
    help="examples per forward pass, of all processes together; default 32 for tiny, 4 otherwise")
add("--grad_accum", type=cli.whole(1), default=1,
    help="forward passes per optimizer step, averaged exactly (infonce and uniform compare only those of one pass)")
add("--lr", type=cli.number(), help="peak learning rate; default 3e-3 for tiny (2e-3 with adamw), 2e-5 otherwise")
add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the learning rate after warm-up")
add("--warmup", type=cli.number(0, 1), default=0.03,
    help="fraction of all steps in which the learning rate rises to its peak")
add("--weight_decay", type=cli.number(), default=0.1, help="on matrices only, embeddings among them")
add("--clip", type=cli.number(above=True), default=1.0,
    help="gradients are scaled down to this norm (which hardly matters to Muon)")
add("--seed", type=cli.whole(0, 2**63 - 1), default=0,
    help="of all that is random: initial weights, order of the data, dropout, shuffled pairs")

add = FLAGS.add_argument_group("hardware").add_argument
add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device such as cuda:1")
add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
    help="bfloat16 is autocast over fp32 weights, where the hardware is fast at it; auto uses it on GPUs only")
add("--compile", action="store_true",
    help="torch.compile the blocks: quicker steps, above all in bfloat16, after half a minute; needs a C++ compiler")
add("--checkpoint_activations", action="store_true", help="recompute blocks in the backward pass, to save memory")
add("--shard", action="store_true", help="under torchrun: each process holds a part of every weight (FSDP2)")

add = FLAGS.add_argument_group("run").add_argument
add("--log_every", type=cli.whole(1), default=10, help="steps between lines of log.jsonl")
add("--save_minutes", type=cli.number(), default=10.0, help="minutes between checkpoints within an epoch")
add("--out", type=Path, help="run folder, new or empty; default runs/lam..-k..-seed.., numbered if taken")
add("--resume", type=Path, metavar="RUN", help="go on with this run, with the settings in its config.json")


def arguments():
    """The settings: of the command line, or of the run that is to be resumed."""
    args = FLAGS.parse_args()
    if args.resume is None:
        return check(args)
    for word in sys.argv[1:]:
        if word.startswith("--") and not word.startswith("--resume"):
            raise UserError(f"--resume takes every setting from the run's config.json; leave out {word.split('=')[0]}")
    try:
        kept = check(FLAGS.parse_args(runs.flags(args.resume)))
    except UserError as mistake:
        where = f"{args.resume / 'config.json'}: "
        raise UserError(where + str(mistake).removeprefix(where)) from None
    kept.out, kept.resume = args.resume, args.resume  # the folder may have been moved
    return kept


def check(args):
    """Fill in settings that depend on others, and refuse those that cannot work together. Returns args."""
    tiny, lr = args.init == "tiny", 2e-3 if args.optimizer == "adamw" else 3e-3
    if not tiny and Path(args.init).is_dir():  # a run is resumed and evaluated from any folder
        args.init = str(Path(args.init).resolve())
    for_tiny = {"tokenizer": "synth", "optimizer": "muon", "batch_size": 32, "lr": lr}
    pretrained = {"tokenizer": args.init, "optimizer": "adamw", "batch_size": 4, "lr": 2e-5}
    for name, value in (for_tiny if tiny else pretrained).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.tokenizer not in data.TOKENIZERS and Path(args.tokenizer).is_dir():
        args.tokenizer = str(Path(args.tokenizer).resolve())
    pred_moved, in_batch = args.front_pred or args.reverse, args.distance in IN_BATCH and args.lam > 0
    for wrong, message in (
        (args.d_model % (2 * args.n_head), f"--d_model {args.d_model}: must be an even multiple of --n_head"),
        (in_batch and args.batch_size == 1, f"--distance {args.distance} compares rows; give --batch_size 2 or more"),
        (args.front_pred and args.reverse, "--front_pred puts [PRED] into Text and --reverse behind Code; choose one"),
        (pred_moved and args.k == 0, "--front_pred and --reverse move [PRED], and --k 0 has none; give --k 1 or more"),
        (args.front_pred and args.layout == "fused", "--front_pred lets a fused answer see [PRED]; add --layout paper"),
        (args.lora_rank and tiny, "--lora_rank adapts a pretrained model; give --init a folder or repo id"),
        (not args.lora_rank and (args.lora_alpha or args.lora_dropout), "--lora_alpha/--lora_dropout need --lora_rank"),
        (args.shard and (WORLD == 1 or args.lora_rank),
         "--shard divides a whole model among processes; start it with torchrun, without --lora_rank"),
    ):
        if wrong:
            raise UserError(message)
    for path in filter(None, (args.data, args.val)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file, so --resume could not read it again; give a JSONL file")
    if args.val is None and args.data.resolve() == (SYNTH / "synth_train.jsonl").resolve():
        args.val = SYNTH / "synth_val.jsonl"
    return args


@dataclass
class Run:
    """What the parts of training share."""

    args: argparse.Namespace
    model: LLMJEPA
    tokenizer: data.Tokenizer
    examples: list[data.Example]
    places: list[str]  # file:line of each example
    val_rows: tuple[list, list] | None  # conversations and examples of --val
    source: Path | None  # the Hugging Face folder that the model came from
    device: torch.device
    autocast: Callable  # a context for the forward pass
    layout: dict  # how `data.collate` lays out the views
    wrapped: torch.nn.Module = None  # the model to call in training: itself, or the wrapper of several processes
    optimizer: torch.optim.Optimizer = None
    step: int = 0  # optimizer steps done
    total: int = 0  # of this run
    bad: tuple = (0, 0)  # (failures, skipped) as the checkpoint has them
    failures: torch.Tensor = None  # steps in a row that were not taken; on the device, like the gradient
    skipped: torch.Tensor = None  # all steps that were not taken
    validations: list = None  # what the log says of them
    saved_at: float = 0.0  # seconds, of time.monotonic


# ---- one optimizer step


def make_optimizer(model, args):
    """AdamW; with --optimizer muon, Muon for blocks' matrices. Weight decay: on matrices, not norms, biases, [PRED]."""
    in_blocks, matrices, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or name == "pred":
            others.append(p)
        elif args.optimizer == "muon" and ".blocks." in name:
            in_blocks.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if in_blocks:
        groups.append({"params": in_blocks, "weight_decay": args.weight_decay, "muon": True})
    return Muon(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)  # which is AdamW for groups without "muon"


def learning_rate(step, total, args):
    """Linear warm-up, then the schedule; cosine and linear would reach zero at step == total."""
    warmup = max(1, round(args.warmup * total))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "linear": 1 - progress, "constant": 1.0}
    return args.lr * shape[args.schedule]


def batch_of(run, examples, jepa):
    """The batch of a forward pass; with several processes, this one's share. A process that has no example of its own
    takes part with one that has no labels and no pairs."""
    own = examples[RANK::WORLD]
    multiple = processes.width_multiple(run.device, run.args.dtype)
    batch = data.collate(own or examples[:1], run.args.k, jepa=jepa, multiple=multiple, **run.layout)
    nothing = {name: getattr(batch, name)[:0] for name in ("label_at", "label", "text_at", "code_at")}
    return batch if own else batch._replace(**nothing)


def take_step(run, examples):
    """One optimizer step on these examples. Returns what is logged; losses and norm stay on the device."""
    args, optimizer = run.args, run.optimizer
    # the learning rate of this step
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.total, args)
    # JEPA-loss dropout: a dropped step is plain fine-tuning, its other views are not even built
    jepa = args.lam > 0 and not data.dropped(args.loss_dropout, args.seed, run.step)
    # losses and gradients, one micro-batch after the other; each gives its share of the mean over the whole step
    whole, sums, tokens = data.count(examples, jepa), torch.zeros(3, device=run.device), 0
    for start in range(0, len(examples), args.batch_size):
        batch = batch_of(run, examples[start : start + args.batch_size], jepa)
        tokens += (batch.segment != PAD).sum().item()
        run.wrapped.require_backward_grad_sync = start + args.batch_size >= len(examples)  # DDP sends once a step
        with run.autocast():
            part = run.wrapped(batch.to(run.device), args.lam, args.distance, args.gamma, args.stop_grad, whole)
        (part.total * WORLD).backward()  # DDP and FSDP average over processes, and shares must be summed
        sums += torch.stack(part).detach()
    for p in (p for p in run.model.parameters() if p.requires_grad and p.grad is None):
        p.grad = torch.zeros_like(p)  # the empty [PRED] of k = 0 has none, and must have moments to resume from
    # clip; a step whose gradient is not finite is not taken: the optimizer leaves everything as it was
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
    norm = norm.full_tensor() if args.shard else norm  # a sharded tensor knows only its process's part
    optimizer.found_inf = (~norm.isfinite()).float()  # fused AdamW and Muon look at it
    if run.device.type != "mps" or norm.isfinite():  # torch's AdamW for MPS does not
        optimizer.step()
    optimizer.zero_grad()
    run.failures = optimizer.found_inf * (run.failures + 1)
    run.skipped += optimizer.found_inf
    run.step += 1
    return {"sums": sums, "norm": norm, "tokens": tokens, "jepa": jepa}


# ---- around the steps


def fit(run):
    """Train from run.step to the last step, or until somebody stops the run. Returns whether training is complete.

    Order of the data, learning rate and dropped steps are functions of the step, and random states are saved, so that
    a run stopped and resumed equals one that never stopped (on a CPU to the bit).
    """
    args, size = run.args, run.args.batch_size * run.args.grad_accum
    lengths = [len(e.full) for e in run.examples]
    per_epoch = math.ceil(len(lengths) / size)
    run.total = min(args.epochs * per_epoch, args.max_steps or math.inf)
    run.failures, run.skipped = torch.tensor(run.bad, dtype=torch.float32, device=run.device)
    run.saved_at = time.monotonic()
    stop = processes.Stop()
    if run.step and not any(line["step"] == run.step for line in run.validations):
        validate_if_due(run, per_epoch)  # the run was stopped before it could
    while run.step < run.total:
        epoch, first = divmod(run.step, per_epoch)
        # the steps left in this epoch (fewer after a resume), up to the last step of the run
        steps = data.order(lengths, size, args.seed, epoch)[first:][: run.total - run.step]
        examples = run.examples
        if args.shuffle_pairs:  # each with another one's Code
            partners = data.derangement(len(examples), args.seed, epoch)
            examples = [replace(e, code=examples[i].code) for e, i in zip(examples, partners, strict=True)]
        bar = tqdm(steps, f"epoch {epoch + 1}/{args.epochs}", unit="step", leave=False, disable=RANK > 0,
                   mininterval=0.2 if sys.stderr.isatty() else 30)
        began, tokens = time.perf_counter(), 0  # since the last logged step, or the beginning of the epoch
        for members in bar:
            result = take_step(run, [examples[i] for i in members])
            tokens += result["tokens"]
            # what reads the device back, and so waits for it, happens at logged steps only (but on MPS; no CPU waits)
            logged = run.step % args.log_every == 0 or run.step == run.total
            if logged:
                log_step(run, bar, epoch, result, tokens, began)
                began, tokens = time.perf_counter(), 0
            if logged or run.device.type == "cpu":
                stop_if_failing(run, members)
            # save now and then, and when somebody wants to stop: all processes, if one does
            due = time.monotonic() - run.saved_at > 60 * args.save_minutes
            stopping, due = processes.any_of(stop.wanted, due)
            if stopping or due:
                save(run)
            if stopping and run.step < run.total:
                return False
        save(run)
        validate_if_due(run, per_epoch)
    return True


def stop_if_failing(run, members):
    """Raise `Stopped` if this step and the two before it, or more, had a gradient that is not finite."""
    if run.failures < 3:
        return
    rows = ", ".join(run.places[i] for i in members[:4]) + (", ..." if members[4:] else "")
    kept = "checkpoint/ holds the last good state" if (run.args.out / "checkpoint").exists() else "nothing was saved"
    raise Stopped(f"step {run.step}: loss or gradient is not finite, as in the {int(run.failures) - 1} steps before "
                  f"(rows {rows}); {kept}; try a lower --lr")


def log_step(run, bar, epoch, result, tokens, began):
    """One line of log.jsonl, and the losses beside the progress bar. tokens: so many since `began`."""
    own = [*result["sums"].tolist(), tokens]  # waits for the device
    total, lm, jepa, tokens = map(sum, zip(*processes.all_of_them(own), strict=True))
    speed = round(tokens / (time.perf_counter() - began))
    if RANK == 0:
        runs.log(run.args.out, step=run.step, epoch=epoch + 1, lm=lm, jepa=jepa if result["jepa"] else None,
                 total=total, lr=run.optimizer.param_groups[0]["lr"], grad_norm=result["norm"].item(),
                 tokens_per_s=speed, **({"steps_not_taken": int(run.skipped)} if run.skipped else {}))
    shuffled = run.validations[-1].get("val_cosine_shuffled") if run.validations else None
    beside = "may be collapse" if shuffled is None else f"cosine of shuffled pairs {shuffled:.3f}"
    shown = f"{jepa:.3f} ({beside})" if result["jepa"] else "-"
    bar.set_postfix_str(f"lm {lm:.3f}, jepa {shown}, {speed} tokens/s", refresh=False)


def save(run):
    """Leave a checkpoint from which the run goes on to the same bits."""
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    bad = int(run.failures), int(run.skipped)
    state = {"step": run.step, "bad": bad, "random": processes.all_of_them(generators)}
    runs.save_checkpoint(run.model, run.optimizer, run.args, run.source, state)
    run.saved_at = time.monotonic()


def validate_if_due(run, per_epoch):
    """At the end of an epoch and of the run: validate, log, and keep the weights as best/ if exact match is within one
    standard error of the highest so far (see `is_best`), or if there are no validation rows."""
    if run.step % per_epoch and run.step < run.total:
        return
    scores, best = {"val_lm": 0.0}, True  # where there are no validation rows
    if run.val_rows:
        # a run that is resumed here must go on as if it had not stopped: nothing is drawn from training's random stream
        gpus = [run.device] if run.device.type == "cuda" else []
        with (processes.at_hand(run.model, run.args.shard), torch.random.fork_rng(gpus),
              torch.compiler.set_stance("force_eager")):  # decoding has too many shapes to be compiled
            scores = processes.all_of_them(validate(run))[0]  # of process 0: the last bit decides what is saved
        best = is_best(scores, run.validations, sum(e.answer_start < len(e.full) for e in run.val_rows[1]))
    if not math.isfinite(scores["val_lm"]):
        raise Stopped(f"step {run.step}: the loss on {run.args.val} is not finite; if there is a best/, it is kept")
    if best:
        runs.save_best(run.model, run.args, run.source, run.tokenizer)
    run.validations.append({"step": run.step, **scores})
    if run.val_rows and RANK == 0:
        epoch = math.ceil(run.step / per_epoch)
        runs.log(run.args.out, step=run.step, epoch=epoch, **scores)
        named = (f"{name.removeprefix('val_')} {value:.4f}" for name, value in scores.items())
        tqdm.write(f"epoch {epoch}, validation: {', '.join(named)}")
    if RANK == 0:
        plots.curves([run.args.out], run.args.out / "loss.png")


# ---- the command


def from_scratch(args, vocab_size):
    """A Llama-style decoder from scratch: RoPE, RMSNorm, SwiGLU with an inner width of about 8/3 of d_model."""
    d_ff = max(32, args.d_model * 8 // 3 // 32 * 32)
    return Decoder(Config(vocab_size, args.n_layer, args.n_head, args.d_model, d_ff, block_size=args.block_size))


def make_model(args, tokenizer, source):
    """The model that training begins with, or goes on from."""
    folder = runs.standing(args.resume, "checkpoint") if args.resume else None
    if folder and not args.shard:  # a sharded model is filled later, in each process its part: `load_checkpoint`
        return runs.load_model(folder, args.lora_dropout)
    decoder = weights.load(source) if source else from_scratch(args, tokenizer.vocab_size)
    if args.lora_rank:
        lora.add(decoder, args.lora_rank, args.lora_alpha, args.lora_dropout)
    return LLMJEPA(decoder, args.k)  # last: how many [PRED] vectors are drawn changes no other draw


def prepare(args):
    """The `Run` of these settings: tokenizer, model, rows, optimizer."""
    device, autocast = processes.hardware(args.device, args.dtype)
    processes.start(device)
    torch.manual_seed(args.seed)
    tokenizer = hf.tokenizer(args.tokenizer)
    source = None if args.init == "tiny" else weights.fetch(args.init)
    model = make_model(args, tokenizer, source)
    torch.manual_seed(args.seed + RANK)  # each process has its own dropout
    weights.check_tokenizer(tokenizer, model.decoder)
    how = {"tokenizer": tokenizer, "limit": model.decoder.config.block_size, "k": args.k, "too_long": args.too_long,
           "train_on": args.train_on, "stop_label": not args.no_stop_label}
    places, examples = data.training_set(args.data, **how)
    val_rows = data.examples_of(data.read(args.val), **how) if args.val else None
    check_views(args, args.data, examples)
    check_views(args, args.val, val_rows[1] if val_rows else [])
    layout = {"layout": args.layout, "front_pred": args.front_pred, "reverse": args.reverse}
    run = Run(args, model, tokenizer, examples, places, val_rows, source, device, autocast, layout, validations=[])
    model.to(device).train()
    model.decoder.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in model.decoder.blocks:
            block.compile(dynamic=True)
    run.wrapped = processes.spread(model, args.shard)
    run.optimizer = make_optimizer(model, args)
    return run


def check_views(args, path, examples):
    """Refuse a JEPA term on rows of a file that cannot have one."""
    jepa, single = args.lam > 0, path == args.data and len(examples) < 2
    for wrong, message in (
        (jepa and not all(e.code for e in examples), "has rows of plain text, with no Code to predict; use --lam 0"),
        (jepa and args.layout == "fused" and any(e.own_text for e in examples),
         "has rows with a text view of their own, which a fused row cannot share; use --layout paper"),
        (single and args.shuffle_pairs, "--shuffle_pairs needs at least two rows"),
        (single and jepa and args.distance in IN_BATCH, f"--distance {args.distance} needs at least two rows"),
    ):
        if wrong:
            raise UserError(f"{path}: {message}")


def main():
    args = arguments()
    held = runs.lock(args.resume) if args.resume and RANK == 0 else None  # before anything of a run is read or changed
    if args.resume:
        runs.check_unchanged(args, args.resume)
    run = prepare(args)
    if args.resume:
        run.step, run.bad = runs.load_checkpoint(run.model, run.optimizer, args)
        run.validations = runs.cut_log(args.out, run.step) if RANK == 0 else []
    elif RANK == 0:
        held = runs.create(args, len(run.examples))
    args.out, run.validations = processes.all_of_them((args.out, run.validations))[0]  # everyone takes process 0's
    if RANK == 0:
        parameters = list(run.model.parameters())
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        print(f"{args.out}: {total:,} parameters ({trained:,} trained), {len(run.examples):,} rows, on "
              f"{run.device}, from step {run.step}", flush=True)
        if args.lam > 0 and not run.val_rows:
            print("there is no --val, so nothing will show whether a small JEPA loss is collapse", flush=True)

    done = fit(run)
    del held  # another process may have the run now
    quoted = shlex.quote(str(args.out))
    if RANK == 0 and not done:
        print(f"stopped after step {run.step}; go on with: python train.py --resume {quoted}", file=sys.stderr)
    elif RANK == 0:
        shipped = args.data.resolve() == (SYNTH / "synth_train.jsonl").resolve()
        print(f"{args.out} holds the run; see loss.png there. Evaluate it on data that it has not seen:\n"
              f"python eval.py {quoted} --data {SYNTH / 'synth_test.jsonl' if shipped else 'FILE'}")
    processes.end(0 if done else 130)


if __name__ == "__main__":
    cli.run(main)
