"""Train a decoder with LLM-JEPA, on one CPU or GPU (or several processes under torchrun).

    python train.py --lam 2 --k 1                 # the default data, a tiny decoder from scratch
    python train.py --lam 0                       # plain fine-tuning: the same code path without the other views
    python train.py --resume runs/lam2-k1-seed0   # go on after Ctrl-C or a crash, to the same numbers

A run folder holds config.json (every setting), log.jsonl (one object per logged step), loss.png, checkpoint/ (the state
after the last epoch or Ctrl-C; --resume reads it) and best/ (the weights with the best exact match on --val).
Read next: `generate.py` and `eval.py`.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import hf
from evaluation import generate, plots
from hf import lora, runs, weights
from hf.runs import RANK, WORLD
from jepa import DISTANCES, LLMJEPA, PAD
from model import Config, Decoder
from support import cli
from support.cli import UserError

SYNTH = Path(os.path.relpath(Path(__file__).parent / "datasets"))


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--data", type=Path, default=SYNTH / "synth_train.jsonl", help="JSONL of conversations to train on")
    add("--val", type=Path, help="JSONL to validate on after each epoch; default for the default data: synth_val.jsonl")
    add("--init", default="tiny", help="tiny (from scratch), or a Hugging Face folder or repo id to start from")
    add("--tokenizer", help="synth, gpt2 or a Hugging Face folder; default: what --init comes with, synth for tiny")
    add("--n_layer", type=int, default=4, help="tiny: number of blocks")
    add("--n_head", type=int, default=4, help="tiny: attention heads")
    add("--d_model", type=int, default=128, help="tiny: hidden width")
    add("--block_size", type=int, default=512, help="tiny: the longest view, in tokens")
    add("--lora_rank", type=int, default=0, help="train adapters of this rank on all projections; 0: train all weights")
    add("--lora_alpha", type=float, help="the adapters' scale is alpha / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="dropout in front of the adapters")
    add("--lam", type=float, default=1.0, help="weight of the JEPA loss; 0 is plain fine-tuning")
    add("--k", type=int, default=1, help="number of [PRED] tokens behind Text; 0: Text's own last state predicts")
    add("--distance", choices=sorted(DISTANCES), default="cosine",
        help="between predicted and actual encoding of Code; infonce has the rest of the forward pass as negatives")
    add("--gamma", type=float, default=1.0, help="weight of the next-token loss")
    add("--loss_dropout", type=float, default=0.0,
        help="probability that a step has the next-token loss only and costs no more than plain fine-tuning")
    add("--layout", choices=["fused", "paper"], default="fused",
        help="fused: all views in one row; paper: two rows, Text encoded anew without the system turn")
    add("--front_pred", action="store_true",
        help="[PRED] before the user's content, not behind it; needs --layout paper. The paper found it worse: "
        "68.07 %% against 71.46 %% exact match (NL-RX-SYNTH, Llama-3.2-1B)")
    add("--reverse", action="store_true",
        help="Code predicts Text: [PRED] behind Code. The paper found it worse: 65.70 %% against 71.46 %%")
    add("--stop_grad", choices=["none", "text", "code"], default="none", help="view that gets no gradient from JEPA")
    add("--shuffle_pairs", action="store_true",
        help="control: each Text is paired with another row's Code, anew each epoch. What still helps is not JEPA")
    add("--train_on", choices=["answer", "all"], default="answer",
        help="targets: the answer and its stop token, or the whole conversation (plain text, pretraining)")
    add("--no_stop_label", action="store_true",
        help="never train on the stop token; with --train_on all this is what the official code really optimises")
    add("--epochs", type=int, help="passes over the data; default 12 for tiny, 4 otherwise")
    add("--max_steps", type=int, help="stop after this many optimizer steps, whatever --epochs says")
    add("--batch_size", type=int, help="examples per forward pass; default 32 for tiny, 4 otherwise")
    add("--grad_accum", type=int, default=1, help="forward passes per optimizer step, averaged exactly")
    add("--lr", type=float, help="peak learning rate; default 2e-3 for tiny, 2e-5 otherwise")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the rate after warm-up")
    add("--warmup", type=float, default=0.03, help="part of all steps in which the learning rate rises from zero")
    add("--weight_decay", type=float, default=0.1, help="on matrices only, embeddings among them")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--too_long", choices=["refuse", "skip"], default="refuse", help="what to do with rows longer than the model")
    add("--seed", type=int, default=0, help="of the initial weights and of the order of the data")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device such as cuda:1")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="bfloat16 is autocast over fp32 weights, on GPUs that have it; auto uses it there")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpoint_activations", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    add("--out", type=Path, help="run folder, must not hold a run; default runs/lam..-k..-seed.., numbered if taken")
    add("--resume", type=Path, metavar="RUN", help="go on with this run, with the settings in its config.json")
    args = p.parse_args()
    others = [name for name, value in vars(args).items() if name != "resume" and value != p.get_default(name)]
    if args.resume and others:
        raise UserError(f"--resume takes every setting from the run's config.json; leave out --{others[0]}")
    return args


def check(args):
    """Fill in settings that depend on others, and refuse those that cannot work."""
    tiny = args.init == "tiny"
    defaults = {"tokenizer": "synth", "epochs": 12, "batch_size": 32, "lr": 2e-3} if tiny else {
        "tokenizer": args.init, "epochs": 4, "batch_size": 4, "lr": 2e-5}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("init", "tokenizer"):  # a run is resumed and evaluated from any folder
        if getattr(args, name) not in ("tiny", "synth", "gpt2") and Path(getattr(args, name)).is_dir():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    for name in ("epochs", "batch_size", "grad_accum", "n_layer", "n_head", "d_model", "block_size", "log_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"--max_steps {args.max_steps}: must be at least 1")
    for name in ("lam", "gamma", "lr", "warmup", "weight_decay", "clip"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} {value}: must be a finite number, not negative")
    if args.k < 0:
        raise UserError(f"--k {args.k}: the number of [PRED] tokens cannot be negative; 0 means no predictor")
    if args.d_model % (2 * args.n_head):
        raise UserError(f"--d_model {args.d_model}: must be an even multiple of --n_head {args.n_head}")
    if args.distance == "infonce" and args.lam > 0 and args.batch_size == 1:
        raise UserError("--distance infonce tells a Code from the others of its batch; give --batch_size 2 or more")
    if args.clip == 0 or args.warmup > 1 or args.seed < 0:
        raise UserError("--clip must be above 0, --warmup at most 1, --seed not negative")
    if not 0 <= args.loss_dropout <= 1:
        raise UserError(f"--loss_dropout {args.loss_dropout}: a probability is between 0 and 1")
    if args.front_pred and args.reverse:
        raise UserError("--front_pred puts [PRED] into Text and --reverse behind Code; choose one")
    if args.k == 0 and (args.front_pred or args.reverse):
        raise UserError("--front_pred and --reverse say where [PRED] stands, and --k 0 has none; give --k 1 or more")
    if args.front_pred and args.layout == "fused":
        raise UserError("--front_pred cannot be laid out fused, where the answer would see [PRED]; add --layout paper")
    if args.lora_rank < 0 or not 0 <= args.lora_dropout < 1 or not (args.lora_alpha is None or args.lora_alpha > 0):
        raise UserError("--lora_rank must not be negative, --lora_alpha positive, --lora_dropout in [0, 1)")
    if args.lora_rank and tiny:
        raise UserError("--lora_rank adapts a pretrained model; give --init a Hugging Face folder or repo id")
    if args.val is None and args.data.resolve() == (SYNTH / "synth_train.jsonl").resolve():
        args.val = SYNTH / "synth_val.jsonl"


def check_views(args, examples):
    """Refuse a JEPA term on rows that cannot have one."""
    if args.lam > 0 and not all(e.code for e in examples):
        raise UserError(f"{args.data}: has rows of plain text, with no Code to predict; use --lam 0")
    if args.lam > 0 and args.layout == "fused" and any(e.own_text for e in examples):
        raise UserError(f"{args.data}: has rows with a text view of their own, which a fused row cannot share with the "
                        "conversation; use --layout paper")
    if args.shuffle_pairs and len(examples) < 2:
        raise UserError(f"{args.data}: --shuffle_pairs needs at least two rows")


def tiny(args, vocab_size):
    """A Llama-style decoder from scratch: RoPE, RMSNorm, SwiGLU with an inner width of about 8/3 of d_model."""
    d_ff = max(32, args.d_model * 8 // 3 // 32 * 32)
    return Decoder(Config(vocab_size, args.n_layer, args.n_head, args.d_model, d_ff, block_size=args.block_size))


# ---- the pieces of the loop


@dataclass
class Run:
    """What the pieces of the loop share."""

    args: argparse.Namespace
    model: LLMJEPA
    tokenizer: data.Tokenizer
    examples: list[data.Example]
    validation: tuple[list, list] | None  # conversations and examples
    source: Path | None  # the Hugging Face folder that the model came from
    device: torch.device
    autocast: Callable  # a context for the forward pass
    layout: dict  # how `data.collate` lays out the views
    step: int = 0  # optimizer steps done
    best: list[float] | None = None  # exact match and minus loss of the best validation


def learning_rate(step, total, args):
    """Linear warm-up, then the schedule, which would reach zero at step == total."""
    warmup = max(1, round(args.warmup * total))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "linear": 1 - progress, "constant": 1.0}
    return args.lr * shape[args.schedule]


def make_optimizer(model, args):
    """AdamW. Weight decay pulls on matrices only: not on norms, biases or the [PRED] vectors."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.dim() >= 2 and name != "pred"]
    others = [p for name, p in trained if p.dim() < 2 or name == "pred"]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    for _, p in trained:  # zeros rather than None: a step without a JEPA term moves all parameters by the same rule
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def losses(run, examples, views):
    """(total, lm, jepa) of one optimizer step's examples, in micro-batches, and the number of tokens processed.

    Adds to the gradients if they are on. Each micro-batch gives its share of the means over the whole step, so neither
    batch_size against grad_accum nor the number of processes, which share the micro-batches, changes the result (but
    for infonce, which compares within a micro-batch).
    """
    args, step, sums, tokens = run.args, data.count(examples, views), torch.zeros(3, device=run.device), 0
    size = min(args.batch_size, -(-len(examples) // WORLD))  # smaller where a process would have nothing to do
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    for chunk in chunks[RANK::WORLD] if torch.is_grad_enabled() else chunks:  # rank 0 validates alone
        batch = data.collate(chunk, args.k, jepa=views, **run.layout)
        tokens += (batch.segment != PAD).sum().item()
        with run.autocast():
            part = run.model(batch.to(run.device), args.lam, args.distance, args.gamma, args.stop_grad, step)
        if torch.is_grad_enabled():
            part.total.backward()
        sums += torch.stack(part).detach()
    return sums, tokens


def share_gradients(model, sums, stop):
    """Add up gradients, losses and the wish to stop over all processes: (sums, does any process want to stop?)."""
    if WORLD == 1:
        return sums, stop
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.grad)
    shared = torch.cat([sums, sums.new_tensor([float(stop)])])
    dist.all_reduce(shared)
    return shared[:3], bool(shared[3])


@torch.no_grad()
def validate(run):
    """Losses over all validation rows, and exact match on the first 200 with an answer, of which three are printed."""
    conversations, examples = run.validation
    run.model.eval()
    views = all(e.code and not (e.own_text and run.args.layout == "fused") for e in examples)
    (total, lm, jepa), _ = losses(run, sorted(examples, key=lambda e: len(e.full)), views)
    scores = {"val_lm": lm.item(), "val_jepa": jepa.item() if views else None, "val_total": total.item()}
    scores = {name: value for name, value in scores.items() if value is not None}
    sample = [(c, e) for c, e in zip(conversations, examples, strict=True) if e.answer_start < len(e.full)][:200]
    if not sample:
        run.model.train()
        return scores
    prompts = [e.full[: e.answer_start] for _, e in sample]
    budget = max(len(e.full) - e.answer_start for _, e in sample) + 8  # a little more than the longest answer needs
    with run.autocast():
        stop, size = run.tokenizer.stop, 4 * run.args.batch_size
        answers = dict(generate.in_batches(run.model.decoder, prompts, stop, budget, size))
    run.model.train()
    exact = 0
    for i, (conversation, _) in enumerate(sample):
        question, gold = (message["content"].strip() for message in conversation.messages[-2:])
        output = run.tokenizer.decode(answers[i].ids).strip()
        exact += output == gold
        if i < 3:
            verdict = "right" if output == gold else f"wrong, gold is {gold}"
            tqdm.write(f"  {question}\n    -> {output}   ({verdict})")
    stopped = sum(answer.stopped for answer in answers.values())
    return scores | {"val_exact": exact / len(sample), "val_stop_rate": stopped / len(sample)}


def keep_if_best(run, epoch):
    """Validate and log; keep the weights as best/ if exact match (on a tie: loss) is better than in earlier epochs.

    Without validation rows the last epoch counts as the best.
    """
    if run.validation is None:
        return runs.save_model(run.model, run.args.out / "best", run.source)
    scores = validate(run)
    log(run, epoch=epoch + 1, **scores)
    tqdm.write(f"epoch {epoch + 1}, validation: " + ", ".join(f"{n[4:]} {v:.4f}" for n, v in scores.items()))
    rank = [scores.get("val_exact", 0.0), -scores["val_lm"]]
    if run.best is None or rank > run.best:
        run.best = rank
        runs.save_model(run.model, run.args.out / "best", run.source)


def log(run, **line):
    """Append one JSON object to the run's log."""
    if RANK == 0:
        with open(run.args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **line}) + "\n")


