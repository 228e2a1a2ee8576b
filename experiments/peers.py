"""Our steps and decoding beside those of Hugging Face transformers: same rows, same weights, in turns, in one process.

    python -m experiments.peers                                      # a Llama of 3.7M parameters, random weights
    python -m experiments.peers --init FOLDER --leave_out official   # a real model, without the slowest form

First it is checked that all forms compute the same losses. The forms of transformers are:

    plain      padded to the longest row; the next-token loss alone
    two rows   [conversation] and [Text + PRED | Code] under a 4-D mask, padded to the longest
    three rows [conversation], [Text + PRED] and [Code], padded to the longest
    official   the two rows padded to 512, under an additive mask, activations recomputed in the backward pass

Each is called as one would write it: labels go in, the loss and all hidden states come out. FLOPs are those of the
padded rows, with logits in every column and without what is recomputed.
"""

import tempfile
import warnings
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import data
import jepa
from evaluation import generate
from experiments import bench
from experiments.bench import LAM, Form
from hf import weights
from model import Config, Decoder
from support import cli
from support.cli import Stopped, UserError
from support.processes import hardware

OFFICIAL_WIDTH = 512


def three_rows(examples, k):
    """The `jepa.Batch` in which each view has a row of its own: all conversations, then all Texts, then all Codes."""
    pred, n = [-1 - i for i in range(k)], len(examples)
    views = [e.text + pred for e in examples] + [e.code for e in examples]
    rows = [data.Example(ids, [False] * len(ids), len(ids), [], []) for ids in views]
    last = torch.tensor([[row, len(ids) - 1] for row, ids in enumerate(views, n)])
    return data.collate([*examples, *rows], k, jepa=False)._replace(text_at=last[:n], code_at=last[n:])


def official_rows(examples, k):
    """The rows of the paper layout, all of them 512 columns wide."""
    batch = data.collate(examples, k, "paper")
    wider = OFFICIAL_WIDTH - batch.ids.shape[1]
    return batch._replace(ids=F.pad(batch.ids, (0, wider)), position=F.pad(batch.position, (0, wider)),
                          segment=F.pad(batch.segment, (0, wider), value=jepa.PAD))


THEIRS = {  # name: (examples, k -> Batch; which mask)
    "HF plain": (partial(data.collate, jepa=False), "padding"),
    "HF two rows": (partial(data.collate, layout="paper"), "packed"),
    "HF three rows": (three_rows, "padding"),
    "HF official": (official_rows, "additive"),
}


def their_losses(model, batch, pred, mask):
    """`jepa.Losses` of a transformers model; pred: the token that stands for [PRED]."""
    arguments = {"attention_mask": batch.segment != jepa.PAD}
    if mask != "padding":
        packed = jepa.mask(batch.segment)[:, None]
        additive = torch.zeros(packed.shape, device=packed.device).masked_fill(~packed, torch.finfo(torch.float32).min)
        arguments = {"attention_mask": packed if mask == "packed" else additive, "position_ids": batch.position}
    labels = torch.full_like(batch.ids, -100)
    labels[batch.label_at[:, 0], batch.label_at[:, 1] + 1] = batch.label
    ids = torch.where(batch.ids < 0, pred, batch.ids)
    found = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False, **arguments)
    distance = torch.zeros_like(found.loss)
    if len(batch.text_at):
        states = found.hidden_states[-1]
        distance = jepa.cosine(jepa.pick(states, batch.text_at).float(), jepa.pick(states, batch.code_at).float())
    return jepa.Losses(found.loss + LAM * distance, found.loss, distance)


def open_theirs(args):
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of gradient_checkpointing_enable, whose new name not all 5.x have
    return AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32).to(hardware(args.device)[0]).train()


def their_forms(model, examples, args, dtype):
    """{(name, dtype): Form}"""
    device, pred = model.device, model.config.vocab_size - 1
    optimizer, autocast = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), hardware(args.device, dtype)[1]

    def batch_of(number, rows):
        return rows(bench.rows_of(examples, number, args.batch_size), args.k)

    def step(number, rows, mask):
        if mask == "additive":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with autocast():
            losses = their_losses(model, batch_of(number, rows).to(device), pred, mask)
        losses.total.backward()
        model.gradient_checkpointing_disable()
        optimizer.step()
        optimizer.zero_grad()

    return {(name, dtype): Form(partial(step, rows=rows, mask=mask), partial(batch_of, rows=rows), all_logits=True)
            for name, (rows, mask) in THEIRS.items()}


