"""The cost formula against torch's own counter; no timing is asserted."""

import contextlib
import json
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import STYLES, toy_decoder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from evaluation import generate
from experiments import bench
from hf import weights
from jepa import LLMJEPA, PAD, TEXT, Batch
from support import processes
from support.cli import UserError


def counted_flops(run):
    """FLOPs of a function by torch's counter, which knows the attention of the plain "math" kernel on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", bench.KINDS)
def test_the_formula_is_what_torch_counts(style, kind, examples):
    model = LLMJEPA(toy_decoder(style), 2)
    batch = data.collate(examples, 2, **bench.KINDS[kind])
    assert bench.step_flops(model.decoder.config, batch) == counted_flops(lambda: model(batch).total.backward())


def test_fused_is_the_cheapest_way_to_all_three_views(examples):
    """Per example, in columns: plain n, fused n + k + c, paper n + (t + k + c); separate passes the same as paper."""
    k, e = 2, max(examples, key=lambda e: len(e.full))
    n, t, c = len(e.full), len(e.text), len(e.code)
    columns = {kind: data.collate([e], k, **how).segment for kind, how in bench.KINDS.items()}
    used = {kind: (segment != PAD).sum().item() for kind, segment in columns.items()}
    assert list(used.values()) == [n, n + k + c, n + t + k + c]
    decoder = toy_decoder("llama")
    cost = {kind: bench.step_flops(decoder.config, data.collate([e], k, **how)) for kind, how in bench.KINDS.items()}
    assert cost["plain fine-tuning"] < cost["LLM-JEPA, fused"] < cost["LLM-JEPA, paper"]


def test_separate_passes_cost_what_the_readme_says(examples):
    """A pass for each of conversation, Text with [PRED], Code: the formula, counted; in tokens the same as paper."""
    model, e, k = LLMJEPA(toy_decoder("llama"), 2), examples[1], 2
    tokens = 0
    for ids in (e.full, e.text + [-1, -2], e.code):
        row, nowhere = torch.tensor([ids]), torch.zeros(0, 2, dtype=torch.long)
        position = torch.arange(len(ids))[None]
        batch = Batch(row, torch.full_like(row, TEXT), position, nowhere, nowhere[:, 0], nowhere, nowhere)
        counted = counted_flops(lambda batch=batch: model.hidden(batch).sum().backward())
        assert bench.step_flops(model.decoder.config, batch) == counted
        tokens += len(ids)
    paper = data.collate([e], k, "paper")
    assert tokens == (paper.segment != PAD).sum() == len(e.full) + len(e.text) + k + len(e.code)


def test_every_way_of_decoding_is_timed_on_the_same_prompts(examples):
    """Two batches; the slow way answers the first prompt of each, the fast way all of them, with the same text."""
    decoder, prompts = toy_decoder("llama"), [e.full for e in examples]
    batches = [prompts[:3], prompts[3:]]
    batched = partial(bench.answers_of, decoder, -1, Namespace(new_tokens=6))
    rows, answers = bench.time_decoding({
        "slow": lambda chosen: [bench.one_by_one(decoder, prompt, -1, 6) for prompt in chosen[:1]],
        "fast": batched, "wrong": lambda chosen: [[0] for _ in chosen], "too": lambda chosen: [[0] for _ in chosen],
    }, batches, decoder.embed.weight.device)
    expected = [[bench.one_by_one(decoder, prompt, -1, 6) for prompt in batch] for batch in batches]
    assert answers["fast"] == expected and answers["slow"] == [made[:1] for made in expected]
    assert [row["same_text"] for row in rows] == [1, 1, 0, 1] and all(row["rows_per_s"] > 0 for row in rows)


def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(tmp_path):
    weights.save(toy_decoder("llama"), tmp_path)
    args = bench.flags("").parse_args(["--init", str(tmp_path), "--tokenizer", "synth", "--device", "cpu"])
    with pytest.raises(UserError, match="tokenizer synth has 512 tokens, the model's embedding only"):
        bench.open_model(args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_timed_in_its_type(examples, monkeypatch, dtype):
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: True)
    model, seen = LLMJEPA(toy_decoder("llama"), 2), set()
    model.decoder.blocks[0].attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    form = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))["LLM-JEPA, fused"]
    bench.train_step(form, torch.device("cpu"), dtype, 0)
    assert seen == {getattr(torch, dtype)}


def test_a_device_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind, times in (("cpu", 0), ("cuda", 5), ("mps", 5)):
        bench.take_turns({"a": lambda number: None}, 3, torch.device(kind))
        assert waited == [torch.device(kind)] * times
        waited.clear()


def test_one_by_one_ends_where_the_model_has_no_more_room(examples):
    decoder = toy_decoder("gpt2")
    prompt = (examples[0].full * 20)[: decoder.config.block_size - 4]
    (_, answer), = generate.decode(decoder, [prompt], -1, 32)
    assert bench.one_by_one(decoder, prompt, -1, 32) == answer.ids and len(answer.ids) == 5


def test_a_profile_counts_each_kernel_once(monkeypatch):
    """On a GPU a kernel has a line of its own, and its time stands in the line of what called it, too."""
    def event(key, kind, time):
        return Namespace(key=key, device_type=Namespace(name=kind), self_device_time_total=time, self_cpu_time_total=1)

    seen = Namespace(key_averages=lambda: [event("aten::mm", "CPU", 60), event("aten::mul", "CPU", 40),
                                           event("gemm", "CUDA", 60), event("vectorized", "CUDA", 40),
                                           event("Command Buffer Full", "CPU", 100)])  # waits for the GPU
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(seen))
    monkeypatch.setattr(bench, "train_step", lambda *_: None)
    assert bench.profile(None, torch.device("cuda"), "float32") == {"mm": 0.6, "mul": 0.4}


def test_in_every_round_each_form_has_its_turn():
    calls = []
    forms = {name: lambda number, name=name: calls.append((number, name)) for name in "ab"}
    seconds = bench.take_turns(forms, 3, torch.device("cpu"))
    assert calls == [(number, name) for number in range(-2, 3) for name in "ab"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def grow(mib):
    """Peak memory of this process before and after it held so much more."""
    before = bench.peak_memory()
    bytearray(mib << 20).count(1)
    return before, bench.peak_memory()


def test_peak_memory_is_that_of_the_process_itself():
    """Not its parent's, which the kernel passes on as ru_maxrss."""
    ours = bytearray(900 << 20)
    ours[:: 1 << 12] = b"x" * len(ours[:: 1 << 12])
    before, after = bench.in_fresh_process(grow, 300)
    assert before < 900 and 290 < after - before < 330
    assert bench.peak_memory() > 900


