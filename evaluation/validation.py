"""What training looks at after each epoch: losses, cosines of true and shuffled pairs, exact match, three answers."""

import math

import torch
from tqdm import tqdm

import data
from evaluation import encodings, generate, tasks
from support.processes import RANK

SAMPLE = 200  # rows, of which exact match is taken
COLLAPSED = (
    "The encodings have collapsed: true pairs are no closer than shuffled ones, so a small JEPA loss means nothing.\n"
    "What can be tried: --distance infonce --lam 0.05, --stop_grad code (see experiments/README.md)."
)


@torch.no_grad()
def validate(run):
    """{name: value} of a `train.Run`: losses and cosines over all validation rows, exact match on the first SAMPLE that
    have an answer. Prints three answers, and once that the encodings have collapsed. All processes do the same here."""
    args, model, (conversations, examples) = run.args, run.model.eval(), run.val_rows
    views = all(e.code and not (e.own_text and args.layout == "fused") for e in examples)
    whole, sums, states = data.count(examples, views), torch.zeros(3, device=run.device), []
    by_length = sorted(examples, key=lambda e: len(e.full))
    for start in range(0, len(examples), args.batch_size):
        chunk = by_length[start : start + args.batch_size]
        batch = data.collate(chunk, args.k, jepa=views, **run.layout).to(run.device)
        with run.autocast():
            hidden = model.hidden(batch)
            sums += torch.stack(model.losses(hidden, batch, args.lam, args.distance, args.gamma, whole=whole))
        states.append(torch.stack(model.encodings(hidden, batch)))
    total, lm, jepa = sums.tolist()
    scores = {"val_lm": lm, "val_total": total}
    if views:
        cosines = encodings.cosines(*torch.cat(states, dim=1))
        scores |= {"val_jepa": jepa} | {f"val_cosine_{name}": value for name, value in cosines.items()}
        before = [{name: line.get(f"val_cosine_{name}", 0.0) for name in cosines} for line in run.validations]
        if args.lam > 0 and encodings.collapsed(cosines) and not any(map(encodings.collapsed, before)) and RANK == 0:
            tqdm.write(COLLAPSED)
    answered = [pair for pair in zip(conversations, examples, strict=True) if pair[1].answer_start < len(pair[1].full)]
    if answered:
        scores |= exact_match(run, answered[:SAMPLE])
    model.train()
    return scores


def is_best(scores, earlier, rows):
    """Are the weights with these scores, on so many rows, to be kept rather than those of the `earlier` validations?

    They are if their exact match is within one standard error of the highest (the rule of Breiman et al., CART, 1984):
    few rows tell epochs badly apart, and at a falling learning rate the later one is mostly the better. While no answer
    is right, the lowest loss decides.
    """
    exact, highest = scores.get("val_exact", 0.0), max((line.get("val_exact", 0.0) for line in earlier), default=0.0)
    if exact == highest == 0:
        return all(scores["val_lm"] < line["val_lm"] for line in earlier)
    return exact >= highest - math.sqrt(highest * (1 - highest) / min(rows, SAMPLE))


def exact_match(run, sample):
    """{"val_exact", "val_stop_rate"} of the model's answers to (conversation, example) pairs; prints three of them."""
    prompts = [e.full[: e.answer_start] for _, e in sample]
    budget = max(len(e.full) - e.answer_start for _, e in sample) + 8  # a little more than the longest answer needs
    with run.autocast():
        answers = dict(generate.in_batches(run.model.decoder, prompts, run.tokenizer.stop, budget,
                                           4 * run.args.batch_size))
    exact = 0
    for i, (conversation, _) in enumerate(sample):
        question, gold = (message["content"].strip() for message in conversation.messages[-2:])
        output = run.tokenizer.decode(answers[i].ids).strip()
        right = tasks.exact(output, gold)
        exact += right
        if i < 3 and RANK == 0:
            verdict = "right" if right else f"wrong, gold is {gold}"
            tqdm.write(f"  {question}\n    -> {output}   ({verdict})")
    stopped = sum(answer.stopped for answer in answers.values())
    return {"val_exact": exact / len(sample), "val_stop_rate": stopped / len(sample)}
