"""What a step costs, and what batched decoding saves: everything as ratios within one process.

    python -m experiments.bench                                             # the tiny decoder on the default data
    python -m experiments.bench --init FOLDER --data FILE --batch_size 4    # a Hugging Face model

Steps of plain fine-tuning and of both layouts of LLM-JEPA take turns with each other and with a large matrix product,
whose speed is the ceiling, so that whatever else the machine does falls on all of them alike. FLOPs are those of the
formula in `step_flops`, which the tests hold to torch's own counter. Peak memory is a fresh process's, on GPUs torch's.
"""

import copy
import importlib
import os
import platform
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import hf
from evaluation import generate
from evaluation.report import markdown
from hf import weights
from jepa import LLMJEPA, PAD
from model import Config, Decoder
from support import cli
from support.processes import hardware, has_bfloat16, width_multiple

KINDS = {  # what is timed: arguments of data.collate
    "plain fine-tuning": {"jepa": False},
    "LLM-JEPA, fused": {"layout": "fused"},
    "LLM-JEPA, paper": {"layout": "paper"},
}
LAM = 2.0
CEILING = {"cuda": (8192, 10)}  # size of the large product, and how many in a row: one alone is over too soon there
DTYPES = ("float32", "bfloat16")


class Form(NamedTuple):
    """One way to compute a training step."""

    batch: Callable  # number of the step, multiple=of columns -> `jepa.Batch`
    loss: Callable  # `jepa.Batch` -> total loss
    optimizer: torch.optim.Optimizer
    all_logits: bool = False  # are logits made in every column, or only where there is a label?


def compiled(model):
    """A model of the same weights whose blocks are compiled, as by train.py --compile."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList)):
        block.compile(dynamic=True)
    return model


def our_forms(model, examples, args):
    """{kind: Form} of the KINDS of steps that train.py can do, with AdamW (Muon adds the same to each)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    collate, of_step = partial(data.collate, k=args.k), partial(rows_of, examples, size=args.batch_size)
    kinds = {kind: (model, how) for kind, how in KINDS.items()}
    if args.compile:
        quick = compiled(model)
        kinds |= {f"{kind}, compiled": (quick, KINDS[kind]) for kind in ("plain fine-tuning", "LLM-JEPA, fused")}
    return {kind: Form(lambda number, how=how, **more: collate(of_step(number), **how, **more),
                       lambda batch, of=of: of(batch, lam=LAM).total, optimizer) for kind, (of, how) in kinds.items()}


