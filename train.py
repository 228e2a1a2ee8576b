"""Train a decoder with LLM-JEPA, on one CPU or GPU (or several processes under torchrun).

    python train.py --lam 2 --k 1                 # the default data, a tiny decoder from scratch
    python train.py --lam 0                       # plain fine-tuning: the same code path without the other views
    python train.py --resume runs/lam2-k1-seed0   # go on after Ctrl-C or a crash, to the same numbers

A run folder holds config.json (every setting), log.jsonl (one object per logged step), loss.png, checkpoint/ (the state
after the last epoch or Ctrl-C; --resume reads it) and best/ (the weights with the best exact match on --val).
Read next: `generate.py` and `eval.py`.
"""

import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import cli
import data
import generate
import plots
import runs
import tokenizer as tokenizers
import weights
from cli import UserError
from jepa import DISTANCES, LLMJEPA, PAD
from model import Config, Decoder

HERE = Path(__file__).parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--data", type=Path, default=HERE / "datasets/synth_train.jsonl", help="JSONL of conversations to train on")
    add("--val", type=Path, help="JSONL to validate on after each epoch; default for the default data: synth_val.jsonl")
    add("--init", default="tiny", help="tiny (from scratch), or a Hugging Face folder or repo id to start from")
    add("--tokenizer", help="synth, gpt2 or a Hugging Face folder; default: what --init comes with, synth for tiny")
    add("--n_layer", type=int, default=4, help="tiny: number of blocks")
    add("--n_head", type=int, default=4, help="tiny: attention heads")
    add("--d_model", type=int, default=128, help="tiny: hidden width")
    add("--block_size", type=int, default=512, help="tiny: the longest view, in tokens")
    add("--lam", type=float, default=1.0, help="weight of the JEPA loss; 0 is plain fine-tuning")
    add("--k", type=int, default=1, help="number of [PRED] tokens behind Text; 0: Text's own last state predicts")
    add("--distance", choices=sorted(DISTANCES), default="cosine", help="between predicted and actual encoding of Code")
    add("--epochs", type=int, default=12, help="passes over the data")
    add("--max_steps", type=int, help="stop after this many optimizer steps, whatever --epochs says")
    add("--batch_size", type=int, default=32, help="examples per forward pass")
    add("--grad_accum", type=int, default=1, help="forward passes per optimizer step, averaged exactly")
    add("--lr", type=float, help="peak learning rate; default 2e-3 for tiny, 2e-5 otherwise")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the learning rate, to zero")
    add("--warmup", type=float, default=0.03, help="part of all steps in which the learning rate rises from zero")
    add("--weight_decay", type=float, default=0.1, help="on matrices only")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--too_long", choices=["refuse", "skip"], default="refuse", help="what to do with rows longer than the model")
    add("--seed", type=int, default=0, help="of the initial weights and of the order of the data")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device such as cuda:1")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="bfloat16 is autocast over fp32 weights, on GPUs that have it; auto uses it there")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    add("--out", type=Path, help="run folder, must not hold a run; default runs/lam..-k..-seed.., numbered if taken")
    add("--resume", type=Path, metavar="RUN", help="go on with this run, with the settings in its config.json")
    args = p.parse_args()
    if args.resume:
        others = [name for name, value in vars(args).items() if name != "resume" and value != p.get_default(name)]
        if others:
            raise UserError(f"--resume takes every setting from the run's config.json; leave out --{others[0]}")
    else:
        check(args)
    return args


