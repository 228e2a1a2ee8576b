"""support/muon.py: its update, from singular values in float64; and that it leaves out what must be left out."""

from argparse import Namespace

import pytest
import torch
from conftest import toy_decoder
from torch.testing import assert_close

from jepa import LLMJEPA
from support import muon
from support.muon import Muon, orthogonal
from train import make_optimizer


def expected(matrix):
    """The Newton-Schulz polynomial, five times, on the singular values themselves."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_orthogonal_changes_the_singular_values_alone(shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert_close(orthogonal(stack).double(), torch.stack([*map(expected, stack)]), atol=1e-5, rtol=1e-5)
    singular = torch.linalg.svdvals(orthogonal(stack))
    assert (singular > 0.5).all() and (singular < 1.25).all()
    sizes = torch.tensor([1e4, 1.0, 1e-4])[:, None, None]  # each by its own norm
    assert_close(orthogonal(sizes * stack), orthogonal(stack), atol=1e-5, rtol=1e-5)
    assert orthogonal(torch.zeros_like(stack)).eq(0).all()


@pytest.mark.parametrize(("at_once", "sizes"), [(2**22, [3, 1]), (120, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_three_steps_equal_the_formula_and_the_rest_goes_by_adamw(monkeypatch, at_once, sizes):
    """Three matrices of one shape and one of another, in as many stacks as their size asks for."""
    stacks = []
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    monkeypatch.setattr(muon, "orthogonal", lambda stack: stacks.append(len(stack)) or orthogonal(stack))
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = [draw(*shape).requires_grad_() for shape in ((6, 9), (6, 9), (9, 6), (6, 9))]
    other = draw(6, 9).requires_grad_()
    plain = other.detach().clone().requires_grad_()
    how = {"lr": 0.1, "betas": (0.9, 0.95)}
    optimizer = Muon([{"params": [other]}, {"params": hidden, "weight_decay": 0.3, "muon": True}], **how)
    reference = torch.optim.AdamW([plain], **how)
    weights, momenta = [matrix.detach().double() for matrix in hidden], [0.0] * 4
    for _ in range(3):
        other.grad = plain.grad = draw(6, 9)
        for matrix in hidden:
            matrix.grad = draw(*matrix.shape)
        optimizer.step()
        reference.step()
        for i, matrix in enumerate(hidden):
            momenta[i] = 0.95 * momenta[i] + 0.05 * matrix.grad
            ahead = 0.05 * matrix.grad + 0.95 * momenta[i]
            weights[i] = weights[i] * (1 - 0.1 * 0.3) - 0.1 * 0.2 * 3 * expected(ahead)
            assert_close(matrix.detach().double(), weights[i], atol=1e-5, rtol=1e-5)
        assert_close(other, plain, atol=0, rtol=0)
    assert stacks == 3 * sizes


def test_a_matrix_without_a_gradient_stays():
    moved, left = (torch.ones(4, 3).requires_grad_() for _ in range(2))
    moved.grad = torch.ones(4, 3)
    optimizer = Muon([{"params": [moved, left], "muon": True}], lr=0.1, betas=(0.9, 0.95), fused=True)
    optimizer.step()
    assert (moved != 1).all() and (left == 1).all() and left not in optimizer.state


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has a Muon from 2.9 on")
def test_equals_torch_to_the_precision_of_bfloat16():
    ours = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    how = {"lr": 0.1, "weight_decay": 0.1}
    pair = (Muon([{"params": [ours], "muon": True}], **how),
            torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **how))
    for step in range(3):
        ours.grad = theirs.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        for optimizer in pair:
            optimizer.step()
    assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    both = [torch.ones(3, 4).requires_grad_() for _ in range(2)]
    optimizer = Muon([{"params": both[:1]}, {"params": both[1:], "muon": True}], lr=0.1, fused=True)
    kept = []
    for value, found_inf in ((1.0, 0.0), (float("nan"), 1.0)):
        for p in both:
            p.grad = value * torch.eye(3, 4)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        kept.append([tensor.detach().clone() for p in both for tensor in (p, optimizer.state[p]["exp_avg"])])
    assert_close(*kept, rtol=0, atol=0)
    assert not torch.equal(both[0], torch.ones(3, 4)) and not torch.equal(both[1], torch.ones(3, 4))


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_the_matrices_of_the_blocks_go_by_muon_and_nothing_else(style):
    model = LLMJEPA(toy_decoder(style), 2)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Namespace(lr=1e-3, weight_decay=0.1, optimizer="muon"))
    groups = [({names[p] for p in group["params"]}, group["weight_decay"], group.get("muon", False))
              for group in optimizer.param_groups]
    hidden = {name for name in names.values() if "_proj.weight" in name}
    vocabulary = {name for name in names.values() if "embed" in name or "head" in name}
    assert hidden and vocabulary and "pred" in names.values()
    assert groups == [(vocabulary, 0.1, False), (set(names.values()) - hidden - vocabulary, 0.0, False),
                      (hidden, 0.1, True)]