def rows_of(examples, number, size):
    """The examples of the step of this number, which may be negative."""
    start = number % (len(examples) // size) * size
    return examples[start : start + size]


def train_step(form, device, dtype, number):
    with hardware(str(device), dtype)[1]():
        loss = form.loss(form.batch(number, multiple=width_multiple(device, dtype)).to(device))
    loss.backward()
    form.optimizer.step()
    form.optimizer.zero_grad()


# ---- what is measured


def step_flops(config, batch, all_logits=False):
    """Floating-point operations of a step, forward and backward, over rows of T columns.

    A row of T columns costs 2 P T in the linear layers (P: their parameters, without embeddings) and 4 L H D T^2 in
    attention (scores, and weighted sum, each 2 H D T^2 in each of L layers); logits cost 2 V C each time they are made,
    which is for each label or, all_logits, in every column. The backward pass costs twice the forward pass.
    """
    c, (rows, columns) = config, batch.ids.shape
    attention = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = c.d_model * c.d_ff * (3 if c.gated else 2)
    linear = 2 * c.n_layer * (attention + mlp) * columns
    scores = 4 * c.n_layer * c.n_head * c.head_dim * columns**2
    logits = rows * columns if all_logits else len(batch.label)
    return 3 * (rows * (linear + scores) + 2 * c.vocab_size * c.d_model * logits)


def take_turns(forms, rounds, device, warm_up=2):
    """{name: [seconds]} of {name: function of the round's number}: in each round each has its turn. Rounds that warm up
    have negative numbers and are not timed."""
    seconds = {name: [] for name in forms}
    for number in tqdm(range(-warm_up, rounds), "rounds", leave=False):
        for name, form in forms.items():
            began = time.perf_counter()
            form(number)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def time_steps(forms, config, steps, device, dtypes=DTYPES):
    """What was found about each of {name: Form} in each dtype, as a list of dicts. ceiling: FLOP/s of the product."""
    (size, products), turns, found = CEILING.get(device.type, (2048, 1)), {}, []
    if "bfloat16" in dtypes and not has_bfloat16(device):
        dtypes = ["float32"]
        print(f"bfloat16 is left out: this {device.type} is not faster in it", file=sys.stderr)
    for dtype in dtypes:
        matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))  # a GPU multiplies ones faster
        product = torch.empty_like(matrix)
        turns["ceiling", dtype] = lambda _, a=matrix, b=product: [torch.mm(a, a, out=b) for _ in range(products)]
        turns |= {(name, dtype): partial(train_step, form, device, dtype) for name, form in forms.items()}
    seconds = {key: median(times) for key, times in take_turns(turns, steps, device).items()}
    for name, dtype in turns:
        if name != "ceiling":
            batches = [forms[name].batch(number, multiple=width_multiple(device, dtype)) for number in range(steps)]
            work = median(step_flops(config, batch, forms[name].all_logits) for batch in batches)
            padding = sum((batch.segment == PAD).sum().item() for batch in batches)
            found.append({"form": name, "dtype": dtype, "seconds": seconds[name, dtype], "flops": work,
                          "ceiling": 2 * products * size**3 / seconds["ceiling", dtype],
                          "padding": padding / sum(batch.ids.numel() for batch in batches)})
    return found


def profile(form, device, dtype):
    """{kernel: share of the time} of three steps, by torch's profiler: those of at least 2 %."""
    with torch.profiler.profile() as seen:
        for number in range(3):
            train_step(form, device, dtype, number)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key.removeprefix("aten::"): getattr(event, column) for event in seen.key_averages()  # of calls: with
             if event.device_type.name == "CPU" and event.key != "Command Buffer Full"}  # their kernels; not of waiting
    shares = {name: time / sum(spent.values()) for name, time in sorted(spent.items(), key=lambda item: -item[1])}
    return {name: round(share, 3) for name, share in shares.items() if share >= 0.02}


def peak_memory():
    """MiB: the most that this process ever held. Not ru_maxrss where there is better: it begins at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of_steps(make_forms, args, name, dtype):
    """MiB that two steps of a form take, with model, optimizer and compiling, beyond what libraries take."""
    libraries = ["torch._dynamo", "tiktoken"] + ["torch._inductor.compile_fx"] * name.endswith("compiled")
    for library in libraries + ["transformers.models.llama.modeling_llama"] * name.startswith("HF"):
        importlib.import_module(library)
    before, device = peak_memory(), hardware(args.device)[0]
    form = make_forms(args, name)[name]
    for number in range(2):
        train_step(form, device, dtype, number)
    return peak_memory() - before


def memory_on_gpu(form, device, dtype):
    """The same by torch's own count, which needs no fresh process: what else is on the device is subtracted."""
    own = [tensor for group in form.optimizer.param_groups for p in group["params"]
           for tensor in (p, *form.optimizer.state[p].values())]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) - sum(tensor.nbytes for tensor in own)
    for number in range(2):
        train_step(form, device, dtype, number)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def one_by_one(decoder, prompt, stop, budget):
    """Greedy decoding as one would first write it: one prompt, no cache, the whole row again for each token."""
    ids = torch.tensor([prompt], device=decoder.embed.weight.device)
    while ids.shape[1] < min(len(prompt) + budget, decoder.config.block_size + 1):
        token = decoder(ids)[:, -1:].argmax(dim=-1)
        if token.item() == stop:
            break
        ids = torch.cat([ids, token], dim=1)
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def time_decoding(ways, batches, device):
    """(list of dicts, {name: answers to each batch}) of {name: function of prompts}, by turns over batches of prompts.
    A way may answer only the first of a batch. Its text is compared, as far as both go, with that of the way before."""
    answers = {name: {} for name in ways}

    def decode(number, name):
        answers[name][number] = ways[name](batches[number] if number >= 0 else batches[0][:2])

    seconds = take_turns({name: partial(decode, name=name) for name in ways}, len(batches), device, warm_up=1)
    answers, found = {name: [made[i] for i in range(len(batches))] for name, made in answers.items()}, []
    before = next(iter(answers.values()))
    for name, made in answers.items():
        same, before = [a == b for pair in zip(made, before, strict=True) for a, b in zip(*pair, strict=False)], made
        found.append({"form": name, "rows_per_s": sum(map(len, made)) / sum(seconds[name]),
                      "same_text": sum(same) / len(same)})
    return found, answers