@torch.no_grad()
def check(ours, theirs, examples, args):
    """{which tokens: {form: losses of the first step's rows}}. Raises Stopped where two differ by more than 1e-4.

    In the timed steps Text is the user's turn alone, but in the fused layout, which shares the conversation's. So fused
    is compared with rows whose Text is that of the conversation, system turn included.
    """
    pred, rows = theirs.config.vocab_size - 1, bench.rows_of(examples, 0, args.batch_size)
    ours.pred.copy_(ours.decoder.embed.weight[[pred] * args.k])
    shared = [replace(e, text=e.full[: e.text_end], text_start=0) for e in rows]
    kinds = dict(zip(("plain", "fused", "paper"), bench.KINDS.values(), strict=True))
    groups = {  # which tokens: (rows, our form, their forms)
        "the conversation alone": (rows, "plain", ["HF plain"]),
        "Text is the user's turn": (rows, "paper", ["HF two rows", "HF three rows", "HF official"]),
        "Text is the conversation's": (shared, "fused", ["HF two rows", "HF three rows"]),
    }
    found = {}
    for name, (members, kind, names) in groups.items():
        losses = {kind: ours(data.collate(members, args.k, **kinds[kind]).to(theirs.device), lam=LAM)}
        for form in names:
            make, mask = THEIRS[form]
            losses[form] = their_losses(theirs, make(members, args.k).to(theirs.device), pred, mask)
        found[name] = {form: [value.item() for value in three] for form, three in losses.items()}
        for form, three in found[name].items():
            if not torch.allclose(torch.tensor(three), torch.tensor(found[name][kind]), rtol=1e-4, atol=1e-5):
                raise Stopped(f"{name}: {form} gives {three}, ours ({kind}) {found[name][kind]}; nothing is timed")
    return found


def time_generation(decoder, theirs, prompts, stop, args):
    """Rows of the table of decoding: transformers' generate and ours, over the same batches, greedy, with caches."""
    by_length = sorted(prompts, key=len, reverse=True)
    batches = [by_length[i : i + args.decode_batch] for i in range(0, len(by_length), args.decode_batch)]
    answers = {"HF generate": {}, "ours": {}}

    def generate_theirs(number):
        batch = batches[max(number, 0)]
        width = max(map(len, batch))
        ids = torch.tensor([[stop] * (width - len(ids)) + ids for ids in batch], device=theirs.device)
        seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=theirs.device)
        made = theirs.generate(input_ids=ids, attention_mask=seen, max_new_tokens=args.new_tokens, do_sample=False,
                               eos_token_id=stop, pad_token_id=stop)[:, width:].tolist()
        answers["HF generate"][number] = [ids[: ids.index(stop)] if stop in ids else ids for ids in made]

    def generate_ours(number):
        made = generate.greedy(decoder, batches[max(number, 0)], stop, args.new_tokens)
        answers["ours"][number] = [answer.ids for answer in made]

    with torch.inference_mode():
        forms = {"HF generate": generate_theirs, "ours": generate_ours}
        seconds = bench.take_turns(forms, len(batches), theirs.device, warm_up=1)
    pairs = [(a, b) for number in range(len(batches))
             for a, b in zip(*(made[number] for made in answers.values()), strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    return [{"form": name, "rows_per_s": len(prompts) / sum(seconds[name]), "same_text": same} for name in forms]


def make_forms(args, key):
    """The `Form`s among which this (name, dtype) is, one model freshly opened."""
    model, _, examples = bench.open_model(args)
    if not key[0].startswith("HF"):
        return bench.our_forms(model.train(), examples, args, key[1])
    del model
    return their_forms(open_theirs(args), examples, args, key[1])


def main():
    p = bench.flags(__doc__)
    p.add_argument("--leave_out", nargs="+", choices=list(THEIRS), default=[], help="forms that are not timed")
    p.set_defaults(batch_size=4, steps=10, decode_rows=256, decode_batch=64)
    args = p.parse_args()
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed, which this compares with: pip install -r tests/requirements.txt"
                        ) from None
    with tempfile.TemporaryDirectory() as folder:
        if args.init is None:
            torch.manual_seed(0)
            weights.save(Decoder(Config(1024, n_layer=4, n_head=4, d_model=256, d_ff=688, tied=False)), folder)
            args.init, args.tokenizer = folder, "synth"
        ours, tokenizer, examples = bench.open_model(args)
        theirs = open_theirs(args)
        losses = check(ours.train(), theirs, examples, args)
        prompts = [e.full[: e.answer_start] for e in examples[: args.decode_rows]]
        decoding = time_generation(ours.decoder.eval(), theirs.eval(), prompts, tokenizer.stop, args)
        forms = {}
        for dtype in bench.dtypes(theirs.device):
            forms |= bench.our_forms(ours.train(), examples, args, dtype)
            forms |= their_forms(theirs.train(), examples, args, dtype)
        forms = {key: form for key, form in forms.items() if key[0] not in args.leave_out}
        steps = bench.time_forms(forms, ours.decoder.config, args.steps, theirs.device)
        for row in steps:
            row["mib"] = bench.in_fresh_process(bench.memory_of_steps, make_forms, args, (row["form"], row["dtype"]))
        bench.finish(args, ours, steps, decoding, base="LLM-JEPA, fused", losses=losses,
                     transformers=transformers.__version__)


if __name__ == "__main__":
    cli.run(main)
