"""The method: mask, three views in one pass, what each state may depend on, how losses are averaged."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import STYLES, toy_decoder
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import data
import jepa
from jepa import ANSWER, CODE, DISTANCES, LLMJEPA, PAD, PRED, TEXT
from model import Attention, Config, Decoder
from support.rms_norm import rms_norm

ROOT = Path(__file__).parent.parent

PICTURE = """
    T T T A A P P C C - -
T   # . . . . . . . . . .
T   # # . . . . . . . . .
T   # # # . . . . . . . .
A   # # # # . . . . . . .
A   # # # # # . . . . . .
P   # # # . . # . . . . .
P   # # # . . # # . . . .
C   . . . . . . . # . . .
C   . . . . . . . # # . .
-   . . . . . . . . . # .
-   . . . . . . . . . # #
"""


def gradients(model):
    """Per parameter; zeros where the loss does not depend on it."""
    zeros = torch.zeros_like
    return {name: zeros(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def backward(model, total):
    model.zero_grad()
    total.backward()
    return gradients(model)


def three_passes(model, examples, lam):
    """The naive reference: each view alone, in a forward pass of its own, with mask and positions written out here."""

    def states(embeds):
        n = embeds.shape[0]
        causal = torch.ones(1, n, n).tril().bool()
        return model.decoder.hidden(torch.zeros(1, n).long(), causal, torch.arange(n)[None], embeds=embeds[None])[0]

    embed = lambda ids: model.decoder.embed(torch.tensor(ids))  # noqa: E731
    nll, count, distances = 0.0, 0, []
    for e in examples:
        logits = model.decoder.logits(states(embed(e.full)))
        for i in range(1, len(e.full)):
            if e.trained[i]:
                nll, count = nll - logits[i - 1].log_softmax(-1)[e.full[i]], count + 1
        text = states(torch.cat([embed(e.full[: e.text_end]), model.pred]))[-1]
        code = states(embed(e.code))[-1]
        distances.append(1 - text @ code / (text.norm() * code.norm()))
    lm, distance = nll / count, torch.stack(distances).mean()
    return lm + lam * distance, lm, distance


def encodings(model, batch):
    return model.encodings(model.hidden(batch), batch)


def test_mask_is_the_picture():
    rows = [line.split()[1:] for line in PICTURE.strip().splitlines()[1:]]
    segment = torch.tensor([[TEXT] * 3 + [ANSWER] * 2 + [PRED] * 2 + [CODE] * 2 + [PAD] * 2])
    expected = torch.tensor([[cell == "#" for cell in row] for row in rows])
    assert torch.equal(jepa.mask(segment)[0], expected)
    assert jepa.mask(segment).dtype == torch.bool


def test_mask_holds_in_any_order_of_segments():
    """Rows always have PRED before CODE, so causality would hide it if PRED might see CODE: here CODE comes first."""
    allowed = {(TEXT, TEXT), (ANSWER, TEXT), (ANSWER, ANSWER), (PRED, TEXT), (PRED, PRED), (CODE, CODE), (PAD, PAD)}
    segment = [CODE, PAD, PRED, ANSWER, TEXT, CODE, PAD, PRED, ANSWER, TEXT]
    expected = [[k <= q and (segment[q], segment[k]) in allowed for k in range(10)] for q in range(10)]
    assert jepa.mask(torch.tensor([segment]))[0].tolist() == expected


def test_no_row_of_the_mask_is_empty():
    every_order = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3) segments in all orders, however odd
    assert jepa.mask(every_order).any(dim=-1).all()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_fused_equals_three_passes(decoder, examples, k):
    model = LLMJEPA(decoder, k)
    expected = three_passes(model, examples, lam=2.0)
    wanted = backward(model, expected[0])
    losses = model(data.collate(examples, k), lam=2.0)
    assert_close(tuple(losses), expected, rtol=1e-5, atol=1e-5)
    assert_close(backward(model, losses.total), wanted, rtol=1e-4, atol=1e-5)
    assert k == 0 or wanted["pred"].abs().sum() > 0


@pytest.mark.parametrize("k", [0, 2])
def test_paper_layout_equals_fused_when_the_views_are_the_same_tokens(decoder, examples, k):
    model = LLMJEPA(decoder, k)
    fused, paper = (model(data.collate(examples, k, layout), lam=2.0) for layout in ("fused", "paper"))
    assert_close(tuple(paper), tuple(fused), rtol=1e-5, atol=1e-5)
    assert_close(backward(model, paper.total), backward(model, fused.total), rtol=1e-4, atol=1e-5)


def test_a_view_does_not_know_what_else_is_in_the_row(decoder, examples):
    """Other ANSWER and CODE tokens never change Text's state, other TEXT or ANSWER tokens never change Code's."""
    model = LLMJEPA(decoder, 2)
    batch = data.collate(examples, 2)
    text, code = encodings(model, batch)

    def with_other(*segments):
        where = torch.isin(batch.segment, torch.tensor(segments)) & (batch.ids >= 0)
        return batch._replace(ids=torch.where(where, (batch.ids + 7) % 50, batch.ids))

    assert_close(encodings(model, with_other(ANSWER, CODE, PAD))[0], text, rtol=0, atol=0)
    assert_close(encodings(model, with_other(TEXT, ANSWER, PAD))[1], code, rtol=0, atol=0)
    assert not torch.allclose(encodings(model, with_other(TEXT))[0], text)
    assert not torch.allclose(encodings(model, with_other(CODE))[1], code)


def test_forward_is_ordinary_causal_language_modelling(decoder):
    """ids -> logits: row by row what `hidden` gives under a causal mask, and each token sees those before it alone."""
    ids = torch.randint(0, 50, (2, 6))
    logits = decoder(ids)
    for row, found in zip(ids, logits, strict=True):
        causal = torch.ones(1, 6, 6, dtype=torch.bool).tril()
        hidden = decoder.hidden(row[None], causal, torch.arange(6)[None])
        assert_close(found, decoder.logits(hidden)[0], rtol=1e-5, atol=1e-5)
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % 50
    assert torch.equal(decoder(later)[:, :-1], logits[:, :-1])


def test_rms_norm_of_cpus():
    torch.manual_seed(0)
    x = 1e-2 * torch.randn(3, 5, 8, dtype=torch.float64)  # small enough for eps to matter
    inputs = x.requires_grad_(), torch.randn(8, dtype=torch.float64, requires_grad=True)
    trained = rms_norm(x, (8,), inputs[1], 1e-5)
    assert_close(trained, F.rms_norm(x, (8,), inputs[1], 1e-5), rtol=1e-12, atol=0)
    with torch.no_grad():  # by another way to the same bits
        assert torch.equal(rms_norm(x, (8,), inputs[1], 1e-5), trained)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w.shape, w, 1e-5), inputs)
    strided = x.detach().transpose(0, 2).requires_grad_(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w.shape, w, 1e-5), strided)


def test_a_batch_is_copied_behind_the_back_of_cuda_alone(monkeypatch):
    """Elsewhere (MPS) such a copy may read memory that has been freed."""
    calls, own = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *how, **more: (calls.append(more), own(self, *how))[1])
    jepa.Batch(*[torch.zeros(2, 2, dtype=torch.long)] * 7).to("meta")
    assert calls == [{"non_blocking": False}] * 7


def test_heads_that_share_keys_need_no_kernel_of_their_own(monkeypatch):
    """Of CUDA's fused kernels, but for cuDNN's, those that take a mask want as many heads of keys as of queries. And
    all layers keep one mask for the backward pass, in the type of the scores (else torch makes such a one for each)."""
    attention, shapes, masks = torch.nn.functional.scaled_dot_product_attention, [], []

    def watched(q, k, v, attn_mask, **more):
        assert "enable_gqa" not in more
        shapes.append((tuple(q.shape), tuple(k.shape), tuple(attn_mask.shape)))
        masks.append((attn_mask.data_ptr(), attn_mask.dtype))
        return attention(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    Decoder(Config(50, 3, 6, 24, 32, n_kv_head=2))(torch.ones(5, 7, dtype=torch.long))
    assert shapes == [((5, 2, 21, 4), (5, 2, 7, 4), (5, 1, 21, 7))] * 3
    assert len(set(masks)) == 1 and masks[0][1] == torch.float32


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_on_a_cpu_attention_is_in_float32_under_autocast(softcap, monkeypatch):
    dtypes, attend = [], Attention.attend

    def watched(self, q, k, v, mask):
        out = attend(self, q, k, v, mask)
        dtypes.extend(t.dtype for t in (q, k, v, out))
        return out

    monkeypatch.setattr(Attention, "attend", watched)
    with torch.autocast("cpu", torch.bfloat16):
        logits = Decoder(Config(50, 1, 2, 16, 32, attn_softcap=softcap))(torch.ones(1, 3, dtype=torch.long))
    assert logits.dtype == torch.bfloat16 and dtypes == [torch.float32] * 4


def test_autocast_casts_once_for_all_projections():
    model, dtypes = Decoder(Config(50, 1, 2, 16, 32)), []
    for module in (model.blocks[0].attn.q_proj, model.blocks[0].mlp.gate_proj):
        module.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(torch.ones(1, 3, dtype=torch.long))
        assert dtypes[-2:] == [dtype] * 2


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_encodings_are_compared_in_float32_under_autocast(distance, decoder, examples):
    model, batch = LLMJEPA(decoder, 1), data.collate(examples, 1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(batch)
        found = model.losses(hidden, batch, 1.0, distance).jepa
    assert_close(found, DISTANCES[distance](*model.encodings(hidden, batch)), rtol=0, atol=0)


def test_padding_changes_nothing(decoder, examples):
    model = LLMJEPA(decoder, 1)
    alone = [encodings(model, data.collate([e], 1)) for e in examples]
    together = encodings(model, data.collate(examples, 1))
    for view in (0, 1):
        assert_close(torch.cat([pair[view] for pair in alone]), together[view], rtol=1e-5, atol=1e-5)


def test_without_a_jepa_term_it_is_plain_fine_tuning(decoder, examples):
    """lam = 0, a batch without views, and cross-entropy written out here give the same loss and gradients."""
    model = LLMJEPA(decoder, 2)
    plain = model(data.collate(examples, 2, jepa=False), lam=0.0)
    wanted = backward(model, plain.total)
    ignored = model(data.collate(examples, 2), lam=0.0)
    assert_close(ignored.total, plain.total, rtol=1e-6, atol=1e-6)
    got = backward(model, ignored.total)
    assert got.pop("pred").abs().max() == 0
    assert wanted.pop("pred").abs().max() == 0
    assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert plain.total == plain.lm and plain.jepa == 0

    batch = data.collate(examples, 2, jepa=False)
    assert (batch.segment != PRED).all() and (batch.segment != CODE).all() and len(batch.text_at) == 0
    logits = decoder.logits(decoder.hidden(batch.ids, jepa.mask(batch.segment), batch.position))
    label = torch.tensor([target for e in examples for target, wanted in zip(e.full, e.trained, strict=True) if wanted])
    columns = [(row, i - 1) for row, e in enumerate(examples) for i, wanted in enumerate(e.trained) if wanted]
    read = torch.stack([logits[at] for at in columns])
    assert_close(plain.lm, F.cross_entropy(read, label), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "l2", "mse"])
def test_parts_of_a_step_sum_to_the_whole(decoder, examples, distance):
    """Accumulating 4 x 1 examples equals 1 x 4, although the examples have different numbers of labels.

    Not so infonce, whose negatives are the other examples of the same forward pass.
    """
    model = LLMJEPA(decoder, 1)
    whole = model(data.collate(examples, 1), lam=2.0, distance=distance)
    wanted = backward(model, whole.total)
    step = data.count(examples)
    parts = [model(data.collate([e], 1), lam=2.0, distance=distance, whole=step) for e in examples]
    sums = [sum(part) for part in zip(*parts, strict=True)]
    assert_close(tuple(sums), tuple(whole), rtol=1e-5, atol=1e-6)
    assert_close(backward(model, sums[0]), wanted, rtol=1e-4, atol=1e-5)


def test_distances_on_vectors_that_one_can_check_by_hand():
    text, code = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    assert_close(jepa.cosine(text, code), torch.tensor((0.0 + 2.0) / 2))
    assert_close(jepa.l2(text, code), torch.tensor((2.0 + 4.0) / 2))
    assert_close(jepa.mse(text, code), torch.tensor((4.0 + 16.0) / 4))
    # similarities [[1, 0], [0, -1]] / 0.07: the first Text finds its Code, the second sees the other one as closer
    scores = torch.tensor([[1.0, 0.0], [0.0, -1.0]]) / 0.07
    assert_close(jepa.infonce(text, code), -scores.log_softmax(-1).diag().mean())


def test_uniformity_of_equal_points_and_of_a_square():
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    pairs = [-2 * 2.0] * 4 + [-2 * 4.0] * 2  # squared distances: four sides of 2, two diagonals of 4
    assert_close(jepa.uniform(square, square), torch.tensor(pairs).exp().mean().log())
    same = square[:1].expand(4, 2)
    assert_close(jepa.uniform(same, same), torch.tensor(0.0))
    for n in (2, 9):
        text, code = torch.randn(2, n, 5)
        apart = [torch.pdist(F.normalize(x, dim=-1)).square().mul(-2).exp().mean().log() for x in (text, code)]
        assert_close(jepa.uniform(text, code), jepa.cosine(text, code) + sum(apart) / 2)
    assert_close(jepa.uniform(text[:1], code[:1]), jepa.cosine(text[:1], code[:1]))


@pytest.mark.parametrize("distance", ["infonce", "uniform"])
def test_collapse_is_not_the_minimum(distance):
    """Where cosine is satisfied with one point for all, these two prefer pairs that can be told apart."""
    torch.manual_seed(0)
    point, apart = torch.randn(1, 64).expand(32, 64), torch.randn(32, 64)
    assert jepa.cosine(point, point) == pytest.approx(0, abs=1e-6)
    assert jepa.DISTANCES[distance](apart, apart) < jepa.DISTANCES[distance](point, point) - 0.1
    shuffled = jepa.DISTANCES[distance](apart, apart.roll(1, 0))
    assert jepa.DISTANCES[distance](apart, apart) < shuffled - 0.1


def test_gamma_weighs_the_next_token_loss(decoder, examples):
    losses = LLMJEPA(decoder, 1)(data.collate(examples, 1), lam=2.0, gamma=0.25)
    assert_close(losses.total, 0.25 * losses.lm + 2.0 * losses.jepa)


@pytest.mark.parametrize("layout", ["fused", "paper"])
def test_reverse_reads_text_without_and_code_with_pred(decoder, examples, layout):
    """Against passes of their own: Text alone, Code followed by [PRED]."""
    model = LLMJEPA(decoder, 2)
    text, code = encodings(model, data.collate(examples, 2, layout, reverse=True))
    for i, e in enumerate(examples):
        for ids, found in ((e.text, text[i]), (e.code + [-1, -2], code[i])):
            row = torch.tensor([ids])
            batch = jepa.Batch(row, torch.zeros_like(row), torch.arange(len(ids))[None], *[None] * 4)
            assert_close(model.hidden(batch)[0, -1], found, rtol=1e-5, atol=1e-5)


def test_pred_vectors_are_a_parameter_of_their_own(decoder):
    model = LLMJEPA(decoder, 3)
    assert model.pred.shape == (3, 32) and model.pred.requires_grad
    assert torch.pdist(model.pred).min() > 0.1  # they differ from each other
    assert decoder.logits(torch.randn(2, 32)).shape == (2, 50)  # and are not tokens that could be predicted
    assert decoder.embed.weight.shape == (50, 32)
    assert "pred" not in decoder.state_dict()


def test_pred_vectors_are_used_in_reading_order(decoder, examples):
    """The columns of PRED hold pred[0], pred[1], ... as an independent embedding of the row shows."""
    model = LLMJEPA(decoder, 2)
    batch = data.collate(examples[:1], 2)
    columns = (batch.segment[0] == PRED).nonzero().flatten()
    embeds = decoder.embed(batch.ids.clamp(min=0)).detach().clone()
    embeds[0, columns] = model.pred.detach()
    hidden = decoder.hidden(batch.ids, jepa.mask(batch.segment), batch.position, embeds=embeds)
    assert_close(model.hidden(batch), hidden, rtol=1e-6, atol=1e-6)
    swapped = embeds.clone()
    swapped[0, columns] = model.pred.detach().flip(0)
    other = decoder.hidden(batch.ids, jepa.mask(batch.segment), batch.position, embeds=swapped)
    assert not torch.allclose(other, hidden)


@pytest.mark.parametrize("style", STYLES)
def test_positions_restart_for_code(style, examples):
    """With learned positions a shift of CODE changes its encoding; with RoPE only distances count, so it does not."""
    model = LLMJEPA(toy_decoder(style), 1)
    batch = data.collate(examples, 1)
    shifted = batch._replace(position=batch.position + 3 * (batch.segment == CODE))
    same = torch.allclose(encodings(model, shifted)[1], encodings(model, batch)[1], atol=1e-5)
    assert same == (style == "llama")


def test_stop_grad_keeps_the_gradient_out_of_one_view(decoder, examples):
    """.pred belongs to Text's view: with "text" stopped it gets no gradient, with "code" stopped it does."""
    model = LLMJEPA(decoder, 1)
    batch = data.collate(examples, 1)
    for name, reached in (("none", True), ("code", True), ("text", False)):
        got = backward(model, model(batch, stop_grad=name).jepa)
        assert (got["pred"].abs().sum() > 0) == reached, name


