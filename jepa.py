r"""LLM-JEPA in one file (Huang, LeCun, Balestriero, arXiv 2509.14252). Start reading here.

A training example has two views of one thing: **Text** (a question) and **Code** (its answer: a regex, an SQL query).
A language model learns to write Code after Text. LLM-JEPA also asks that the model's own *encoding* of Text can predict
its encoding of Code (paper, section 3):

    L = gamma * L_LM(conversation) + lam * d( Pred(Enc(Text)), Enc(Code) )        d: 1 - cosine similarity, or another

    Enc(x)   the hidden state, after the final norm, of the last content token of x, where x sees nothing but itself
    Pred     no extra network: k learned vectors, the [PRED] tokens, are appended to Text, and the hidden state of the
             last of them is Pred(Enc(Text)). The decoder itself is the predictor. k = 0: Text's own last state.

Nothing is frozen: no teacher, no moving average, no projection head; the gradient flows into both views. The paper
searches lam from 0.5 to 4 and k from 0 to 4.


One row, four segments
----------------------
Three passes are needed: over the conversation, over Text followed by [PRED], and over Code alone. One forward pass over
one row gives all three, because the mask decides what each token may know:

                 TEXT                  ANSWER                     PRED          CODE
    tokens       system, question      role tag, answer, stop     [PRED] x k    role tag, answer (once more)
    position     0 1 2 3 ...           goes on from TEXT          from TEXT     0 1 2 ...
    learns       -                     to write answer and stop   -             -
    encoding     (k = 0: last token)   -                          last token    last token

The mask is causal, and a token sees only the segments that its own view consists of (# = may attend):

    query \ key   T T T  A A  P  C C
    TEXT          #
                  # #
                  # # #
    ANSWER        # # #  #                 goes on from TEXT: the conversation, as in plain fine-tuning
                  # # #  # #
    PRED          # # #       #            goes on from TEXT too, at ANSWER's positions, and never sees it
    CODE                         #         sees only itself
                                 # #

ANSWER and PRED are two continuations of the same TEXT that cannot see each other. Leave out PRED and CODE, and what
remains *is* plain fine-tuning: what a step with lam = 0 computes, and what runs at **inference**, where the model gets
TEXT and the role tag and writes the answer. [PRED] and the second Code serve training, and the measuring of encodings.

This is the `fused` layout: its Text includes the system turn. The `paper` layout, the official code's, makes two rows:
[TEXT ANSWER], and [TEXT PRED CODE], whose TEXT has no system turn. Where the views are the same
tokens, both layouts and three separate passes give the same losses and gradients (tests/test_jepa.py); `python jepa.py`
shows one row and three passes.


What it costs, what can go wrong
--------------------------------
*Cost.* A conversation of n tokens with a Code of c costs about 1 + (k + c) / n times plain fine-tuning if fused; paper
adds Text once more. **JEPA-loss dropout** (`--loss_dropout`) turns a fraction of the steps into plain next-token steps:
their other views are not even built, so such a step costs exactly what plain fine-tuning costs.

*No gain is guaranteed.* The next-token loss alone already makes Text's states good for predicting Code, token by token;
the JEPA term asks for one state that resembles another. It can regularise, or take capacity away. Hence the
controls: `--lam 0`, and `--shuffle_pairs`, where a gain cannot come from the pairing.

*Collapse.* If every Text and every Code has the same encoding, the cosine loss is zero and nothing has been learnt. The
usual guards (stop-gradient, moving average, negatives) are absent by design: only the next-token loss stands against
it. So a small JEPA loss proves nothing. Look at the cosine of *shuffled* pairs, each Text with another example's Code:
in a model that has learnt the pairing, true pairs are closer; after collapse both are 1. Each validation of `train.py`
prints the two as cosine_pairs and cosine_shuffled. `infonce` and `uniform` below are distances whose minimum is not at
collapse.

Read next: `model.py`; then `data.py`, whose `collate` builds the `Batch` that this file takes.

    B rows, T columns, L labels, N pairs of views, C hidden width, V vocabulary
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TEXT, ANSWER, PRED, CODE, PAD = range(5)  # the segments
SEES = {  # segment of a token: segments that it may attend to
    TEXT: {TEXT},
    ANSWER: {TEXT, ANSWER},
    PRED: {TEXT, PRED},
    CODE: {CODE},
    PAD: {PAD},  # padding sees padding: a softmax over nothing is NaN
}


@cache
def sees_table(device):  # -> (5, 5)
    """SEES as a tensor, made once per device: a copy in every step would make the CPU wait for the device."""
    return torch.tensor([[key in SEES[query] for key in range(5)] for query in range(5)], device=device)


def mask(segment):  # (B, T) -> (B, T, T)
    """True where the token in column q may attend to the token in column j <= q."""
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return sees_table(segment.device)[segment[:, :, None], segment[:, None, :]] & causal


class Batch(NamedTuple):
    """What a forward pass needs, all int64. An "at" tensor lists (row, column) places in the (B, T) tensors."""

    ids: torch.Tensor  # (B, T): a token id, or -1, -2, ... for the first, second, ... [PRED] vector, wherever it stands
    segment: torch.Tensor  # (B, T): TEXT ... PAD, what a token may see
    position: torch.Tensor  # (B, T): counts from 0 in TEXT and in CODE; ANSWER and PRED both go on from TEXT
    label_at: torch.Tensor  # (L, 2): the places whose next token is to be predicted
    label: torch.Tensor  # (L,): the ids of those next tokens
    text_at: torch.Tensor  # (N, 2): the place whose state is Pred(Enc(Text)), for each example (`reverse`: Enc(Text))
    code_at: torch.Tensor  # (N, 2): the place whose state is Enc(Code) (`reverse`: Pred(Enc(Code)))

    def to(self, device):
        """The same on another device. A GPU copies from pinned memory while it goes on computing."""
        cuda = torch.device(device).type == "cuda"
        return Batch(*((tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda) for tensor in self))


def pick(hidden, at):  # (B, T, C), (N, 2) -> (N, C)
    """The states at the given places."""
    return hidden[at[:, 0], at[:, 1]]


# ---- distances between predicted and actual encodings, both fp32: the mean over N pairs. A new one needs an entry in
# DISTANCES, which makes it a value of `--distance`, and one in IN_BATCH if it compares examples with each other.


def cosine(text, code):  # (N, C), (N, C) -> ()
    """1 - cosine similarity, from 0 (same direction) to 2 (opposite). The paper's choice."""
    return 1 - F.cosine_similarity(text, code, dim=-1).mean()


