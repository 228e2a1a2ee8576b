"""The loop: a task learnt, runs resumed, micro-batches and processes that change nothing, mistakes told in one line."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import toy_decoder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import data
import hf
import train as train_script
from evaluation import encodings, plots
from hf import lora, runs, weights
from jepa import LLMJEPA
from support import cli, processes
from support.cli import UserError

ROOT = Path(__file__).parent.parent
SMALL = ["--n_layer", "1", "--n_head", "2", "--d_model", "32", "--batch_size", "4", "--epochs", "2", "--log_every", "1"]


def run(*command, **options):
    """A script of this repository, run as a user would."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, **options)


def inside(*flags):
    """train.py called in this process, which is faster."""
    before, numbers = sys.argv, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    sys.argv = ["train.py", *map(str, flags)]
    try:
        train_script.main()
    finally:
        sys.argv = before
        for name, handler in handlers.items():
            signal.signal(name, handler)


def train(out, *flags):
    inside("--out", out, *flags)
    return out


def toy_rows(path, n, seed=0):
    """Conversations of which the answer is the question's letters in capitals."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        word = draw.choices("abcdefgh", k=3)
        said = {"system": "Capitals.", "user": " ".join(word), "assistant": " ".join(word).upper()}
        turns = [{"role": role, "content": content} for role, content in said.items()]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A training file of 22 rows (6 steps of 4 per epoch, the last one short) and a validation file."""
    folder = tmp_path_factory.mktemp("toy")
    return ["--data", toy_rows(folder / "train.jsonl", 22), "--val", toy_rows(folder / "val.jsonl", 5, seed=1)]


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """The run that the others are compared with."""
    return train(tmp_path_factory.mktemp("runs") / "straight", *toy, *SMALL)


def state(run):
    """Weights, [PRED] vectors and the optimizer's moments of a run's last checkpoint."""
    saved = torch.load(run / "checkpoint/training.pt", weights_only=True)
    tensors = load_file(run / "checkpoint/model.safetensors") | load_file(run / "checkpoint/pred.safetensors")
    moments = {f"{i}.{k}": v for i, s in saved["optimizer"]["state"].items() for k, v in s.items()}
    return tensors | moments | {"step": torch.tensor(saved["step"])}


