"""What a step costs, and what batched decoding saves: everything as ratios within one process.

    python -m experiments.bench                                             # the tiny decoder on the default data
    python -m experiments.bench --init FOLDER --data FILE --batch_size 4    # a Hugging Face model

Steps of plain fine-tuning and of both layouts of LLM-JEPA take turns with each other and with a large matrix product,
whose speed is the ceiling, so that whatever else the machine does falls on all of them alike. FLOPs are counted by
`flops`, a formula that the tests hold to torch's own counter. Peak memory is taken in a fresh process for each.
"""

import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import hf
from evaluation import generate
from evaluation.report import markdown
from hf import weights
from jepa import LLMJEPA, PAD
from model import Config, Decoder
from support import cli
from support.cli import UserError
from support.processes import hardware, has_bfloat16

KINDS = {  # what is timed: arguments of data.collate
    "plain fine-tuning": {"jepa": False},
    "LLM-JEPA, fused": {"layout": "fused"},
    "LLM-JEPA, paper": {"layout": "paper"},
}
LAM = 2.0


def machine():
    """What the figures of a file were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(), "system": platform.system(), "torch": torch.__version__}


# ---- counting


def flops(config, rows, columns, labels):
    """Floating-point operations of a step, forward and backward, over rows of T columns.

    A row of T columns costs 2 P T in the linear layers (P: their parameters, without embeddings) and 4 L H D T^2 in
    attention (scores, and weighted sum, each 2 H D T^2 in each of L layers); each label costs 2 V C in the output
    matrix. The backward pass costs twice the forward pass.
    """
    c = config
    attention = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = c.d_model * c.d_ff * (3 if c.gated else 2)
    linear = 2 * c.n_layer * (attention + mlp) * columns
    scores = 4 * c.n_layer * c.n_head * c.head_dim * columns**2
    return 3 * (rows * (linear + scores) + 2 * c.vocab_size * c.d_model * labels)


def step_flops(config, batch):
    return flops(config, *batch.ids.shape, len(batch.label))


def counted_flops(model, batch):
    """The same by torch's counter, which knows the attention of the plain "math" kernel on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).total.backward()
    model.zero_grad()
    return counter.get_total_flops()


# ---- timing


class Form(NamedTuple):
    """One way to do a training step."""

    step: Callable  # does the step of this number
    batch: Callable  # number -> the `jepa.Batch` of the step
    all_logits: bool = False  # are logits made in every column, or only where there is a label?


