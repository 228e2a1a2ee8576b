"""What a step costs, and what batched decoding saves: everything as ratios within one process.

    python bench.py                                             # the tiny decoder on the default data
    python bench.py --init FOLDER --data FILE --batch_size 4    # a Hugging Face model

Steps of plain fine-tuning and of both layouts of LLM-JEPA take turns, and so do the ways of decoding, so that whatever
else the machine does falls on all of them alike. FLOPs are counted by torch's own counter; `step_flops` is the formula
that the README gives.
"""

import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import hf
from evaluation import generate
from hf import runs, weights
from jepa import LLMJEPA, PAD, TEXT, mask
from model import Config, Decoder
from support import cli
from support.cli import UserError

KINDS = {  # what is timed: arguments of data.collate
    "plain fine-tuning": {"jepa": False},
    "LLM-JEPA, fused": {"layout": "fused"},
    "LLM-JEPA, paper": {"layout": "paper"},
}


def machine():
    """What the figures of a file were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(), "torch": torch.__version__}


def step_flops(config, batch):
    """Floating-point operations of a step, forward and backward, as a sum over rows of T columns.

    A row of T columns costs 2 P T in the linear layers (P: their parameters, without embeddings) and 4 L H D T^2 in
    attention (scores, and weighted sum, each 2 H D T^2 in each of L layers); each label costs 2 V C in the output
    matrix. The backward pass costs twice the forward pass.
    """
    c, (rows, columns) = config, batch.ids.shape
    attention = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = c.d_model * c.d_ff * (3 if c.gated else 2)
    linear = 2 * c.n_layer * (attention + mlp) * columns
    scores = 4 * c.n_layer * c.n_head * c.head_dim * columns**2
    labels = len(batch.label)
    return 3 * (rows * (linear + scores) + 2 * c.vocab_size * c.d_model * labels)


def counted_flops(model, batch):
    """The same by torch's counter, which knows the attention of the plain "math" kernel on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).total.backward()
    model.zero_grad()
    return counter.get_total_flops()