def log(run):
    """Lines of the log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


# ---- learning


@pytest.mark.parametrize("lam", ["0", "0.2"])
def test_a_toy_task_is_learnt(tmp_path, lam):
    """From nothing to >= 90 % exact match on rows not seen in training, with and without the JEPA term."""
    flags = ["--data", toy_rows(tmp_path / "train.jsonl", 1000), "--val", toy_rows(tmp_path / "val.jsonl", 100, seed=1),
             "--n_layer", "2", "--n_head", "2", "--d_model", "64", "--lam", lam, "--epochs", "4", "--lr", "1e-2"]
    lines = log(train(tmp_path / "run", *flags))
    scores = [line for line in lines if "val_exact" in line]
    assert len(scores) == 4 and scores[-1]["val_exact"] >= 0.9 and scores[-1]["val_stop_rate"] >= 0.9
    jepa = [line["jepa"] for line in lines if "jepa" in line]
    assert all(value is None for value in jepa) if lam == "0" else all(value is not None for value in jepa)


def test_a_log_file_is_not_flooded_by_the_bar(toy, tmp_path, capfd):
    """Twelve steps, each of which is logged: where stderr is no terminal the bar shows once an epoch, not each step."""
    inside("--out", tmp_path / "run", *toy, *SMALL)
    assert capfd.readouterr().err.count("step/s") <= 2


def test_a_run_folder_is_complete(straight, toy):
    names = {path.name for path in straight.iterdir()}
    assert names == {"config.json", "log.jsonl", "loss.png", "checkpoint", "best"}
    config = json.loads((straight / "config.json").read_text())
    assert config["arguments"]["lam"] == 1.0 and len(config["sha256"]["data"]) == 64
    lines = log(straight)
    assert [line["step"] for line in lines if "lm" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_lm" in line] == [6, 12]
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")
    pred = load_file(straight / "checkpoint/pred.safetensors")["pred"]
    vocabulary = load_file(straight / "checkpoint/model.safetensors")["model.embed_tokens.weight"]
    assert pred.shape == (1, 32) and vocabulary.shape == (512, 32)  # [PRED] is not a row of the vocabulary


# ---- one result, however it was computed


def test_micro_batches_change_nothing(toy, straight, tmp_path):
    """4 x 1 accumulation equals 1 x 4, over a whole run."""
    flags = [{"4": "1"}.get(flag, flag) for flag in SMALL] + ["--grad_accum", "4"]
    assert_close(state(train(tmp_path / "run", *toy, *flags)), state(straight), rtol=1e-4, atol=1e-5)


def test_all_ways_to_leave_the_jepa_term_out_are_one(toy, tmp_path):
    """lam = 0 and loss dropout 1 go the same way through the code, to the same bits; and k does not matter there."""
    plain = train(tmp_path / "plain", *toy, *SMALL, "--lam", "0")
    others = (["--loss_dropout", "1"], ["--lam", "0", "--layout", "paper"], ["--lam", "0", "--k", "0"])
    for i, flags in enumerate(others):
        other = train(tmp_path / str(i), *toy, *SMALL, *flags)
        weights = [load_file(run / "checkpoint/model.safetensors") for run in (other, plain)]
        assert_close(*weights, rtol=0, atol=0)
        train_lines = [[line for line in log(run) if "lm" in line] for run in (other, plain)]
        assert train_lines[0] == train_lines[1] and all(line["jepa"] is None for line in train_lines[0])


def test_loss_dropout_drops_some_steps(toy, straight, tmp_path):
    lines = log(train(tmp_path / "run", *toy, *SMALL, "--loss_dropout", "0.5"))
    dropped = [line["jepa"] is None for line in lines if "lm" in line]
    assert dropped == [data.dropped(0.5, 0, step) for step in range(12)] and 0 < sum(dropped) < 12


def test_a_dropped_step_shows_no_jepa_loss(tmp_path):
    """0.000 would look like success."""
    shown, norm, sums = [], torch.tensor(1.0), torch.tensor([2.0, 2.0, 0.0])
    bar = Namespace(set_postfix_str=lambda text, refresh: shown.append(text))
    run = Namespace(step=1, skipped=0, args=Namespace(out=tmp_path), validations=[{"val_cosine_shuffled": 0.75}],
                          optimizer=Namespace(param_groups=[{"lr": 1.0}]))
    for jepa in (False, True):
        train_script.log_step(run, bar, 0, {"sums": sums, "norm": norm, "jepa": jepa}, 5, 0.0)
    assert "jepa -," in shown[0] and "jepa 0.000 (cosine of shuffled pairs 0.750)," in shown[1]
    assert [line["jepa"] for line in log(tmp_path)] == [None, 0.0]


def test_every_variant_trains(toy, tmp_path):
    """One run with each flag: it goes through, and it is not the default run under another name."""
    variants = ["--gamma 0.5", "--distance l2", "--distance mse", "--distance infonce", "--layout paper", "--reverse",
                "--layout paper --front_pred", "--stop_grad text", "--stop_grad code", "--shuffle_pairs",
                "--train_on all", "--no_stop_label"]
    seen = []
    for i, flags in enumerate(["", *variants]):
        inside(*toy, *SMALL, "--max_steps", "2", "--out", tmp_path / str(i), *flags.split())
        norm = load_file(tmp_path / str(i) / "checkpoint/model.safetensors")["model.norm.weight"]
        assert not any(torch.equal(norm, other) for other in seen), flags
        seen.append(norm)


def test_pretraining_on_plain_text_and_on_paraphrases(tmp_path):
    plain, pairs = tmp_path / "plain.jsonl", tmp_path / "pairs.jsonl"
    plain.write_text("".join(json.dumps({"text": f"the ring in lake {i}"}) + "\n" for i in range(8)))
    pairs.write_text("".join(json.dumps({"text": f"the ring in lake {i}", "group": i // 2}) + "\n" for i in range(8)))
    flags = [*SMALL, "--train_on", "all"]
    inside("--out", tmp_path / "a", "--data", plain, "--val", plain, *flags, "--lam", "0")
    inside("--out", tmp_path / "b", "--data", pairs, "--val", pairs, *flags, "--lam", "1")
    assert all(line["jepa"] is None for line in log(tmp_path / "a") if "lm" in line)
    assert all(line["jepa"] > 0 for line in log(tmp_path / "b") if "lm" in line)
    assert "val_exact" not in log(tmp_path / "a")[-1] and (tmp_path / "a/best").exists()


def test_two_processes_equal_one(toy, tmp_path):
    """Under torchrun two processes share the examples of a step, which is cut finer where one would have none."""
    flags = [*toy, *SMALL, "--grad_accum", "3", "--max_steps", "4", "--k", "0"]  # [PRED] has no elements
    alone = train(tmp_path / "alone", *flags)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, "train.py", "--out", tmp_path / "both", *flags)
    assert done.returncode == 0, done.stderr
    assert_close(state(tmp_path / "both"), state(alone), rtol=1e-4, atol=1e-5)
    loss = lambda folder: [[line["total"], line["grad_norm"]] for line in log(folder) if "total" in line]  # noqa: E731
    assert_close(loss(tmp_path / "both"), loss(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_resumed_run_is_the_run_that_was_not_stopped(toy, straight, tmp_path, how, capsys):
    """Bit for bit: weights, optimizer, log. Ctrl-C leaves a checkpoint at its step, a kill that of the last epoch."""
    out, command = tmp_path / "run", [sys.executable, "train.py", "--out", tmp_path / "run", *toy, *SMALL]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    wanted = 2 if how == signal.SIGINT else 8  # lines of the log; an epoch is 6 steps and a validation
    while process.poll() is None and (not (out / "log.jsonl").exists() or
                                      (out / "log.jsonl").read_text().count("\n") < wanted):
        time.sleep(0.002)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how), "it must be caught in mid-run"
    if how == signal.SIGINT:
        assert b"--resume" in errors
    before = torch.load(out / "checkpoint/training.pt", weights_only=True)["step"]
    assert 0 < before < 12
    inside("--resume", out)
    assert f"from step {before}" in capsys.readouterr().out
    assert_close(state(out), state(straight), rtol=0, atol=0)
    assert log(out) == log(straight)


# ---- Hugging Face models

MODEL = ROOT / "tests/oracle/model"  # a tiny random Llama
FINE_TUNE = ["--init", MODEL, "--tokenizer", "synth", "--epochs", "2", "--lr", "1e-3", "--log_every", "1"]


def vocabulary(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape


def test_fine_tuning_leaves_a_hugging_face_folder(toy, tmp_path):
    transformers = pytest.importorskip("transformers")
    inside("--out", tmp_path / "run", *toy, *FINE_TUNE, "--max_steps", "3", "--checkpoint_activations")
    best = tmp_path / "run/best"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(best)
    ids = torch.arange(40)[None]
    ours = weights.load(best)
    hidden = ours.hidden(ids, torch.ones(1, 40, 40).tril().bool(), ids)
    assert_close(ours.logits(hidden), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert vocabulary(best) == vocabulary(MODEL) and not (best / "tokenizer.json").exists(), "it was not that one"
    assert theirs.generation_config.eos_token_id[0] == hf.tokenizer("synth").stop
    assert load_file(best / "pred.safetensors")["pred"].shape == (1, 64)
    assert not torch.equal(ours.norm.weight, weights.load(MODEL).norm.weight)


@pytest.mark.parametrize(("device", "dtype", "features", "multiple"), [
    ("cpu", "auto", "amx_bf16", 1), ("cpu", "bfloat16", "amx_bf16", 8), ("cpu", "bfloat16", "avx512_bf16", 1),
    ("cuda", "auto", "", 8)])
def test_shapes_are_few_where_kernels_are_chosen_for_each(monkeypatch, examples, device, dtype, features, multiple):
    monkeypatch.setattr(processes, "cpu_features", lambda: [features])
    args, plain = Namespace(dtype=dtype, k=1), data.collate(examples, 1).ids.shape[1]
    run = Namespace(args=args, device=torch.device(device), layout={})
    width = train_script.batch_of(run, examples, jepa=True).ids.shape[1]
    assert plain % 8 and width == -(-plain // multiple) * multiple


def test_training_steps_are_compiled_and_decoding_is_not(toy, tmp_path, monkeypatch):
    """--compile with a backend that counts graphs: some, at least one for each block, and no more after decoding."""
    from torch._dynamo.testing import CompileCounter

    graphs, own, after = CompileCounter(), torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: own(module, backend=graphs, **how))
    validate = train_script.validate
    monkeypatch.setattr(train_script, "validate", lambda run: (
        after.append(graphs.frame_count), validate(run), after.append(graphs.frame_count))[1])
    torch._dynamo.reset()
    inside("--out", tmp_path / "compiled", *toy, *SMALL, "--compile")
    inside("--out", tmp_path / "plain", *toy, *SMALL)
    assert len(after) == 8 and after[0] == after[1] > 0 and after[2] == after[3]
    both = [load_file(tmp_path / run / "best/model.safetensors") for run in ("compiled", "plain")]
    assert_close(*both, rtol=1e-3, atol=1e-4)  # Muon's steps, of wider batches


def test_a_run_without_pred_tokens_can_go_on(toy, tmp_path):
    """At k = 0 [PRED] has no elements and no gradient, but its place in the optimizer's state."""
    inside("--out", tmp_path / "run", *toy, *SMALL, "--k", "0")
    before, saved = state(tmp_path / "run"), torch.load(tmp_path / "run/checkpoint/training.pt", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert sorted(saved["optimizer"]["state"]) == sorted(number for group in groups for number in group["params"])
    inside("--resume", tmp_path / "run")
    assert_close(state(tmp_path / "run"), before, rtol=0, atol=0)


def test_recomputing_activations_changes_nothing(toy, tmp_path):
    both = [tmp_path / "kept", tmp_path / "recomputed"]
    for run, flags in zip(both, ([], ["--checkpoint_activations"]), strict=True):
        inside("--out", run, *toy, *FINE_TUNE, "--max_steps", "3", *flags)
    assert_close(state(both[0]), state(both[1]), rtol=1e-5, atol=1e-6)
    for flags, times in ((["--checkpoint_activations"], 2), ([], 1)):
        args, passes = train_script.check(train_script.FLAGS.parse_args([*map(str, toy), *SMALL, *flags])), []
        prepared = train_script.prepare(args)
        prepared.total, (prepared.failures, prepared.skipped) = 9, torch.zeros(2)
        prepared.model.decoder.blocks[0].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        train_script.take_step(prepared, prepared.examples[:4])
        assert len(passes) == times


def test_lora_trains_adapters_and_pred_and_exports_a_merged_model(toy, tmp_path):
    flags = ["--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", *FINE_TUNE]
    inside("--out", tmp_path / "run", *toy, *flags)
    checkpoint, best = tmp_path / "run/checkpoint", tmp_path / "run/best"
    assert not (checkpoint / "model.safetensors").exists() and vocabulary(best) == vocabulary(MODEL)
    before, after = weights.load(MODEL).state_dict(), weights.load(best).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(lora.PROJECTIONS)
    torch.manual_seed(0)
    started = LLMJEPA(weights.load(MODEL), 1).pred.detach()
    assert not torch.equal(load_file(checkpoint / "pred.safetensors")["pred"], started)

    opened = runs.open_model(checkpoint, "cpu")  # adapters: what the run's config.json says of them holds
    assert (opened.tokenizer.name, opened.seed, len(opened.model.pred)) == ("synth", 0, 1)

    adapted, merged = opened.model, runs.load_model(best).eval()
    layers = lora.adapted_layers(adapted.decoder).values()
    assert {(len(layer.a), layer.alpha, layer.scale) for layer in layers} == {(4, 8.0, 2.0)}
    batch = data.collate([data.Example([5, 6, 7, 8], [False, False, True, True], 2, [5, 6], [7])], 1)
    both = (model.encodings(model.hidden(batch), batch) for model in (adapted, merged))
    for found, wanted in zip(*both, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_how_many_pred_vectors_there_are_changes_no_other_draw():
    adapters = []
    for k in ("0", "3"):
        args = train_script.check(train_script.FLAGS.parse_args(["--init", str(MODEL), "--lora_rank", "2", "--k", k]))
        torch.manual_seed(0)
        model = train_script.make_model(args, None, MODEL)
        adapters.append({name: p for name, p in model.decoder.named_parameters() if p.requires_grad})
    assert_close(*adapters, rtol=0, atol=0)
    assert len(adapters[0]) > 10


def test_a_folder_is_a_folder_whatever_its_name(tmp_path, monkeypatch):
    """Also one that is called as a tokenizer of tiktoken's."""
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    args = train_script.check(train_script.FLAGS.parse_args(["--init", "gpt2"]))
    assert args.init == args.tokenizer == str(tmp_path / "gpt2")
    assert train_script.check(train_script.FLAGS.parse_args(["--tokenizer", "gpt2"])).tokenizer == "gpt2"


def test_validation_rows_without_the_views_are_refused(toy, tmp_path, refused):
    """Or nothing would show whether a small JEPA loss is collapse."""
    rows = tmp_path / "own.jsonl"
    said = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "A B"}]
    rows.write_text(Path(toy[3]).read_text() + json.dumps({"messages": said, "text": "a", "code": "A"}) + "\n")
    flags = ["--out", tmp_path / "run", *toy[:2], "--val", rows, *SMALL]
    assert "own.jsonl: has rows with a text view of their own" in refused(*flags)