def l2(text, code):  # (N, C), (N, C) -> ()
    """Euclidean length of the difference."""
    return torch.linalg.vector_norm(text - code, dim=-1).mean()


def mse(text, code):  # (N, C), (N, C) -> ()
    """Squared difference, averaged over the C dimensions as well."""
    return (text - code).square().mean()


def infonce(text, code, temperature=0.07):  # (N, C), (N, C) -> (); the temperature of MoCo (arXiv 1911.05722)
    """Cross-entropy of finding each Text's own Code among the N of this batch by cosine similarity."""
    similarity = F.normalize(text, dim=-1) @ F.normalize(code, dim=-1).T  # (N, N)
    return F.cross_entropy(similarity / temperature, torch.arange(len(text), device=text.device))


def uniform(text, code):  # (N, C), (N, C) -> ()
    """Alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242): cosine, plus a penalty on what lies close
    together on the sphere, log mean exp(-2 |x - y|^2) over x != y: 0 after collapse, about -4 if evenly spread."""
    if len(text) < 2:
        return cosine(text, code)  # nothing to be apart from
    one, other = torch.triu_indices(len(text), len(text), 1, device=text.device)  # all N * (N - 1) / 2 pairs of rows
    near = lambda x: (4 * (x @ x.T)[one, other] - 4).exp().mean().log()  # |x - y|^2 = 2 - 2 x.y  # noqa: E731
    return cosine(text, code) + (near(F.normalize(text, dim=-1)) + near(F.normalize(code, dim=-1))) / 2


DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse, "infonce": infonce, "uniform": uniform}
IN_BATCH = {"infonce", "uniform"}  # these compare the examples of a forward pass with each other


# ---- the model and its loss


class Losses(NamedTuple):
    total: torch.Tensor  # gamma * lm + lam * jepa
    lm: torch.Tensor  # cross-entropy, nats per label (of a part: its share); 0 where there are none
    jepa: torch.Tensor  # distance, per pair of views; 0 where the batch was built without views


class LLMJEPA(nn.Module):
    """A decoder and its k [PRED] vectors; calling it with a `Batch` gives the losses.

    `.pred` (k, C) is a parameter of its own and not k rows of the vocabulary: the vectors cannot be predicted as
    tokens, and an exported checkpoint keeps its vocabulary. They start at random within the cloud of token embeddings.
    """

    def __init__(self, decoder, k):
        super().__init__()
        self.decoder = decoder
        self.gather = None  # of several processes: (N, C) of this one -> those of all, with gradient
        table = decoder.embed.weight.detach().float()  # (V, C)
        # Logits are made for so many labels at a time that they take about the memory of the output matrix with its
        # gradient and moments (16 bytes a weight; 4 where it is frozen): each part makes that gradient anew.
        output = decoder.embed if decoder.config.tied else decoder.head
        self.labels_at_once = max(2**24 // table.shape[0], table.shape[1] // (1 if output.weight.requires_grad else 4))
        self.pred = nn.Parameter(table.mean(0) + table.std(0) * torch.randn(k, table.shape[1], device=table.device))

    def forward(self, batch, lam=1.0, distance="cosine", gamma=1.0, stop_grad="none", whole=None):
        """`Losses` of a batch.

        stop_grad: "text" or "code" makes that encoding a constant, with [PRED] if that view predicts (paper: "none").
        whole: (labels, pairs) of the whole optimizer step, when this batch is one part of it. Each loss is then this
        part's share of the mean: the parts' losses, and gradients, sum to those of the whole, however it was cut (but
        not for distances IN_BATCH, which compare the examples of one part only, over all processes).
        """
        return self.losses(self.hidden(batch), batch, lam, distance, gamma, stop_grad, whole)

    def hidden(self, batch):
        """The state of every token, (B, T, C)."""
        embeds = self.decoder.embed(batch.ids.clamp(min=0))  # a [PRED] vector has a negative id: replaced below
        if len(self.pred):
            vectors = F.embedding((-1 - batch.ids).clamp(min=0), self.pred).type_as(embeds)
            embeds = torch.where((batch.ids < 0)[:, :, None], vectors, embeds)
        return self.decoder.hidden(batch.ids, mask(batch.segment), batch.position, embeds=embeds)

    def losses(self, hidden, batch, lam=1.0, distance="cosine", gamma=1.0, stop_grad="none", whole=None):
        """What `forward` gives, from the states of the batch, (B, T, C)."""
        labels, pairs = (len(batch.label), len(batch.text_at)) if whole is None else whole
        lm = self.next_token_loss(pick(hidden, batch.label_at), batch.label) / max(1, labels)
        jepa = torch.zeros_like(lm)
        if pairs:  # of the whole step: a process that has no pair must still join in `gather`
            text, code = self.encodings(hidden, batch)
            if stop_grad == "text":
                text = text.detach()
            if stop_grad == "code":
                code = code.detach()
            share = len(text) / pairs  # of all processes they sum to 1, so the distance may be of all their rows
            if self.gather and self.training:
                text, code = self.gather(text), self.gather(code)
            with torch.autocast(hidden.device.type, enabled=False):  # or infonce would compare in bfloat16
                jepa = share * DISTANCES[distance](text, code)
        return Losses(gamma * lm + lam * jepa, lm, jepa)

    def encodings(self, hidden, batch):
        """Pred(Enc(Text)) and Enc(Code), each (N, C) in fp32.

        In a batch built with reverse=True, where Code predicts Text, these are Enc(Text) and Pred(Enc(Code)).
        """
        return pick(hidden, batch.text_at).float(), pick(hidden, batch.code_at).float()

    def next_token_loss(self, states, label):  # (L, C), (L,) -> ()
        """Cross-entropy, summed over the labels.

        Logits over a large vocabulary outweigh all else in memory. So they are made for a part of the labels at a time,
        and once more in the backward pass (`checkpoint`) instead of being kept.
        """
        def of_part(states, label):
            return F.cross_entropy(self.decoder.logits(states).float(), label, reduction="sum")

        if len(label) <= self.labels_at_once:
            return of_part(states, label)
        parts = zip(states.split(self.labels_at_once), label.split(self.labels_at_once), strict=True)
        return torch.stack([checkpoint(of_part, *part, use_reentrant=False) for part in parts]).sum()


def toy_row():
    """(tokens, `Batch`) of one row with k = 2."""
    words = "lines with a dog <answer> d o g <stop>".split()  # the id of a word is its place here
    ids = [0, 1, 2, 3] + [4, 5, 6, 7, 8] + [-1, -2] + [4, 5, 6, 7]
    segment = [TEXT] * 4 + [ANSWER] * 5 + [PRED] * 2 + [CODE] * 4
    position = [0, 1, 2, 3] + [4, 5, 6, 7, 8] + [4, 5] + [0, 1, 2, 3]
    predict = [4, 5, 6, 7]  # from "<answer>" on, each of these columns is to predict the next one
    places = lambda columns: torch.tensor([[0, column] for column in columns])  # noqa: E731
    return [words[i] if i >= 0 else f"[PRED {-i}]" for i in ids], Batch(
        ids=torch.tensor([ids]), segment=torch.tensor([segment]), position=torch.tensor([position]),
        label_at=places(predict), label=torch.tensor([ids[column + 1] for column in predict]),
        text_at=places([10]), code_at=places([14]),
    )


def main():
    """A toy row under random weights: what it looks like, and its losses from one pass and from three."""
    from model import Config, Decoder

    torch.manual_seed(0)
    model = LLMJEPA(Decoder(Config(9, n_layer=2, n_head=2, d_model=32, d_ff=64)), k=2)
    tokens, batch = toy_row()
    ids, predict = batch.ids[0].tolist(), batch.label_at[:, 1].tolist()
    print("One row: column, segment, position, token (* marks a target: the column before it is trained to predict it)")
    for column, token in enumerate(tokens):
        token += " *" if column - 1 in predict else ""
        name = ("TEXT", "ANSWER", "PRED", "CODE")[batch.segment[0, column]]
        seen = "".join("#" if allowed else "." for allowed in mask(batch.segment)[0, column])
        print(f"  {column:2d}  {name:6s} {batch.position[0, column]:2d}  {token:10s}  may attend to  {seen}")

    def alone(ids):
        """The states of a view that has a forward pass of its own, (T, C)."""
        row, position = torch.tensor([ids]), torch.arange(len(ids))[None]
        return model.hidden(batch._replace(ids=row, segment=torch.full_like(row, TEXT), position=position))[0]

    with torch.no_grad():
        fused = model(batch, lam=2.0)
        lm = F.cross_entropy(model.decoder.logits(alone(ids[:9])[predict]), batch.label)
        jepa = cosine(alone(ids[:4] + [-1, -2])[-1:], alone(ids[11:])[-1:])
    print("\nlosses at lam = 2         total       lm     jepa")
    print(f"one pass over the row   {fused.total:.6f} {fused.lm:.6f} {fused.jepa:.6f}")
    print(f"three separate passes   {lm + 2 * jepa:.6f} {lm:.6f} {jepa:.6f}")


if __name__ == "__main__":
    main()