class Interrupt:
    """After Ctrl-C (or SIGTERM) `.wanted` is True, and the loop stops between steps; a second one stops at once."""

    def __init__(self):
        self.wanted = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self)

    def __call__(self, number, frame):
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


# ---- the loop


def fit(run, optimizer):
    """Train from run.step to the last step, or to Ctrl-C. Returns whether training is complete.

    The order of the data, the learning rate and all else are functions of the step, so that a run that was stopped and
    resumed is the run that was not.
    """
    args, model = run.args, run.model
    lengths, size = [len(e.full) for e in run.examples], args.batch_size * args.grad_accum
    per_epoch = -(-len(lengths) // size)
    total = min(args.epochs * per_epoch, args.max_steps or args.epochs * per_epoch)
    interrupt, stop = Interrupt(), False
    while run.step < total and not stop:
        epoch, first = divmod(run.step, per_epoch)
        # what is left of this epoch (all of it, but after a resume), no further than the last step
        steps = data.order(lengths, size, args.seed, epoch)[first : first + total - run.step]
        examples = run.examples
        if args.shuffle_pairs:
            partners = data.derangement(len(examples), args.seed, epoch)
            examples = [replace(e, code=examples[i].code) for e, i in zip(examples, partners, strict=True)]
        bar = tqdm(steps, f"epoch {epoch + 1}/{args.epochs}", unit="step", leave=False, disable=RANK > 0,
                   mininterval=0.2 if sys.stderr.isatty() else 30)
        for members in bar:
            began = time.perf_counter()
            # the learning rate of this step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.step, total, args)
            # forward and backward, in micro-batches; without a JEPA term the other views are not even built
            views = args.lam > 0 and not data.dropped(args.loss_dropout, args.seed, run.step)
            sums, tokens = losses(run, [examples[i] for i in members], views)
            sums, stop = share_gradients(model, sums, interrupt.wanted)
            # clip, step
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            run.step += 1
            # log
            if run.step % args.log_every == 0 or run.step == total:
                loss, lm, jepa = sums.tolist()
                speed = round(tokens * WORLD / (time.perf_counter() - began))
                log(run, epoch=epoch + 1, lm=lm, jepa=jepa if views else None, total=loss,
                    lr=optimizer.param_groups[0]["lr"], grad_norm=norm.item(), tokens_per_s=speed)
                bar.set_postfix_str(f"lm {lm:.3f}, jepa {jepa:.3f}, {speed} tokens/s", refresh=False)
            if stop:
                break
        # validate at the end of an epoch, then leave a checkpoint
        if RANK == 0:
            if run.step % per_epoch == 0 or run.step == total:
                keep_if_best(run, epoch)
            state = {"step": run.step, "best": run.best, "random": torch.get_rng_state()}
            runs.save_model(model, args.out / "checkpoint", run.source, state | {"optimizer": optimizer.state_dict()})
            plots.losses([args.out], args.out / "loss.png")
        stop = stop or interrupt.wanted and WORLD == 1  # Ctrl-C during validation
    return run.step == total


def main():
    args, checkpoint = arguments(), None
    if args.resume:
        args, checkpoint = runs.resume(args.resume)
    else:
        check(args)
    device, autocast = runs.hardware(args.device, args.dtype)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(args.seed)
    tokenizer = hf.tokenizer(args.tokenizer)
    source = None if args.init == "tiny" else weights.fetch(args.init)
    if checkpoint:
        model = runs.load_model(checkpoint, args.lora_dropout)
    else:
        model = LLMJEPA(weights.load(source) if source else tiny(args, tokenizer.vocab_size), args.k)
        if args.lora_rank:
            lora.add(model.decoder, args.lora_rank, args.lora_alpha, args.lora_dropout)
    config = model.decoder.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"tokenizer {args.tokenizer} has {tokenizer.vocab_size} tokens, the model's embedding only "
                        f"{config.vocab_size}; choose the model's own --tokenizer")
    read = partial(data.load, tokenizer=tokenizer, limit=config.block_size, k=args.k, too_long=args.too_long,
                   train_on=args.train_on, stop_label=not args.no_stop_label)
    _, examples = read(data.read(args.data))
    validation = read(data.read(args.val)) if args.val else None
    check_views(args, examples)

    model.to(device).train()
    model.decoder.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in model.decoder.blocks:
            block.compile(dynamic=True)
    layout = {"layout": args.layout, "front_pred": args.front_pred, "reverse": args.reverse}
    run = Run(args, model, tokenizer, examples, validation, source, device, autocast, layout)
    optimizer = make_optimizer(model, args)
    if checkpoint:
        run.step, run.best = runs.restore(checkpoint, optimizer, args)
    elif RANK == 0:
        runs.create(args, len(examples))
    if RANK == 0:
        sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad or all) for all in (True, False)]
        print(f"{args.out}: {sizes[0]:,} parameters ({sizes[1]:,} trained), {len(examples):,} rows, on {device}, "
              f"from step {run.step}", flush=True)

    done = fit(run, optimizer)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0 and not done:
        print(f"stopped after step {run.step}; go on with: python train.py --resume {args.out}", file=sys.stderr)
    if not done:
        sys.exit(130)
    if RANK == 0:
        shipped = args.data.resolve().parent == SYNTH.resolve()
        print(f"{args.out} holds the run; see loss.png there. Evaluate it on data that it has not seen:\n"
              f"python eval.py {args.out} --data {SYNTH / 'synth_test.jsonl' if shipped else 'FILE'}")


if __name__ == "__main__":
    cli.run(main)