def test_logits_in_parts_change_nothing(decoder, examples):
    """The chunked cross-entropy equals the plain one in loss and gradients."""
    model, batch = LLMJEPA(decoder, 1), data.collate(examples, 1)
    whole = model(batch, lam=2.0)
    wanted = backward(model, whole.total)
    for at_once in (1, 3, 5):
        model.labels_at_once = at_once
        parts = model(batch, lam=2.0)
        assert_close(tuple(parts), tuple(whole), rtol=1e-6, atol=1e-6)
        assert_close(backward(model, parts.total), wanted, rtol=1e-5, atol=1e-6)


def test_a_large_vocabulary_needs_no_tensor_of_all_labels_and_all_tokens():
    """150,000 tokens and every id a target: the largest tensor, forward or backward, is far smaller than (L, V)."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    vocabulary, length = 150_000, 300
    decoder = Decoder(Config(vocabulary, n_layer=1, n_head=1, d_model=16, d_ff=16, block_size=length))
    ids = torch.randint(1, vocabulary, (length,)).tolist()
    example = data.Example(ids, [False] + [True] * (length - 1), 5, ids[:5], ids[5:9])
    with Largest() as largest:
        LLMJEPA(decoder, 1)(data.collate([example, example], 1)).total.backward()
    labels = 2 * (length - 1)
    assert 0 < largest.numbers <= 2**24 < labels * vocabulary / 5


def test_a_part_of_the_logits_takes_as_much_memory_as_the_output_matrix():
    """Or its gradients, one for each part, would be most of the work: Llama-3.2-1B's has 128,256 x 2,048 numbers."""
    with torch.device("meta"):
        assert LLMJEPA(Decoder(Config(128_256, 1, 1, 2048, 8)), 1).labels_at_once == 2048
        assert LLMJEPA(Decoder(Config(128_256, 1, 1, 2048, 8)).requires_grad_(False), 1).labels_at_once == 512
        assert LLMJEPA(Decoder(Config(128_256, 1, 1, 2048, 8, tied=False)), 1).labels_at_once == 2048
        assert LLMJEPA(Decoder(Config(512, 1, 1, 128, 8)), 1).labels_at_once == 2**24 // 512