def test_the_memory_of_a_step_is_taken_in_a_fresh_process():
    """820,480 parameters, their gradients and two moments are 13 MiB; what a step keeps comes on top."""
    args = bench.flags("").parse_args(["--batch_size", "4", "--device", "cpu"])
    found = bench.in_fresh_process(bench.memory_of_steps, bench.make_forms, args, "LLM-JEPA, fused", "float32")
    assert 13 < found < 200, "what libraries take does not count"


def test_on_a_gpu_memory_is_torchs_own_count(examples, monkeypatch):
    """300 MiB more than before; the form's weights and two moments were there before and are its own."""
    counted = {"memory_allocated": lambda _: 1000 * 2**20, "max_memory_allocated": lambda _: 1300 * 2**20}
    for name, function in (counted | {"reset_peak_memory_stats": lambda _: None}).items():
        monkeypatch.setattr(torch.cuda, name, function)
    model = LLMJEPA(toy_decoder("llama"), 2)
    form = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))["LLM-JEPA, fused"]
    bench.train_step(form, torch.device("cpu"), "float32", 0)
    own = 3 * sum(p.nbytes for p in model.parameters()) + 4 * len(list(model.parameters()))  # and its steps' numbers
    assert bench.memory_on_gpu(form, torch.device("cpu"), "float32") == 300 + own / 2**20


def test_the_ceiling_is_that_of_as_many_products_as_were_made(examples, monkeypatch):
    """Three products in two seconds."""
    made, mm = [], torch.mm
    monkeypatch.setitem(bench.CEILING, "cpu", (64, 3))
    monkeypatch.setattr(torch, "mm", lambda *matrices, out: made.append(out.shape) or mm(*matrices, out=out))
    monkeypatch.setattr(bench, "take_turns", lambda turns, *_: {
        key: [2.0 if key[0] != "ceiling" or turns[key](0) else 0.0] for key in turns})
    model = LLMJEPA(toy_decoder("llama"), 2)
    forms = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))
    rows = bench.time_steps(forms, model.decoder.config, 1, torch.device("cpu"), ["float32"])
    assert made == [(64, 64)] * 3 and {row["ceiling"] for row in rows} == {3 * 2 * 64**3 / 2.0}


def test_only_the_types_asked_for_are_timed(examples, monkeypatch, capsys):
    model = LLMJEPA(toy_decoder("llama"), 2)
    forms = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))
    for fast, asked, timed in ((True, ["bfloat16"], {"bfloat16"}), (False, ["float32"], {"float32"}),
                               (False, ["float32", "bfloat16"], {"float32"})):
        monkeypatch.setattr(bench, "has_bfloat16", lambda device, fast=fast: fast)
        monkeypatch.setattr(processes, "has_bfloat16", lambda device, fast=fast: fast)
        rows = bench.time_steps(forms, model.decoder.config, 1, torch.device("cpu"), asked)
        assert {row["dtype"] for row in rows} == timed
        assert ("bfloat16 is left out" in capsys.readouterr().err) == (asked[-1] not in timed)