def test_only_the_shipped_rows_are_sent_on_to_the_shipped_test(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "SYNTH", Path(toy[1]).parent)
    inside("--out", tmp_path / "run", *toy, *SMALL, "--max_steps", "1")
    assert "--data FILE" in capsys.readouterr().out


def test_adapters_name_their_base_as_the_user_did(tmp_path):
    """A name of the Hub, and not the folder of this machine's cache."""
    model = LLMJEPA(weights.load(MODEL), 1)
    lora.add(model.decoder, 4)
    args = Namespace(out=tmp_path, shard=False, init="org/model", lora_rank=4)
    runs.save_checkpoint(model, torch.optim.AdamW(model.parameters()), args, MODEL, {"step": 1, "random": []})
    assert lora.base_of(tmp_path / "checkpoint") == "org/model"


def test_a_resumed_lora_run_is_the_run_that_was_not_stopped(toy, tmp_path):
    """Dropout draws from the random stream, which the checkpoint holds."""
    flags = [*toy, "--lora_rank", "4", "--lora_dropout", "0.3", *FINE_TUNE]
    inside("--out", tmp_path / "straight", *flags)
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(processes.Stop, "wanted", property(lambda self: True))
        patch.setattr(processes.Stop, "__init__", lambda self: None)
        inside("--out", stopped, *flags)
    inside("--resume", stopped)
    saved = [load_file(run / "checkpoint/adapter_model.safetensors") for run in (stopped, tmp_path / "straight")]
    assert_close(*saved, rtol=0, atol=0)
    assert log(stopped) == log(tmp_path / "straight")


