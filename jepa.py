"""LLM-JEPA in one file (Huang, LeCun, Balestriero, arXiv 2509.14252). Start reading here.

A training example has two views of one thing: **Text** (a question) and **Code** (its answer: a regex, an SQL query).
A language model learns to write Code after Text. LLM-JEPA also asks that the model's own *encoding* of Text can predict
its encoding of Code (paper, section 3):

    L = gamma * L_LM(conversation) + lam * d( Pred(Enc(Text)), Enc(Code) )        d: 1 - cosine similarity, or another

    Enc(x)   the hidden state, after the final norm, at the last content token of x, where x is read alone
    Pred     no extra network: k learned vectors, the [PRED] tokens, are appended to Text; the state at the last of them
             is Pred(Enc(Text)). The decoder itself is the predictor. k = 0 is the identity: Text's last state.

Nothing is frozen: no teacher, no moving average, no projection head; the gradient flows into both views.


One row, four segments
----------------------
Three encodings are needed: of the conversation, of Text followed by [PRED], of Code alone. All three come out of one
forward pass over one row, because a mask decides what each token may know:

                 TEXT                  ANSWER                 PRED          CODE
    tokens       system, question      header, answer, stop   [PRED] x k    header, answer again
    position     0 1 2 3 ...           goes on after TEXT     after TEXT    0 1 2 ...
    learns       -                     answer and stop        -             -
    read         (k = 0: last token)   -                      last token    last token

The mask is causal, and a token sees only the segments that its own view consists of (# = may attend):

    query \\ key   T T T  A A  P  C C
    TEXT          #
                  # #
                  # # #
    ANSWER        # # #  #                 reads on from TEXT: the conversation, as in plain fine-tuning
                  # # #  # #
    PRED          # # #       #            reads on from TEXT as well, but has never seen the answer
    CODE                         #         reads nothing but itself
                                 # #

Leave out PRED and CODE and what remains *is* plain fine-tuning. Since TEXT sees neither ANSWER nor CODE, its states
serve the language model and the predictor at once. Positions restart for each view, so that CODE cannot tell that it
stands in a longer row. Text's view has the system turn in it here; `--layout paper` encodes the user's turn alone, in a
second row. `data.collate` builds such rows; this file knows only segment numbers. Read next: `model.py`.

    B rows, T columns, N pairs of views, C hidden width, V vocabulary
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Segments say who may see what; the [PRED] vectors themselves are marked by their ids, see `LLMJEPA.hidden`.
TEXT, ANSWER, PRED, CODE, PAD = range(5)

# SEES[q, k]: may a token of segment q attend to a token of segment k?
SEES = torch.tensor([
    # TEXT  ANSWER PRED   CODE   PAD
    [True, False, False, False, False],  # TEXT
    [True, True, False, False, False],  # ANSWER
    [True, False, True, False, False],  # PRED
    [False, False, False, True, False],  # CODE
    [False, False, False, False, True],  # PAD sees PAD: a row of the softmax must never be empty, or it is NaN
])


def mask(segment):  # (B, T) -> (B, T, T)
    """True where the token in column q may attend to the token in column k <= q."""
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return SEES.to(segment.device)[segment[:, :, None], segment[:, None, :]] & causal


def cosine(text, code):  # (N, C), (N, C) -> ()
    """1 - cosine similarity, from 0 (same direction) to 2 (opposite). The paper's choice."""
    return 1 - F.cosine_similarity(text, code, dim=-1).mean()


def l2(text, code):  # (N, C), (N, C) -> ()
    """Euclidean length of the difference."""
    return torch.linalg.vector_norm(text - code, dim=-1).mean()


def mse(text, code):  # (N, C), (N, C) -> ()
    """Squared difference, averaged over the C dimensions as well."""
    return (text - code).square().mean()


def infonce(text, code, temperature=0.07):  # (N, C), (N, C) -> ()
    """Cross-entropy of finding each Text's own Code among the N of this batch by cosine similarity."""
    similarity = F.normalize(text, dim=-1) @ F.normalize(code, dim=-1).T  # (N, N)
    return F.cross_entropy(similarity / temperature, torch.arange(len(text), device=text.device))


DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse, "infonce": infonce}


class Losses(NamedTuple):
    total: torch.Tensor  # gamma * lm + lam * jepa
    lm: torch.Tensor  # cross-entropy, nats per labelled token
    jepa: torch.Tensor  # distance, per pair of views; 0 where the batch was built without views


class LLMJEPA(nn.Module):
    """A decoder and its k [PRED] vectors; calling it with a `data.Batch` gives the losses.

    `.pred` (k, C) is a parameter of its own and not k rows of the vocabulary: the vectors cannot be predicted as
    tokens, and an exported checkpoint keeps its vocabulary. They start at random within the cloud of token embeddings.
    """

    def __init__(self, decoder, k):
        super().__init__()
        self.decoder = decoder
        table = decoder.embed.weight.detach().float()  # (V, C)
        self.pred = nn.Parameter(table.mean(0) + table.std(0) * torch.randn(k, table.shape[1], device=table.device))

    def hidden(self, batch):
        """The state of every token, (B, T, C). Id -1 stands for the first [PRED] vector, -2 for the second, ..."""
        embeds = self.decoder.embed(batch.ids.clamp(min=0))
        if len(self.pred):
            vectors = self.pred[(-1 - batch.ids).clamp(min=0)]  # pred[0] where ids >= 0: not used there
            embeds = torch.where((batch.ids < 0)[:, :, None], vectors.type_as(embeds), embeds)
        return self.decoder.hidden(batch.ids, mask(batch.segment), batch.position, embeds=embeds)

    def encodings(self, batch, hidden=None):
        """Pred(Enc(Text)) and Enc(Code), each (N, C) in fp32: the states at the columns that the batch names.

        In a batch that was built with reverse=True these columns hold Enc(Text) and Pred(Enc(Code)).
        """
        hidden = self.hidden(batch) if hidden is None else hidden
        return [hidden[at[:, 0], at[:, 1]].float() for at in (batch.text_at, batch.code_at)]

    def forward(self, batch, lam=1.0, distance="cosine", gamma=1.0, stop_grad="none", step=None):
        """The losses of a batch.

        step: (labelled tokens, pairs) of the whole optimizer step when this batch is one part of it. Each loss is then
        this part's share: the parts' losses (and gradients) sum to those of the whole, however it was cut (but for
        infonce, which compares within a part).
        stop_grad: "text" or "code" keeps the gradient out of that view (the paper keeps none out: "none").
        """
        hidden = self.hidden(batch)
        labelled = batch.label != -100  # (B, T); the output matrix is the largest of all: used only where it is needed
        tokens, pairs = step or (labelled.sum(), len(batch.text_at))
        logits = self.decoder.logits(hidden[labelled]).float()
        lm = F.cross_entropy(logits, batch.label[labelled], reduction="sum") / tokens
        jepa = torch.zeros_like(lm)
        if len(batch.text_at):
            text, code = self.encodings(batch, hidden)
            text, code = (t.detach() if name == stop_grad else t for name, t in (("text", text), ("code", code)))
            jepa = DISTANCES[distance](text, code) * (len(text) / pairs)
        return Losses(gamma * lm + lam * jepa, lm, jepa)