def test_rows_are_padded_as_in_training(examples, monkeypatch):
    """Both those that are timed and those whose padding and FLOPs are counted."""
    monkeypatch.setattr(bench, "width_multiple", lambda device, dtype: {"float32": 64, "bfloat16": 96}[dtype])
    monkeypatch.setattr(bench, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: True)
    model, widths = LLMJEPA(toy_decoder("llama"), 2), []
    form = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))["LLM-JEPA, fused"]
    own = form.loss
    form = form._replace(loss=lambda batch: (widths.append(batch.ids.shape[1]), own(batch))[1])
    rows = bench.time_steps({"fused": form}, model.decoder.config, 1, torch.device("cpu"))
    assert set(widths) == {64, 96} and rows[0]["flops"] < rows[1]["flops"] and rows[0]["padding"] < rows[1]["padding"]


def test_rows_that_no_fused_row_can_hold_are_refused(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    line = {"messages": turns, "text": "c", "code": "d"}
    (tmp_path / "own.jsonl").write_text(8 * (json.dumps(line) + "\n"))
    args = bench.flags("").parse_args(["--data", str(tmp_path / "own.jsonl"), "--batch_size", "2"])
    with pytest.raises(UserError, match="a text view of their own"):
        bench.open_model(args)


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    """Counts and shares, never a time."""
    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["bench", "--steps", "1", "--batch_size", "2", "--rows", "1", "--decode_batch", "4",
                                     "--decode_rows", "8", "--new_tokens", "3", "--device", "cpu", "--json", str(file)])
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *arguments: function(*arguments))  # this one: quick
    for module in (bench, processes):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: True)
    decode, types = bench.generate.decode, []
    monkeypatch.setattr(bench.generate, "decode", lambda *given: [types.append(torch.is_autocast_enabled("cpu")),
                                                                  *decode(*given)][1:])
    bench.main()
    assert types[-1] and types.count(True) == 3  # a batch to warm up and two, at the end and in bfloat16 alone
    found = json.loads(file.read_text())
    assert capsys.readouterr().out == "\n".join(bench.tables(found)) + "\n"
    assert {row["form"] for row in found["steps"]} == set(bench.KINDS) and str(tmp_path) not in file.read_text()
    for row in found["steps"]:
        assert row["seconds"] > 0 and row["flops"] > 1e6 and row["ceiling"] > 0 and row["mib"] >= 0
        assert 0 <= row["padding"] < 1
    same = [row["same_text"] for row in found["decoding"]]
    assert same[:3] == [1, 1, 1] and len(same) == 4  # the last in bfloat16, whose rounding may change answers
    profiles = [row["profile"] for row in found["steps"] if row["form"] == "LLM-JEPA, fused"]
    assert profiles and all(0.05 < shares["mm"] < sum(shares.values()) <= 1.001 for shares in profiles)
    assert found["machine"]["torch"] == torch.__version__


def test_the_share_of_padding_and_of_the_ceiling(examples):
    """A step of known FLOPs: the table divides them by the time and by the ceiling."""
    model = LLMJEPA(toy_decoder("llama"), 2)
    forms = bench.our_forms(model, examples, Namespace(k=2, batch_size=4, compile=False))
    rows = bench.time_steps(forms, model.decoder.config, 2, torch.device("cpu"))
    for row, (kind, how) in zip(rows[:3], bench.KINDS.items(), strict=True):
        batch = data.collate(examples, 2, **how)
        assert row["form"] == kind and row["dtype"] == "float32"
        assert row["flops"] == bench.step_flops(model.decoder.config, batch)
        assert row["padding"] == (batch.segment == PAD).double().mean().item()
    table = bench.tables({"about": "", "base": "LLM-JEPA, fused", "batch_size": 4, "decoding": [], "steps": [
        row | {"seconds": 2.0, "ceiling": 1e9, "flops": 5e8, "mib": 7.0} for row in rows[:3]]})
    assert "| LLM-JEPA, paper   | float32 | 2000.0 | 1.00                   | 2.0        | 0.50  | 25%" in table[6]


def test_the_naive_loop_is_the_same_text(examples):
    decoder = toy_decoder("llama")
    with torch.no_grad():
        for e in examples:
            (_, answer), = bench.generate.decode(decoder, [e.full], -1, 6)
            assert bench.one_by_one(decoder, e.full, -1, 6) == answer.ids
