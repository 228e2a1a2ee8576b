"""Our steps and decoding beside those of Hugging Face transformers: same rows, same weights, in turns, in one process.

    python -m experiments.peers                                      # a Llama of 3.7M parameters, random weights
    python -m experiments.peers --init FOLDER --leave_out "HF official"   # a real model, without the slowest form

First it is checked that all forms (but compiled ones) compute the same losses. The forms of transformers are:

    plain      padded to the longest row; the next-token loss alone
    two rows   [conversation] and [Text + PRED | Code] under a 4-D mask, padded to the longest
    three rows [conversation], [Text + PRED] and [Code], padded to the longest
    official   the two rows padded to 512, under an additive mask, activations recomputed in the backward pass

Each is called as one would write it: labels go in, the loss comes out. FLOPs are those of the
padded rows, with logits in every column and without what is recomputed.
"""

import tempfile
import warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

import data
import jepa
from experiments import bench
from experiments.bench import LAM, Form
from hf import weights
from model import Config, Decoder
from support import cli
from support.processes import hardware


def three_rows(examples, k, multiple=1):
    """The `jepa.Batch` in which each view has a row of its own: all conversations, then all Texts, then all Codes."""
    pred, n = [-1 - i for i in range(k)], len(examples)
    views = [e.text + pred for e in examples] + [e.code for e in examples]
    rows = [data.Example(ids, [False] * len(ids), len(ids), [], []) for ids in views]
    last = torch.tensor([[row, len(ids) - 1] for row, ids in enumerate(views, n)])
    together = data.collate([*examples, *rows], k, jepa=False, multiple=multiple)
    return together._replace(text_at=last[:n], code_at=last[n:])


THEIRS = {  # name: (examples, k, multiple=of columns -> Batch; which mask)
    "HF plain": (partial(data.collate, jepa=False), "padding"),
    "HF two rows": (partial(data.collate, layout="paper"), "packed"),
    "HF three rows": (three_rows, "padding"),
    "HF official": (lambda rows, k, multiple=1: data.collate(rows, k, layout="paper", multiple=512), "additive"),
}


def their_losses(model, batch, mask):
    """`jepa.Losses` of a transformers model, for which the last token of its vocabulary stands for [PRED]."""
    arguments = {"attention_mask": batch.segment != jepa.PAD}
    if mask != "padding":
        packed = jepa.mask(batch.segment)[:, None]
        additive = torch.zeros(packed.shape, device=packed.device).masked_fill(~packed, torch.finfo(torch.float32).min)
        arguments = {"attention_mask": packed if mask == "packed" else additive, "position_ids": batch.position}
    labels = torch.full_like(batch.ids, -100)
    labels[batch.label_at[:, 0], batch.label_at[:, 1] + 1] = batch.label
    ids = torch.where(batch.ids < 0, model.config.vocab_size - 1, batch.ids)
    if mask == "additive":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    last = []  # states; output_hidden_states=True would keep those of all blocks, and break the graphs of compiled ones
    hook = model.base_model.register_forward_hook(lambda module, given, made: last.append(made.last_hidden_state))
    found = model(input_ids=ids, labels=labels, use_cache=False, **arguments)
    hook.remove()
    model.gradient_checkpointing_disable()
    distance = torch.zeros_like(found.loss)
    if len(batch.text_at):
        distance = jepa.cosine(*(jepa.pick(last[0], at).float() for at in (batch.text_at, batch.code_at)))
    return jepa.Losses(found.loss + LAM * distance, found.loss, distance)