def time_steps(model, examples, args, device):
    """{kind: (seconds per step, tokens per step, FLOPs, peak GPU memory)}, medians over interleaved steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds, tokens, flops, memory = ({kind: [] for kind in KINDS} for _ in range(4))
    size = args.batch_size
    for step in tqdm(range(args.steps + 2), "steps", leave=False):  # the first two warm up
        start = step * size % (len(examples) - size + 1)
        for kind, how in KINDS.items():
            began = time.perf_counter()
            batch = data.collate(examples[start : start + size], args.k, **how).to(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            model(batch, lam=2.0).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory[kind].append(torch.cuda.max_memory_allocated(device))
            if step >= 2:
                seconds[kind].append(time.perf_counter() - began)
                tokens[kind].append((batch.segment != PAD).sum().item())
                flops[kind].append(step_flops(model.decoder.config, batch))
    middle = lambda values: statistics.median(values) if values else None  # noqa: E731
    return {kind: tuple(middle(m[kind]) for m in (seconds, tokens, flops, memory)) for kind in KINDS}


def one_by_one(decoder, prompt, stop, budget):
    """Greedy decoding as one would first write it: one prompt, no cache, the whole row again for each token."""
    ids = torch.tensor([prompt], device=decoder.embed.weight.device)
    while ids.shape[1] < len(prompt) + budget:
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = decoder.hidden(ids, mask(torch.full_like(ids, TEXT)), position)
        token = decoder.logits(hidden[:, -1:]).argmax(dim=-1)
        if token.item() == stop:
            break
        ids = torch.cat([ids, token], dim=1)
    return ids[0, len(prompt) :].tolist()


def time_decoding(decoder, prompts, stop, args, turns=4):
    """{how: (seconds per row, answers)} of: one by one without cache, one by one with cache, in batches with cache.

    In each turn the first two decode their share of the first `--rows` prompts, the third decodes all prompts.
    """
    def batched(chosen, size):
        return [answer.ids for _, answer in sorted(generate.in_batches(decoder, chosen, stop, budget, size))]

    budget, few = args.new_tokens, prompts[: args.rows]
    shares = [few[i * len(few) // turns : (i + 1) * len(few) // turns] for i in range(turns)]
    stages = {
        "one by one, no cache": (shares, lambda p: [one_by_one(decoder, prompt, stop, budget) for prompt in p]),
        "one by one, cached": (shares, lambda p: batched(p, 1)),
        "batched, cached": ([prompts] * turns, lambda p: batched(p, args.decode_batch)),
    }
    seconds, answers = dict.fromkeys(stages, 0.0), {name: [] for name in stages}
    with torch.inference_mode():
        for _, decode in stages.values():
            decode(prompts[:2])  # warms up
        for turn in tqdm(range(turns), "decoding", leave=False):
            for name, (chosen, decode) in stages.items():
                began = time.perf_counter()
                answers[name] += decode(chosen[turn])
                seconds[name] += time.perf_counter() - began
    return {name: (seconds[name] / len(answers[name]), answers[name]) for name in stages}


def arguments():
    p = cli.parser(__doc__)
    add = p.add_argument
    here = Path(os.path.relpath(Path(__file__).parent / "datasets"))
    add("--init", help="Hugging Face folder or repo id; default: the tiny decoder with random weights")
    add("--tokenizer", help="default: what --init comes with, synth for tiny")
    add("--data", type=Path, default=here / "synth_test.jsonl", help="JSONL of conversations")
    add("--k", type=int, default=1, help="number of [PRED] tokens")
    add("--batch_size", type=int, default=32, help="examples per training step")
    add("--steps", type=int, default=30, help="timed steps of each kind")
    add("--rows", type=int, default=32, help="rows that are decoded one by one")
    add("--decode_batch", type=int, default=128, help="prompts per batch of batched decoding")
    add("--decode_rows", type=int, default=2000, help="rows that are decoded in batches")
    add("--new_tokens", type=int, default=32, help="budget of an answer")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = p.parse_args()
    for name in ("batch_size", "steps", "rows", "decode_batch", "decode_rows", "new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def main():
    args = arguments()
    torch.manual_seed(0)
    device, _ = runs.hardware(args.device)
    tokenizer = hf.tokenizer(args.tokenizer or args.init or "synth")
    tiny = Config(tokenizer.vocab_size, n_layer=4, n_head=4, d_model=128, d_ff=320)
    decoder = weights.load(weights.fetch(args.init)) if args.init else Decoder(tiny)
    model = LLMJEPA(decoder, args.k).to(device)
    _, examples = data.examples_of(data.read(args.data), tokenizer, decoder.config.block_size, args.k, too_long="skip")
    if len(examples) < args.batch_size:
        raise UserError(f"{args.data}: {len(examples)} rows are fewer than --batch_size {args.batch_size}")

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.data.name}, batch {args.batch_size}, "
          f"k = {args.k}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    prompts = [e.full[: e.answer_start] for e in examples[: args.decode_rows]]
    decoded = time_decoding(model.decoder.eval(), prompts, tokenizer.stop, args)
    timed = time_steps(model.train(), examples, args, device)
    base = timed["plain fine-tuning"]
    print(f"\n{'median of ' + str(args.steps) + ' steps':22s} {'ms':>8s} {'ratio':>6s} {'tokens/s':>9s} "
          f"{'GFLOP':>8s} {'ratio':>6s}" + (f" {'peak MiB':>9s}" if base[3] else ""))
    for kind, (seconds, tokens, flops, memory) in timed.items():
        print(f"{kind:22s} {seconds * 1e3:8.1f} {seconds / base[0]:6.2f} {tokens / seconds:9.0f} {flops / 1e9:8.2f} "
              f"{flops / base[2]:6.2f}" + (f" {memory / 2**20:9.0f}" if memory else ""))

    naive = decoded["one by one, no cache"]
    cached = decoded["one by one, cached"]
    print(f"\n{'decoding':22s} {'rows/s':>8s} {'x no cache':>11s} {'x cached':>9s}  same text")
    for name, (seconds, answers) in decoded.items():
        same = answers[: len(naive[1])] == naive[1]
        print(f"{name:22s} {1 / seconds:8.1f} {naive[0] / seconds:11.1f} {cached[0] / seconds:9.1f}  {same}")


if __name__ == "__main__":
    cli.run(main)