def check(args):
    """Refuse settings that cannot work, and fill in those that depend on others."""
    for name in ("epochs", "batch_size", "grad_accum", "n_layer", "n_head", "d_model", "block_size", "log_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"--max_steps {args.max_steps}: must be at least 1")
    for name in ("lam", "lr", "warmup", "weight_decay", "clip"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} {value}: must be a finite number, not negative")
    if args.k < 0:
        raise UserError(f"--k {args.k}: the number of [PRED] tokens cannot be negative; 0 means no predictor")
    if args.d_model % (2 * args.n_head):
        raise UserError(f"--d_model {args.d_model}: must be an even multiple of --n_head {args.n_head}")
    tiny = args.init == "tiny"
    args.tokenizer = args.tokenizer or ("synth" if tiny else args.init)
    args.lr = args.lr if args.lr is not None else (2e-3 if tiny else 2e-5)
    if args.val is None and args.data == HERE / "datasets/synth_train.jsonl":
        args.val = HERE / "datasets/synth_val.jsonl"


def tiny(args, vocab_size):
    """A Llama-style decoder from scratch: RoPE, RMSNorm, SwiGLU with an inner width of about 8/3 of d_model."""
    d_ff = max(32, args.d_model * 8 // 3 // 32 * 32)
    return Decoder(Config(vocab_size, args.n_layer, args.n_head, args.d_model, d_ff, block_size=args.block_size))


def hardware(args):
    """(device, autocast): where to run, and a context in which matrix products run in bfloat16 if that is wanted."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and WORLD > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as failure:
        raise UserError(f"--device {name}: {str(failure).splitlines()[0]}") from None
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if args.dtype == "bfloat16" and not has_bf16:
        raise UserError(f"--dtype bfloat16: {device} has no fast bfloat16; leave the flag out")
    return device, partial(torch.autocast, device.type, torch.bfloat16, enabled=has_bf16 and args.dtype != "float32")

# ---- the pieces of the loop


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
    is_matrix = lambda name, p: p.dim() >= 2 and name != "pred"  # noqa: E731
    groups = [
        {"params": [p for name, p in trained if is_matrix(name, p)], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    for _, p in trained:  # zeros rather than None: a step without a JEPA term moves all parameters by the same rule
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def losses(model, examples, args, views, device, autocast):
    """(total, lm, jepa) of one optimizer step's examples, in micro-batches, and the number of tokens processed.

    Adds to the gradients if they are on. Each micro-batch gives its share of the means over the whole step, so neither
    batch_size against grad_accum nor the number of processes, which share the micro-batches, changes the result.
    """
    step, sums, tokens = data.count(examples, views), torch.zeros(3, device=device), 0
    chunks = [examples[i : i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    for chunk in chunks[RANK::WORLD] if torch.is_grad_enabled() else chunks:
        batch = data.collate(chunk, args.k, jepa=views)
        tokens += (batch.segment != PAD).sum().item()
        with autocast():
            part = model(batch.to(device), args.lam, args.distance, step=step)
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
def validate(model, conversations, examples, tokenizer, args, device, autocast):
    """Losses over all validation rows, and exact match on the first 200, of which a few are printed."""
    model.eval()
    by_length = sorted(examples, key=lambda e: len(e.full))
    total, lm, jepa = losses(model, by_length, args, True, device, autocast)[0].tolist()
    sample = examples[:200]
    prompts = [e.full[: e.answer_start] for e in sample]
    budget = max(sum(e.trained) for e in sample) + 8  # a little more than the longest answer needs
    with autocast():
        answers = dict(generate.in_batches(model.decoder, prompts, tokenizer.stop, budget, 4 * args.batch_size))
    model.train()
    exact = 0
    for i, conversation in enumerate(conversations[: len(sample)]):
        question, gold = (message["content"].strip() for message in conversation.messages[-2:])
        output = tokenizer.decode(answers[i].ids).strip()
        exact += output == gold
        if i < 3:
            tqdm.write(f"  {question}\n    -> {output}   " + ("(right)" if output == gold else f"(gold: {gold})"))
    stopped = sum(answer.stopped for answer in answers.values())
    n = len(sample)
    return {"val_lm": lm, "val_jepa": jepa, "val_total": total, "val_exact": exact / n, "val_stop_rate": stopped / n}


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


def fit(model, optimizer, examples, validation, args, state, device, autocast):
    """Train from state["step"] to the last step, or to Ctrl-C. Returns whether training is complete.

    The order of the data, the learning rate and all else are functions of the step, so that a run that was stopped and
    resumed is the run that was not.
    """
    lengths, size = [len(e.full) for e in examples], args.batch_size * args.grad_accum
    per_epoch = -(-len(examples) // size)
    total = min(args.epochs * per_epoch, args.max_steps or args.epochs * per_epoch)
    views = args.lam > 0  # without a JEPA term the other views are not even built
    interrupt, stop = Interrupt(), False
    while state["step"] < total and not stop:
        epoch, first = divmod(state["step"], per_epoch)
        steps = data.order(lengths, size, args.seed, epoch)[first : first + total - state["step"]]
        bar = tqdm(steps, f"epoch {epoch + 1}/{args.epochs}", unit="step", leave=False, disable=RANK > 0,
                   mininterval=0.2 if sys.stderr.isatty() else 30)
        clock = time.perf_counter()
        for members in bar:
            # the learning rate of this step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state["step"], total, args)
            # forward and backward, in micro-batches
            sums, tokens = losses(model, [examples[i] for i in members], args, views, device, autocast)
            sums, stop = share_gradients(model, sums, interrupt.wanted)
            # clip, step
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            state["step"] += 1
            # log
            if state["step"] % args.log_every == 0 or state["step"] == total:
                loss, lm, jepa = sums.tolist()
                speed = round(tokens * WORLD / (time.perf_counter() - clock))
                rate = optimizer.param_groups[0]["lr"]
                log(args, step=state["step"], epoch=epoch + 1, lm=lm, jepa=jepa if views else None, total=loss, lr=rate,
                    grad_norm=norm.item(), tokens_per_s=speed)
                bar.set_postfix_str(f"lm {lm:.3f}, jepa {jepa:.3f}, {speed} tokens/s")
            clock = time.perf_counter()
            if stop:
                break
        # validate at the end of an epoch, then leave a checkpoint
        if RANK == 0:
            if validation and (state["step"] % per_epoch == 0 or state["step"] == total):
                score(model, validation, args, state, epoch, device, autocast)
            training = state | {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            runs.save_model(model, args.out / "checkpoint", args.source, training)
            plots.losses([args.out], args.out / "loss.png")
    return state["step"] == total


def score(model, validation, args, state, epoch, device, autocast):
    """Validate and log; keep the weights as best/ if exact match (on a tie: loss) is better than in earlier epochs."""
    scores = validate(model, *validation, args, device, autocast)
    log(args, step=state["step"], epoch=epoch + 1, **scores)
    tqdm.write(
        f"epoch {epoch + 1}/{args.epochs}: validation lm {scores['val_lm']:.4f}, jepa {scores['val_jepa']:.4f}, "
        f"exact match {scores['val_exact']:.1%}, stopped by itself {scores['val_stop_rate']:.1%}"
    )
    rank = [scores["val_exact"], -scores["val_lm"]]
    if state["best"] is None or rank > state["best"]:
        state["best"] = rank
        runs.save_model(model, args.out / "best", args.source)


def log(args, **line):
    """Append one JSON object to the run's log."""
    if RANK == 0:
        with open(args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main():
    args = arguments()
    folder = None
    if args.resume:
        args, folder = runs.resume(args.resume)
    device, autocast = hardware(args)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(args.seed)
    tokenizer = tokenizers.load(args.tokenizer)
    args.source = None if args.init == "tiny" else args.init
    if folder:
        model = runs.load_model(folder)
    else:
        model = LLMJEPA(tiny(args, tokenizer.vocab_size) if args.init == "tiny" else weights.load(args.init), args.k)
    if tokenizer.vocab_size > model.decoder.config.vocab_size:
        raise UserError(f"tokenizer {args.tokenizer} has {tokenizer.vocab_size} tokens, the model's embedding only "
                        f"{model.decoder.config.vocab_size}; choose the model's own --tokenizer")
    read = partial(data.load, tokenizer=tokenizer, limit=model.decoder.config.block_size, k=args.k)
    conversations, examples = read(args.data, too_long=args.too_long)
    validation = (*read(args.val, too_long=args.too_long), tokenizer) if args.val else None

    model.to(device).train()
    if args.compile:
        for block in model.decoder.blocks:
            block.compile(dynamic=True)
    optimizer = make_optimizer(model, args)
    state = {"step": 0, "best": None}
    if folder:
        runs.restore(folder, optimizer, state, args)
    elif RANK == 0:
        runs.create(args)
    if RANK == 0:
        size = sum(p.numel() for p in model.parameters())
        print(f"{args.out}: {size:,} parameters, {len(examples):,} rows, on {device}, from step {state['step']}")
    done = fit(model, optimizer, examples, validation, args, state, device, autocast)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0 and not done:
        print(f"stopped after step {state['step']}; go on with: python train.py --resume {args.out}", file=sys.stderr)
        sys.exit(130)
    if RANK == 0:
        print(f"{args.out} holds the run. Evaluate it: python eval.py {args.out} --data {args.val or 'TEST.jsonl'}")


if __name__ == "__main__":
    cli.run(main)