def open_theirs(args):
    """The transformers model in the folder args.init, in fp32, without dropout (we have none)."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of gradient_checkpointing_enable, whose new name not all 5.x have
    model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32).to(hardware(args.device)[0]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def their_forms(model, examples, args):
    """{name: Form}"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    of_step = partial(bench.rows_of, examples, size=args.batch_size)
    forms = {name: (model, *how) for name, how in THEIRS.items()}
    if args.compile:
        forms["HF two rows, compiled"] = bench.compiled(model), *THEIRS["HF two rows"]
    return {name: Form(lambda number, rows=rows, **more: rows(of_step(number), args.k, **more),
                       lambda batch, of=of, mask=mask: their_losses(of, batch, mask).total, optimizer, all_logits=True)
            for name, (of, rows, mask) in forms.items()}


@torch.no_grad()
def check(ours, theirs, examples, args):
    """{which tokens: {form: losses of a step}}. Raises Stopped where two differ by more than 1e-4. Fused rows share the
    conversation's TEXT, system turn included: they are compared with rows that have that Text, too."""
    ours.pred.copy_(ours.decoder.embed.weight[[theirs.config.vocab_size - 1] * args.k])
    rows, found = examples[:: len(examples) // args.batch_size][: args.batch_size], {}  # of all lengths
    shared = [replace(e, text=e.full[: e.text_end], text_start=0) for e in rows]
    groups = {  # which tokens: (rows, our form, their forms)
        "the conversation alone": (rows, "plain fine-tuning", ["HF plain"]),
        "Text is the user's turn": (rows, "LLM-JEPA, paper", ["HF two rows", "HF three rows", "HF official"]),
        "Text is the conversation's": (shared, "LLM-JEPA, fused", ["HF two rows", "HF three rows"]),
    }
    for tokens, (members, kind, names) in groups.items():
        own = ours(data.collate(members, args.k, **bench.KINDS[kind]).to(theirs.device), lam=LAM)
        found[tokens] = {kind: [value.item() for value in own]}
        for name in names:
            make, mask = THEIRS[name]
            losses = their_losses(theirs, make(members, k=args.k).to(theirs.device), mask)
            found[tokens][name] = [value.item() for value in losses]
            if not torch.allclose(torch.stack(losses), torch.stack(own), rtol=1e-4, atol=1e-5):
                raise cli.Stopped(f"{tokens}: the losses differ, so nothing is timed: {found[tokens]}")
    return found


def generate_theirs(model, stop, args, prompts):
    """Answers of transformers' generate, greedy and with a cache, to prompts that are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    made = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=args.new_tokens, do_sample=False,
                          eos_token_id=stop, pad_token_id=stop)[:, width:].tolist()
    return [ids[: ids.index(stop)] if stop in ids else ids for ids in made]


def make_forms(args, name):
    """The forms among which `name` is, their model freshly opened."""
    if not name.startswith("HF"):
        return bench.make_forms(args, name)
    examples = bench.open_model(args)[1]
    return their_forms(open_theirs(args), examples, args)


def main():
    p = bench.flags(__doc__, batch_size=4, steps=8, decode_rows=256, decode_batch=64)
    p.add_argument("--leave_out", nargs="+", choices=list(THEIRS), default=[], help="forms that are not timed")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.init is None:
            torch.manual_seed(0)
            weights.save(Decoder(Config(1024, n_layer=4, n_head=4, d_model=256, d_ff=688, tied=False)), folder)
            args.init, args.tokenizer = folder, args.tokenizer or "synth"
        ours, examples, batches, stop = bench.open_model(args)
        theirs = open_theirs(args)
        losses = check(ours, theirs, examples, args)
        decoding, _ = bench.time_decoding({
            "HF generate": partial(generate_theirs, theirs.eval(), stop, args),
            "ours": partial(bench.answers_of, ours.decoder, stop, args)}, batches, theirs.device)
        forms = bench.our_forms(ours, examples, args) | their_forms(theirs.train(), examples, args)
        forms = {name: form for name, form in forms.items() if name not in args.leave_out}
        bench.measure(args, ours, forms, make_forms, decoding, base="LLM-JEPA, fused", losses=losses,
                      transformers=version("transformers"))


if __name__ == "__main__":
    cli.run(main)