def take_turns(forms, rounds, device, warm_up=2):
    """{name: [seconds]} of {name: function of the round's number}: in each round each has its turn.

    Rounds that warm up have negative numbers and are not timed.
    """
    seconds = {name: [] for name in forms}
    for number in tqdm(range(-warm_up, rounds), "rounds", leave=False):
        for name, form in forms.items():
            began = time.perf_counter()
            form(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def time_forms(forms, config, steps, device):
    """What was found about each of {(name, dtype): Form}, as a list of dicts; "ceiling": FLOP/s of a large product."""
    size = 8192 if device.type == "cuda" else 2048
    turns = {key: form.step for key, form in forms.items()}
    for dtype in dict.fromkeys(dtype for _, dtype in forms):
        matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
        turns["ceiling", dtype] = lambda number, matrix=matrix: matrix @ matrix
    seconds = {key: statistics.median(found) for key, found in take_turns(turns, steps, device).items()}
    found = []
    for (name, dtype), form in forms.items():
        batches = [form.batch(number) for number in range(steps)]
        work = statistics.median(
            flops(config, *batch.ids.shape, batch.ids.numel() if form.all_logits else len(batch.label))
            for batch in batches)
        ceiling, columns = 2 * size**3 / seconds["ceiling", dtype], sum(batch.ids.numel() for batch in batches)
        found.append({
            "form": name, "dtype": dtype, "seconds": seconds[name, dtype], "flops": work, "ceiling": ceiling,
            "share_of_ceiling": work / seconds[name, dtype] / ceiling,
            "padding": sum((batch.segment == PAD).sum().item() for batch in batches) / columns,
        })
    return found


def our_forms(model, examples, args, dtype):
    """{(kind, dtype): Form} for the three KINDS of steps that train.py can do."""
    device, optimizer = model.pred.device, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    autocast = hardware(args.device, dtype)[1]

    def batch_of(number, how):
        return data.collate(rows_of(examples, number, args.batch_size), args.k, **how)

    def step(number, how):
        with autocast():
            losses = model(batch_of(number, how).to(device), lam=LAM)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {(kind, dtype): Form(partial(step, how=how), partial(batch_of, how=how)) for kind, how in KINDS.items()}


def rows_of(examples, number, size):
    """The examples of the step of this number, which may be negative."""
    start = number * size % (len(examples) - size + 1)
    return examples[start : start + size]


# ---- memory


def peak_memory():
    """MiB: the most that this process ever held. Not ru_maxrss where there is better: it begins at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1)) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of_steps(make_forms, args, key):
    """MiB that two steps of a form take, model and optimizer included; on the CPU beyond what the libraries take."""
    before = peak_memory()
    form = make_forms(args, key)[key]
    for number in range(2):
        form.step(number)
    device = hardware(args.device)[0]
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_memory() - before


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- decoding


def one_by_one(decoder, prompt, stop, budget):
    """Greedy decoding as one would first write it: one prompt, no cache, the whole row again for each token."""
    ids = torch.tensor([prompt], device=decoder.embed.weight.device)
    while ids.shape[1] < len(prompt) + budget:
        token = decoder(ids)[:, -1:].argmax(dim=-1)
        if token.item() == stop:
            break
        ids = torch.cat([ids, token], dim=1)
    return ids[0, len(prompt) :].tolist()


def time_decoding(decoder, prompts, stop, args, turns=4):
    """{how: (seconds per row, answers)} of: one by one without cache, one by one with cache, in batches with cache.

    In each turn the first two decode their share of the first `--rows` prompts, the third decodes all prompts.
    """
    few, answers = prompts[: args.rows], {}

    def batched(chosen, size):
        made = generate.in_batches(decoder, chosen, stop, args.new_tokens, size)
        return [answer.ids for _, answer in sorted(made)]

    def turn(number, name, decode, chosen):
        found = decode(prompts[:2] if number < 0 else chosen[number])
        answers[name] = answers.get(name, []) + (found if number >= 0 else [])

    shares = [few[i * len(few) // turns : (i + 1) * len(few) // turns] for i in range(turns)]
    stages = {
        "one by one, no cache": (lambda p: [one_by_one(decoder, ids, stop, args.new_tokens) for ids in p], shares),
        "one by one, cached": (lambda p: batched(p, 1), shares),
        "batched, cached": (lambda p: batched(p, args.decode_batch), [prompts] * turns),
    }
    forms = {name: partial(turn, name=name, decode=decode, chosen=chosen) for name, (decode, chosen) in stages.items()}
    with torch.inference_mode():
        seconds = take_turns(forms, turns, decoder.embed.weight.device, warm_up=1)
    return {name: (sum(seconds[name]) / len(answers[name]), answers[name]) for name in stages}


# ---- what people read


def tables(found):
    """Markdown of what a JSON file of this script or of peers holds: what it is about, steps, decoding."""
    steps = [["", "dtype", "ms", f"time / {found['base']}", "examples/s", "GFLOP", "of the ceiling", "padding", "MiB"]]
    base = {row["dtype"]: row["seconds"] for row in found["steps"] if row["form"] == found["base"]}
    for row in found["steps"]:
        steps.append([
            row["form"], row["dtype"], f"{row['seconds'] * 1e3:.1f}", f"{row['seconds'] / base[row['dtype']]:.2f}",
            f"{found['batch_size'] / row['seconds']:.1f}", f"{row['flops'] / 1e9:.2f}",
            f"{row['share_of_ceiling']:.0%}", f"{row['padding']:.0%}", f"{row['mib']:.0f}"])
    slower = [row for row in found["decoding"][:-1]]
    decoding = [["decoding", "rows/s", *(f"x {row['form']}" for row in slower), "same text"]]
    for row in found["decoding"]:
        ratios = [f"{row['rows_per_s'] / other['rows_per_s']:.1f}" for other in slower]
        decoding.append([row["form"], f"{row['rows_per_s']:.1f}", *ratios, f"{row['same_text']:.1%}"])
    ceilings = {row["dtype"]: f"{row['ceiling'] / 1e9:.0f} GFLOP/s" for row in found["steps"]}
    about = f"{found['about']}; ceiling " + ", ".join(f"{speed} in {dtype}" for dtype, speed in ceilings.items())
    return [about, "", *markdown(steps), "", *markdown(decoding)]


def flags(doc):
    """The parser of the flags that this script and peers share."""
    p = cli.parser(doc)
    here, count = Path(os.path.relpath(Path(__file__).parent.parent / "datasets")), cli.whole(1)
    add = p.add_argument
    add("--init", help="Hugging Face folder or repo id; default: a small model with random weights")
    add("--tokenizer", help="default: what --init comes with, synth for the small model")
    add("--data", type=Path, default=here / "synth_test.jsonl", help="JSONL of conversations")
    add("--k", type=cli.whole(0), default=1, help="number of [PRED] tokens")
    add("--batch_size", type=count, default=32, help="examples per training step")
    add("--steps", type=count, default=30, help="timed steps of each kind")
    add("--decode_batch", type=count, default=128, help="prompts per batch of batched decoding")
    add("--decode_rows", type=count, default=1000, help="rows that are decoded in batches")
    add("--new_tokens", type=count, default=32, help="budget of an answer")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add("--json", type=Path, metavar="FILE", help="write what was found there, too")
    return p


def open_model(args):
    """(LLMJEPA, tokenizer, examples) that the flags name; random weights, if they name none, are those of seed 0."""
    torch.manual_seed(0)
    tokenizer = hf.tokenizer(args.tokenizer or args.init or "synth")
    tiny = Config(tokenizer.vocab_size, n_layer=4, n_head=4, d_model=128, d_ff=320)
    decoder = weights.load(weights.fetch(args.init)) if args.init else Decoder(tiny)
    model = LLMJEPA(decoder, args.k).to(hardware(args.device)[0])
    _, examples = data.examples_of(data.read(args.data), tokenizer, decoder.config.block_size, args.k, too_long="skip")
    if len(examples) < args.batch_size:
        raise UserError(f"{args.data}: {len(examples)} rows are fewer than --batch_size {args.batch_size}")
    return model, tokenizer, examples


def make_forms(args, key):
    """The `Form` of this (kind, dtype), its model freshly opened."""
    model, _, examples = open_model(args)
    return our_forms(model.train(), examples, args, key[1])


def finish(args, model, steps, decoding, **more):
    """Print what was found and write it where the flags say."""
    about = (f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.data.name}, batch {args.batch_size}, "
             f"k = {args.k}, {model.pred.device.type}, {torch.get_num_threads()} threads")
    found = {"command": shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
             "about": about, "batch_size": args.batch_size, **more, "machine": machine(), "steps": steps,
             "decoding": decoding}
    print("\n".join(tables(found)))
    if args.json:
        cli.write_json(args.json, found)


def main():
    p = flags(__doc__)
    p.add_argument("--rows", type=cli.whole(1), default=32, help="rows that are decoded one by one")
    args = p.parse_args()
    model, tokenizer, examples = open_model(args)
    device = model.pred.device
    prompts = [e.full[: e.answer_start] for e in examples[: args.decode_rows]]
    decoded = time_decoding(model.decoder.eval(), prompts, tokenizer.stop, args)
    naive = decoded["one by one, no cache"][1]
    decoding = [{"form": name, "rows_per_s": 1 / seconds,
                 "same_text": sum(a == b for a, b in zip(answers, naive, strict=False)) / len(naive)}
                for name, (seconds, answers) in decoded.items()]
    forms = {}
    for dtype in dtypes(device):
        forms |= our_forms(model.train(), examples, args, dtype)
    steps = time_forms(forms, model.decoder.config, args.steps, device)
    for row in steps:
        row["mib"] = in_fresh_process(memory_of_steps, make_forms, args, (row["form"], row["dtype"]))
    finish(args, model, steps, decoding, base="plain fine-tuning")


def dtypes(device):
    """The types that are fast here; says so where bfloat16 is not."""
    if has_bfloat16(device):
        return ["float32", "bfloat16"]
    print(f"bfloat16 is left out: this {device.type} is not faster in it", file=sys.stderr)
    return ["float32"]


if __name__ == "__main__":
    cli.run(main)