def test_python_jepa_py_shows_the_same_losses_from_one_pass_and_from_three():
    done = subprocess.run([sys.executable, ROOT / "jepa.py"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    one, three = ([float(number) for number in line.split()[-3:]] for line in done.stdout.splitlines()[-2:])
    assert one == pytest.approx(three, abs=2e-6) and all(value > 0 for value in one)
    assert "may attend to  ####.....##...." in done.stdout  # the second [PRED] sees TEXT and the first one


def test_embed_scale_is_of_tokens_and_pred_alike(examples):
    """Gemma's: every embedding is multiplied, also where jepa.py has looked it up."""
    scaled, plain = (LLMJEPA(toy_decoder("llama", embed_scale=scale), 1) for scale in (3.0, 1.0))
    with torch.no_grad():
        plain.pred *= 3
        plain.decoder.embed.weight *= 3
    batch = data.collate(examples, 1)
    assert_close(scaled.hidden(batch), plain.hidden(batch))


def test_pred_vectors_start_within_the_cloud_of_embeddings():
    decoder = toy_decoder("llama")
    with torch.no_grad():
        decoder.embed.weight.mul_(torch.linspace(0.01, 1, 32)).add_(torch.arange(32.0))
    table, pred = decoder.embed.weight.detach(), LLMJEPA(decoder, 2000).pred.detach()
    assert_close(pred.std(0) / table.std(0), torch.ones(32), atol=0.1, rtol=0)
    assert ((pred.mean(0) - table.mean(0)).abs() < 0.15 * table.std(0)).all()


def test_logits_in_parts_are_made_again_and_not_kept(decoder, examples, monkeypatch):
    made, logits = [], decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda states: made.append(len(states)) or logits(states))
    model = LLMJEPA(decoder, 1)
    model.labels_at_once = 3
    model(data.collate(examples, 1)).total.backward()
    assert len(made) == 2 * math.ceil(data.count(examples)[0] / 3) and max(made) == 3


def test_recomputed_blocks_run_twice(decoder, examples):
    model, passes = LLMJEPA(decoder, 1), []
    decoder.blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    decoder.checkpoint_activations = True
    model(data.collate(examples, 1)).total.backward()
    assert len(passes) == 2
    model.eval()(data.collate(examples, 1)).total.backward()
    assert len(passes) == 3


@pytest.mark.parametrize("changes", [{}, {"position": "learned", "norm": "layer", "gated": False, "mlp_bias": True}])
def test_initial_weights_are_gpt2s(changes):
    torch.manual_seed(0)
    for name, p in Decoder(Config(500, 8, 4, 64, 128, tied=False, **changes)).named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.split(".")[-2] in ("o_proj", "down_proj") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
