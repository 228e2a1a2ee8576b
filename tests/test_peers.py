"""Hugging Face's forms compute what ours do, and the comparison notices when they do not; no timing is asserted."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from conftest import toy_decoder
from test_bench import counted_flops
from torch._dynamo.testing import CompileCounter

from experiments import bench, peers
from hf import weights
from jepa import LLMJEPA, PAD
from support import cli, processes
from support.cli import Stopped

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pair(tmp_path):
    """(our model, theirs) of the same weights, every parameter of them random."""
    weights.save(toy_decoder("llama"), tmp_path)
    args = Namespace(init=str(tmp_path), device="cpu", k=2, batch_size=3)
    return LLMJEPA(weights.load(tmp_path), 2), peers.open_theirs(args), args


def test_all_forms_compute_the_same_losses(pair, examples):
    ours, theirs, args = pair
    found = peers.check(ours, theirs, examples, args)
    for losses in found.values():
        for three in losses.values():
            torch.testing.assert_close(three, next(iter(losses.values())), rtol=1e-4, atol=1e-5)
    named = {name for losses in found.values() for name in losses}
    assert named == set(bench.KINDS) | set(peers.THEIRS)
    assert all(three[2] > 0.01 for name, three in found["Text is the user's turn"].items())


def test_a_form_that_computes_something_else_is_not_timed(pair, examples, monkeypatch):
    """The packed rows without their mask: PRED and Code would see each other."""
    ours, theirs, args = pair
    monkeypatch.setitem(peers.THEIRS, "HF two rows", (peers.THEIRS["HF two rows"][0], "padding"))
    with pytest.raises(Stopped, match="Text is the user's turn: the losses differ, so nothing is timed"):
        peers.check(ours, theirs, examples, args)


def test_the_official_rows_are_512_wide_and_recomputed(pair, examples):
    ours, theirs, args = pair
    batch = peers.THEIRS["HF official"][0](examples, k=2)
    assert batch.ids.shape == (8, 512) and (batch.segment[:, 40:] == PAD).all()
    calls = []
    theirs.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for mask, times in (("packed", 1), ("additive", 2)):
        calls.clear()
        peers.their_losses(theirs, batch, mask).total.backward()
        assert len(calls) == times


@pytest.mark.parametrize("name", ["HF plain", "HF two rows", "HF three rows"])
def test_the_operations_of_their_forms_are_those_that_torch_counts(pair, examples, name):
    """They make logits in every column, ours where there is a label."""
    ours, theirs, _ = pair
    make, mask = peers.THEIRS[name]
    batch = make(examples, k=1)
    counted = counted_flops(lambda: peers.their_losses(theirs, batch, mask).total.backward())
    args = Namespace(k=1, batch_size=len(examples), compile=False)
    form = peers.their_forms(theirs, examples, args)[name]
    found = bench.step_flops(ours.decoder.config, batch, form.all_logits)
    assert found == pytest.approx(counted, rel=0.03) and found > bench.step_flops(ours.decoder.config, batch)
    assert not bench.our_forms(ours, examples, args)["LLM-JEPA, paper"].all_logits


def test_compiled_forms_are_the_same_steps_on_the_same_weights(pair, examples, monkeypatch):
    """By a backend that counts graphs, which every block must go through, and computes as torch does."""
    ours, theirs, _ = pair
    graphs, own, args = CompileCounter(), torch.nn.Module.compile, Namespace(k=2, batch_size=4, compile=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: own(module, backend=graphs, **how))
    own_forms = bench.our_forms(ours, examples, args)
    for model, forms, name in ((ours, own_forms, "plain fine-tuning"), (ours, own_forms, "LLM-JEPA, fused"),
                               (theirs, peers.their_forms(theirs, examples, args), "HF two rows")):
        torch._dynamo.reset()  # so that forms which share a model are compiled anew
        losses, gradients, before = [], [], graphs.frame_count
        for form in (forms[name], forms[f"{name}, compiled"]):
            losses.append(form.loss(form.batch(0)))
            losses[-1].backward()
            gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
            form.optimizer.zero_grad()
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)
        assert len(gradients[1]) > 10 and graphs.frame_count > before


def test_each_of_the_three_rows_holds_one_view(examples):
    batch = peers.three_rows(examples, 2)
    n = len(examples)
    assert len(batch.ids) == 3 * n and (batch.label_at[:, 0] < n).all()
    assert batch.ids[batch.text_at[:, 0], batch.text_at[:, 1]].tolist() == [-2] * n
    assert batch.ids[batch.code_at[:, 0], batch.code_at[:, 1]].tolist() == [e.code[-1] for e in examples]


def test_both_sides_write_the_same(pair, examples):
    ours, theirs, _ = pair
    args, prompts = Namespace(new_tokens=6), [e.full for e in examples]
    own = bench.answers_of(ours.decoder, 7, args, prompts)
    assert peers.generate_theirs(theirs.eval(), 7, args, prompts) == own and any(own)


@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "bfloat16"]], ids=len)
def test_the_command(tmp_path, monkeypatch, capsys, pair, dtypes):
    file = tmp_path / "found.json"
    for module in (bench, processes):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: len(dtypes) > 1)
    monkeypatch.setattr("sys.argv", [
        "peers", "--init", str(tmp_path), "--tokenizer", "synth", "--steps", "1", "--batch_size", "2", "--decode_rows",
        "4", "--new_tokens", "2", "--leave_out", "HF official", "HF three rows", "--json", str(file)])
    weights.save(toy_decoder("llama", vocab_size=600), tmp_path)
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *arguments: function(*arguments))  # this one: quick
    peers.main()
    found = json.loads(file.read_text())
    assert capsys.readouterr().out == "\n".join(bench.tables(found)) + "\n"
    assert [row["dtype"] for row in found["steps"][::5]] == dtypes
    assert [row["form"] for row in found["steps"]] == [*bench.KINDS, "HF plain", "HF two rows"] * len(dtypes)
    assert [row["form"] for row in found["decoding"]] == ["HF generate", "ours"] and str(tmp_path) not in str(found)
    assert all(row["mib"] >= 0 for row in found["steps"])


def test_without_transformers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("sys.argv", ["peers"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(peers.main)
    said = capsys.readouterr().err
    assert "transformers" in said and "pip install -r requirements.txt -r tests/requirements.txt" in said