def test_a_run_stopped_before_its_first_line_of_log_can_go_on(toy, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(processes.Stop, "wanted", property(lambda self: True))
        patch.setattr(processes.Stop, "__init__", lambda self: None)
        inside("--out", tmp_path / "run", *toy, *SMALL, "--log_every", "100")
    assert ended.value.code == 130 and not (tmp_path / "run/log.jsonl").exists()
    inside("--resume", tmp_path / "run")
    assert [line["step"] for line in log(tmp_path / "run")] == [6, 12, 12]


# ---- mistakes


@pytest.mark.parametrize("flags, complaint", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--k", "-1"], "--k -1"),
    (["--k", str(2**31)], f"--k {2**31}: must be"),
    (["--d_model", str(2**40)], f"--d_model {2**40}: must be"),
    (["--n_layer", "1e5"], "--n_layer 1e5: must be a whole number"),
    (["--n_layer", "2001"], "at most 2000"),
    (["--block_size", str(2**24)], "at most 16777215"),
    (["--lora_alpha", "8"], "--lora_rank"),
    (["--lora_dropout", "0.5"], "--lora_rank"),
    (["--seed", str(2**64)], f"--seed {2**64}: must be"),
    (["--lam", "-0.5"], "--lam -0.5"),
    (["--lam", "nan"], "--lam nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--epochs", "0"], "--epochs 0"),
    (["--device", "meta"], "--device meta"),
    (["--shard"], "start it with torchrun"),
    (["--lam", "two"], "--lam two: must be a finite number"),
    (["--lama", "2"], "--lama"),
    (["--d_model", "30"], "--d_model 30"),
    (["--tokenizer", "nonsense"], "nonsense"),
    (["--init", "nowhere/at-all/nothing"], "nowhere/at-all/nothing"),
    (["--device", "toaster"], "--device toaster"),
    (["--device", "hpu"], "--device hpu"),
    (["--data", "/dev/null"], "/dev/null: is not a regular file"),
    (["--block_size", "5"], "train.jsonl:1: needs"),
    (["--lora_rank", "4"], "--init"),
    (["--resume", "nowhere"], "nowhere: no run here"),
    (["--loss_dropout", "1.5"], "--loss_dropout 1.5"),
    (["--front_pred", "--reverse", "--layout", "paper"], "choose one"),
    (["--front_pred", "--layout", "paper", "--k", "0"], "--k 0"),
    (["--reverse", "--k", "0"], "--k 0"),
    (["--front_pred"], "add --layout paper"),
    (["--distance", "infonce", "--batch_size", "1"], "--batch_size 2"),
    (["--distance", "uniform", "--batch_size", "1"], "--batch_size 2"),
    (["--k", "600"], "train.jsonl:1: needs"),
    (["--clip", "0"], "--clip"),
    (["--seed", "-1"], "--seed"),
])
def test_a_mistake_is_one_line_and_leaves_nothing(toy, tmp_path, refused, flags, complaint):
    out = [] if "--resume" in flags else ["--out", tmp_path / "run", *toy, *SMALL]
    assert complaint in refused(*out, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--distance infonce", "--distance uniform", "--shuffle_pairs"])
def test_a_single_row_has_nothing_to_be_compared_with(tmp_path, refused, flags):
    out = ["--out", tmp_path / "run", "--data", toy_rows(tmp_path / "train.jsonl", 1), *SMALL]
    assert f"train.jsonl: {flags} needs at least two rows" in refused(*out, *flags.split())
    inside(*out, "--lam", "0", "--distance", "infonce")


def test_the_commands_that_are_printed_can_be_pasted(toy, tmp_path, capsys):
    inside("--out", tmp_path / "my run", *toy, *SMALL, "--max_steps", "1")
    assert f"python eval.py '{tmp_path}/my run' --data" in capsys.readouterr().out


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls train.py's main as the command does, and returns the one line that it ended with."""

    def call(*flags, main=train_script.main):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        message, code = capsys.readouterr().err, ended.value.code
        del ended  # its traceback holds what main held: a run's lock
        assert code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
        return message

    return call


def test_as_a_program_a_mistake_ends_with_exit_code_2(tmp_path):
    done = run("train.py", "--out", tmp_path / "run", "--data", tmp_path / "nowhere.jsonl")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_another_run_is_never_touched(toy, straight, refused):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert "already holds a run" in refused("--out", straight, *toy, *SMALL)
    assert before == {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}


def test_an_unwritable_out_is_refused(toy, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    assert "file/run" in refused("--out", tmp_path / "file/run", *toy, *SMALL)


def test_resume_refuses_other_flags_and_what_does_not_fit(straight, tmp_path, refused):
    assert "leave out --lam" in refused("--resume", straight, "--lam", "3")
    assert "leave out --epochs" in refused(f"--resume={straight}", "--epochs=4"), "the default is another value, too"
    copy = Path(shutil.copytree(straight, tmp_path / "copy"))
    save_file({"pred": torch.zeros(1, 48)}, copy / "checkpoint/pred.safetensors")
    assert "pred has shape [1, 48]" in refused("--resume", copy)
    save_file({"pred": torch.zeros(2, 32)}, copy / "checkpoint/pred.safetensors")
    assert "another shape" in refused("--resume", copy)
    (copy / "checkpoint/training.pt").write_bytes(b"not a checkpoint")
    save_file({"pred": torch.zeros(1, 32)}, copy / "checkpoint/pred.safetensors")
    assert "training.pt: cannot be read" in refused("--resume", copy)


def test_a_checkpoint_cannot_run_code(straight, tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    copy = Path(shutil.copytree(straight, tmp_path / "copy"))
    torch.save({"step": Evil()}, copy / "checkpoint/training.pt")
    assert "training.pt: cannot be read" in refused("--resume", copy)
    assert not (tmp_path / "it ran").exists()


def test_resume_refuses_changed_data(straight, tmp_path, refused):
    copy = Path(shutil.copytree(straight, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["arguments"]["data"] = str(toy_rows(tmp_path / "other.jsonl", 9))
    (copy / "config.json").write_text(json.dumps(config))
    assert "has changed since" in refused("--resume", copy)


def test_the_learning_rate_rises_and_falls_as_the_schedule_says():
    """100 steps, ten of them warm-up; then a third, a half, two thirds and all of the way, worked by hand."""
    def rates(schedule, *steps, warmup=0.1):
        args = Namespace(lr=2.0, warmup=warmup, schedule=schedule)
        return pytest.approx([train_script.learning_rate(step, 100, args) for step in steps])

    falling = {"cosine": [1.5, 1.0, 0.5, 0.0], "linear": [4 / 3, 1.0, 2 / 3, 0.0], "constant": [2.0] * 4}
    for schedule, expected in falling.items():
        assert [0.2, 1.0, 2.0, 2.0] == rates(schedule, 0, 4, 9, 10)
        assert expected == rates(schedule, 40, 55, 70, 100) and [2.0] == rates(schedule, 0, warmup=0.0)


def test_max_steps_ends_within_an_epoch(toy, tmp_path):
    """And so does the schedule, which would go below zero after its end."""
    inside("--out", tmp_path / "run", *toy, *SMALL, "--max_steps", "4", "--schedule", "linear")
    lines = [line for line in log(tmp_path / "run") if "lm" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and 0 < lines[3]["lr"] < lines[1]["lr"]
    assert state(tmp_path / "run")["step"] == 4


def test_a_model_from_scratch_has_the_shape_of_its_flags():
    """The default is the model of the committed results: 820,480 parameters, of which 128 are a [PRED] vector."""
    made = lambda *flags: train_script.from_scratch(train_script.FLAGS.parse_args(flags), 512)  # noqa: E731
    c = made(*"--n_layer 3 --n_head 2 --d_model 96 --block_size 77".split()).config
    assert (c.n_layer, c.n_head, c.d_model, c.d_ff, c.block_size) == (3, 2, 96, 256, 77)
    assert sum(p.numel() for p in made().parameters()) + 128 == 820_480


def test_the_shipped_data_is_validated_on_the_shipped_rows():
    val = lambda *flags: train_script.check(train_script.FLAGS.parse_args(flags)).val  # noqa: E731
    assert val().name == "synth_val.jsonl" and val("--val", "v.jsonl") == Path("v.jsonl")
    assert val("--data", "mine.jsonl") is None


def test_a_checkpoint_is_due_every_so_many_minutes(toy, tmp_path, monkeypatch):
    """By a clock on which a step takes 40 seconds."""
    steps, saved, save, step = [], [], runs.save_checkpoint, train_script.take_step
    clock = Namespace(monotonic=lambda: 40.0 * len(steps), perf_counter=time.perf_counter)
    monkeypatch.setattr(train_script, "time", clock)
    monkeypatch.setattr(train_script, "take_step", lambda *words: steps.append(1) or step(*words))
    monkeypatch.setattr(runs, "save_checkpoint", lambda *words: saved.append(len(steps)) or save(*words))
    inside("--out", tmp_path / "run", *toy, *SMALL, "--epochs", "1", "--save_minutes", "1")
    assert saved == [2, 4, 6, 6], "the last one at the end of the epoch"


def test_a_fine_tuned_run_brings_its_tokenizer(toy, tmp_path):
    """It can be evaluated after the folder that it had it from is gone."""
    base = Path(shutil.copytree(MODEL, tmp_path / "base"))
    inside("--out", tmp_path / "run", *toy, "--init", base, "--max_steps", "1", "--lam", "0")
    inside("--out", tmp_path / "other", *toy, "--init", MODEL, "--tokenizer", base, "--max_steps", "1", "--lam", "0")
    shutil.rmtree(base)
    for run in (tmp_path / "run", tmp_path / "other"):
        assert runs.open_model(run, "cpu").tokenizer.name == str(run / "best")


def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(toy, tmp_path, refused):
    weights.save(toy_decoder("llama"), tmp_path / "small")
    said = refused("--out", tmp_path / "run", *toy, "--init", tmp_path / "small", "--tokenizer", "synth")
    assert "the model's embedding only 50" in said


def test_rows_with_views_of_their_own_can_be_the_control(tmp_path):
    """A fused row cannot hold such views; --lam 0 needs none."""
    rows, said = tmp_path / "own.jsonl", [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "A B"}]
    rows.write_text((json.dumps({"messages": said, "text": "a", "code": "A"}) + "\n") * 4)
    inside("--out", tmp_path / "run", "--data", rows, "--val", rows, *SMALL, "--lam", "0", "--max_steps", "1")
    last = log(tmp_path / "run")[-1]
    assert "val_lm" in last and "val_jepa" not in last


def test_the_log_says_epoch_and_rate(toy, tmp_path):
    inside("--out", tmp_path / "run", *toy, *SMALL)
    lines = [line for line in log(tmp_path / "run") if "lm" in line]
    args = Namespace(lr=3e-3, warmup=0.03, schedule="cosine")
    assert [line["lr"] for line in lines] == pytest.approx([train_script.learning_rate(s, 12, args) for s in range(12)])
    assert [line["epoch"] for line in lines] == [1] * 6 + [2] * 6


@pytest.mark.parametrize("batch_size, lam, gamma", [(4, 1, 1), (3, 2, 0.5), (1, 2, 0.5)])
def test_a_step_goes_down_the_clipped_gradient_of_one_mean(examples, batch_size, lam, gamma):
    """However it is cut, among examples with different numbers of labels: AdamW and Muon would hide a wrong scale."""
    args = train_script.check(train_script.FLAGS.parse_args(
        ["--batch_size", str(batch_size), "--clip", "0.5", "--lam", str(lam), "--gamma", str(gamma)]))
    model, same = (LLMJEPA(toy_decoder("llama"), 1) for _ in range(2))
    losses = same(data.collate(examples, 1), lam=lam, gamma=gamma)
    losses.total.backward()
    norm = torch.cat([p.grad.flatten() for p in same.parameters()]).norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)  # fused: it knows found_inf
    run = Namespace(args=args, model=model, wrapped=model, optimizer=optimizer, step=0, total=9, layout={},
                    device=torch.device("cpu"), autocast=contextlib.nullcontext, failures=torch.zeros(()),
                    skipped=torch.zeros(()))
    taken = train_script.take_step(run, examples)
    assert_close((taken["sums"], taken["norm"]), (torch.stack(losses).detach(), norm), rtol=1e-5, atol=1e-5)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert_close(p.detach(), q.detach() - args.lr * q.grad * 0.5 / norm, rtol=1e-5, atol=1e-6)


def test_every_draw_depends_on_the_seed(toy, tmp_path, monkeypatch):
    """Initial weights, order of the data, partners of shuffled pairs, which steps drop the JEPA loss."""
    seeds = {"order": set(), "derangement": set(), "dropped": set()}
    for name, at in (("order", 2), ("derangement", 1), ("dropped", 1)):
        own = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *words, own=own, name=name, at=at: (
            seeds[name].add(words[at]), own(*words))[1])
    flags = [*toy, *SMALL, "--shuffle_pairs", "--loss_dropout", "0.5", "--lr", "0", "--weight_decay", "0"]
    for seed in (3, 4):
        inside("--out", tmp_path / str(seed), *flags, "--max_steps", "2", "--seed", seed)
    assert seeds["order"] == seeds["dropped"] == {3, 4} and {3, 4} <= seeds["derangement"]  # validation has its own
    one, other = (load_file(tmp_path / seed / "best/model.safetensors") for seed in "34")
    pairs = [(one[name], other[name]) for name in one if one[name].dim() > 1]
    assert len(pairs) > 7 and not any(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("flags, lr, batch_size, optimizer, tokenizer", [
    ([], 3e-3, 32, "muon", "synth"), (["--optimizer", "adamw"], 2e-3, 32, "adamw", "synth"),
    (["--init", "org/model"], 2e-5, 4, "adamw", "org/model"),
    (["--init", "org/model", "--lr", "1e-4"], 1e-4, 4, "adamw", "org/model")])
def test_defaults(flags, lr, batch_size, optimizer, tokenizer):
    """Grids and READMEs speak of runs that left these out."""
    args = train_script.check(train_script.FLAGS.parse_args(flags))
    assert (args.lr, args.batch_size, args.optimizer, args.tokenizer) == (lr, batch_size, optimizer, tokenizer)
    assert (args.lam, args.k, args.distance, args.epochs, args.warmup, args.weight_decay, args.clip, args.schedule) == (
        1.0, 1, "cosine", 4, 0.03, 0.1, 1.0, "cosine")
    made = train_script.make_optimizer(LLMJEPA(toy_decoder("llama"), 1), args)
    assert made.defaults["betas"] == (0.9, 0.95) and all(group["lr"] == lr for group in made.param_groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_computes_in_the_type_that_was_asked_for(toy, monkeypatch, dtype):
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: True)
    args = train_script.check(train_script.FLAGS.parse_args([*map(str, toy), *SMALL, "--dtype", dtype]))
    run, seen = train_script.prepare(args), set()
    run.total, (run.failures, run.skipped) = 9, torch.zeros(2)
    projection = run.model.decoder.blocks[0].attn.q_proj
    projection.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train_script.take_step(run, run.examples[:4])
    assert seen == {getattr(torch, dtype)} and projection.weight.dtype == torch.float32


def test_a_run_is_locked_while_it_is_trained(toy, tmp_path, monkeypatch):
    fit, tried = train_script.fit, []

    def locked(run):
        with pytest.raises(UserError, match="another process is training this run"):
            runs.lock(run.args.out)
        tried.append(run.args.resume)
        return fit(run)

    monkeypatch.setattr(train_script, "fit", locked)
    inside("--out", tmp_path / "run", *toy, *SMALL, "--max_steps", "1")
    inside("--resume", tmp_path / "run")
    assert tried == [None, tmp_path / "run"]


def test_shuffled_pairs_are_anew_each_epoch(toy, tmp_path, monkeypatch):
    step, epochs, orders = train_script.take_step, [{}, {}], [[], []]

    def watched(run, examples):
        epochs[run.step // 6].update({tuple(e.full): list(e.code) for e in examples})
        orders[run.step // 6] += [tuple(e.full) for e in examples]
        return step(run, examples)

    monkeypatch.setattr(train_script, "take_step", watched)
    inside("--out", tmp_path / "run", *toy, *SMALL, "--shuffle_pairs")
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1], "and so is the order of the rows"


def test_best_is_the_latest_that_is_not_shown_to_be_worse(toy, tmp_path, monkeypatch):
    """On five validation rows the standard error of 0.8 is 0.179. While nothing is right, the loss decides."""
    coming = iter([(0.0, 2.0), (0.0, 1.0), (0.0, 3.0), (0.8, 9.0), (0.7, 9.0), (0.63, 1.0), (0.62, 1.0), (0.9, 4.0)])
    saved, kept, save = [], [], runs.save_best
    monkeypatch.setattr(train_script, "validate", lambda run: dict(
        zip(("val_exact", "val_lm"), next(coming), strict=True)))
    monkeypatch.setattr(runs, "save_best", lambda *args: saved.append(1) or save(*args))
    monkeypatch.setattr(plots, "curves", lambda *_: kept.append(len(saved)))
    logged, own = [], runs.log  # only after the weights are there, or a crash could leave older ones for good
    monkeypatch.setattr(runs, "log", lambda run, **line: own(run, **line) or "val_lm" in line and logged.append(
        len(saved)))
    inside("--out", tmp_path / "run", *toy, *SMALL, "--epochs", "8", "--batch_size", "22")
    assert kept == logged == [1, 2, 2, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("flags, layout", [
    ("", {}), ("--layout paper", {"layout": "paper"}), ("--reverse", {"reverse": True}),
    ("--layout paper --front_pred", {"layout": "paper", "front_pred": True}), ("--distance mse", {})])
def test_validation_is_one_mean_over_all_rows(toy, tmp_path, flags, layout):
    """Batches of four rows and one: the figures are those of one pass over all five."""
    inside("--out", tmp_path / "run", *toy, *SMALL, "--max_steps", "2", "--lam", "2", *flags.split())
    found, model = log(tmp_path / "run")[-1], runs.load_model(tmp_path / "run/checkpoint").eval()
    made = [data.example(c, hf.tokenizer("synth")) for c in data.read(toy[3])]
    batch = data.collate(sorted(made, key=lambda e: len(e.full)), 1, **layout)
    with torch.no_grad():
        distance = "mse" if "mse" in flags else "cosine"
        total, lm, distance = (loss.item() for loss in model(batch, lam=2.0, distance=distance))
        cosines = encodings.cosines(*model.encodings(model.hidden(batch), batch))
    expected = {"val_lm": lm, "val_total": total, "val_jepa": distance}
    expected |= {f"val_cosine_{name}": value for name, value in cosines.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_collapse_is_told_of_once_and_only_where_there_is_a_jepa_term(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encodings, "collapsed", lambda cosines: True)
    for lam, times in (("1", 1), ("0", 0)):
        inside("--out", tmp_path / lam, *toy, *SMALL, "--lam", lam)
        assert capsys.readouterr().out.count("have collapsed") == times
    inside("--out", tmp_path / "stopped", *toy, *SMALL)
    (tmp_path / "stopped/log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log(tmp_path / "1")[:-1]))
    capsys.readouterr()
    inside("--resume", tmp_path / "stopped")
    assert "have collapsed" not in capsys.readouterr().out, "it was told before the run was stopped"