# ---- what people read


def tables(found):
    """Markdown of the JSON that this script or peers writes: what it is about, steps, decoding."""
    base = {row["dtype"]: row["seconds"] for row in found["steps"] if row["form"] == found["base"]}
    compared = f"time / {found['base']}"
    steps = [["step", "dtype", "ms", compared, "examples/s", "GFLOP", "of the ceiling", "padding", "peak MiB"]]
    for row in found["steps"]:
        speed = row["flops"] / row["seconds"]
        steps.append([row["form"], row["dtype"], f"{row['seconds'] * 1e3:.1f}",
                      f"{row['seconds'] / base[row['dtype']]:.2f}", f"{found['batch_size'] / row['seconds']:.1f}",
                      f"{row['flops'] / 1e9:.2f}", f"{speed / row['ceiling']:.0%}", f"{row['padding']:.0%}",
                      f"{row['mib']:.0f}"])
    slower = found["decoding"][:-1]
    decoding = [["decoding", "rows/s", *(f"x {row['form']}" for row in slower), "same text as above"]]
    for row in found["decoding"]:
        ratios = [f"{row['rows_per_s'] / other['rows_per_s']:.1f}" for other in slower]
        decoding.append([row["form"], f"{row['rows_per_s']:.1f}", *ratios, f"{row['same_text']:.1%}"])
    where = [f"- a {row['form']} step in {row['dtype']} goes to: " + ", ".join(
        f"{name} {share:.0%}" for name, share in row["profile"].items()) for row in found["steps"] if "profile" in row]
    ceilings = {row["dtype"]: f"{row['ceiling'] / 1e9:.0f} GFLOP/s in {row['dtype']}" for row in found["steps"]}
    return [f"{found['about']}; the ceiling is {', '.join(ceilings.values())}.", "", *markdown(steps), "",
            *markdown(decoding), *([""] if where else []), *where]


def machine():
    """What the figures of a file were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__}


# ---- the commands


def flags(doc, **defaults):
    """The parser of the flags that this script and peers share."""
    p, count = cli.parser(doc), cli.whole(1)
    add, shipped = p.add_argument, Path(os.path.relpath(Path(__file__).parent.parent / "datasets" / "synth_test.jsonl"))
    add("--init", help="Hugging Face folder or repo id; default: a small model with random weights")
    add("--tokenizer", help="default: what --init comes with, synth for the small model")
    add("--data", type=Path, default=shipped, help="JSONL of conversations")
    add("--k", type=cli.whole(0, 10_000), default=1, help="number of [PRED] tokens")
    add("--batch_size", type=count, default=32, help="examples per training step")
    add("--steps", type=count, default=30, help="timed steps of each kind")
    add("--decode_batch", type=count, default=128, help="prompts per batch of batched decoding")
    add("--decode_rows", type=count, default=1024, help="rows that are decoded in batches")
    add("--new_tokens", type=count, default=32, help="budget of an answer")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="types in which steps are timed")
    add("--compile", action="store_true", help="time the blocks under torch.compile, too")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add("--json", type=Path, metavar="FILE", help="write what was found there, too")
    p.set_defaults(**defaults)
    return p


def open_model(args):
    """(LLMJEPA, examples, batches of prompts, id of the stop token) that the flags name; without --init, of seed 0."""
    torch.manual_seed(0)
    tokenizer = hf.tokenizer(args.tokenizer or args.init or "synth")
    tiny = Config(tokenizer.vocab_size, n_layer=4, n_head=4, d_model=128, d_ff=320)
    decoder = weights.load(weights.fetch(args.init)) if args.init else Decoder(tiny)
    weights.check_tokenizer(tokenizer, decoder)
    _, examples = data.examples_of(data.read(args.data), tokenizer, decoder.config.block_size, args.k, too_long="skip")
    if len(examples) < args.batch_size:
        raise cli.UserError(f"{args.data}: {len(examples)} rows are fewer than --batch_size {args.batch_size}")
    if any(e.own_text for e in examples):
        raise cli.UserError(f"{args.data}: has rows with a text view of their own, which no fused row can share")
    steps = data.order([len(e.full) for e in examples], args.batch_size, seed=0, epoch=0)  # as in training
    examples = [examples[i] for step in steps if len(step) == args.batch_size for i in step]
    prompts = [e.full[: e.answer_start] for e in examples[: args.decode_rows]]
    by_length, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), args.decode_batch
    batches = [[prompts[i] for i in sorted(by_length[at : at + size])] for at in range(0, len(prompts), size)]
    return LLMJEPA(decoder, args.k).to(hardware(args.device)[0]), examples, batches, tokenizer.stop


def make_forms(args, name):
    """The forms among which `name` is, their model freshly opened."""
    model, examples, *_ = open_model(args)
    return our_forms(model, examples, args)


def answers_of(decoder, stop, args, prompts):
    return [answer.ids for _, answer in sorted(generate.decode(decoder, prompts, stop, args.new_tokens))]


def measure(args, model, forms, make_forms, decoding, **more):
    """Time the forms, take their memory, print what was found and write it where the flags say."""
    device = model.pred.device
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    command = shlex.join(["python", "-m", f"experiments.{Path(words[0]).stem}", *words[1:]])
    about = (f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.data.name}, batch {args.batch_size}, "
             f"k = {args.k}, {device.type}, {torch.get_num_threads()} threads")
    steps = time_steps(forms, model.decoder.config, args.steps, device, args.dtype)
    for row in steps:
        name, dtype = row["form"], row["dtype"]
        row["mib"] = (memory_on_gpu(forms[name], device, dtype) if device.type == "cuda" else
                      in_fresh_process(memory_of_steps, make_forms, args, name, dtype))
        if name == "LLM-JEPA, fused":
            row["profile"] = profile(forms[name], device, dtype)
    found = {"command": command, "about": about, "batch_size": args.batch_size, **more, "machine": machine(),
             "steps": steps, "decoding": decoding}
    print("\n".join(tables(found)))
    if args.json:
        cli.write_json(args.json, found)


def main():
    p = flags(__doc__)
    p.add_argument("--rows", type=cli.whole(1), default=4, help="rows of each batch that are decoded one by one")
    args = p.parse_args()
    model, examples, batches, stop = open_model(args)
    batched, device = partial(answers_of, model.decoder, stop, args), model.pred.device
    in_bfloat16 = torch.autocast(device.type, torch.bfloat16)(batched)
    decoding, _ = time_decoding({
        "one by one, no cache": lambda prompts: [one_by_one(model.decoder, prompt, stop, args.new_tokens)
                                                 for prompt in prompts[: args.rows]],
        "one by one, cached": lambda prompts: [batched([prompt])[0] for prompt in prompts[: args.rows]],
        "batched, cached": batched, **({"the same in bfloat16": in_bfloat16} if has_bfloat16(device) else {}),
    }, batches, device)
    measure(args, model, our_forms(model, examples, args), make_forms, decoding, base="plain fine-tuning")


if __name__ == "__main__":
    cli.run(main)
