"""Several processes under torchrun: the result is that of one, and a death ends all without losing the run."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import toy_decoder
from safetensors.torch import load_file
from test_train import inside, log, run, toy_rows, train
from torch.testing import assert_close

from jepa import LLMJEPA
from support import processes
from support.cli import UserError

ROOT = Path(__file__).parent.parent
SMALL = ["--n_layer", "2", "--n_head", "2", "--d_model", "32", "--batch_size", "4", "--epochs", "2", "--log_every", "1"]


ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def torchrun(count, *flags):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "train.py", *flags]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """13 rows: an epoch is three steps of 4 and one of a single row, in which one of two processes has nothing."""
    folder = tmp_path_factory.mktemp("toy")
    return ["--data", toy_rows(folder / "train.jsonl", 13), "--val", toy_rows(folder / "val.jsonl", 5, seed=1)]


sharding = pytest.mark.skipif(torch.__version__ < (2, 9), reason="this torch cannot shard on CPUs")


def same(one, other):
    """Weights, [PRED] vectors and logged losses agree."""
    for name in ("model", "pred"):
        files = (load_file(folder / f"best/{name}.safetensors") for folder in (one, other))
        assert_close(*files, rtol=0, atol=1e-6)
    mine, theirs = ([(line["step"], line.get("total", line.get("val_total")), line.get("grad_norm", 0))
                     for line in log(folder)] for folder in (one, other))
    assert torch.tensor(mine).numpy() == pytest.approx(torch.tensor(theirs).numpy(), rel=1e-5)


def two_like_one(toy, folder, optimizer, *engine):
    """The folder of a whole run of two processes, which equals that of one, to 1e-6 in the weights; also where rows are
    compared across processes."""
    flags = [*toy, *SMALL, "--distance", "infonce", "--lam", "0.5", "--lr", "5e-4", "--optimizer", optimizer]
    alone, both = train(folder / "alone", *flags), folder / "both"
    done = run(*torchrun(2, "--out", both, *flags, *engine))
    assert done.returncode == 0, done.stderr
    same(both, alone)
    return both


def test_two_processes_equal_one(toy, tmp_path):
    two_like_one(toy, tmp_path, "muon")


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds processes by pgrep")
@pytest.mark.parametrize("engine, others, optimizer, epochs", [
    ("", 1, "adamw", 4), pytest.param("--shard", 3, "muon", 2, marks=sharding)])
def test_a_killed_worker_ends_all_and_the_run_goes_on(toy, tmp_path, engine, others, optimizer, epochs):
    """SIGKILL of one of two workers: all end within 30 s; another number of processes goes on to the same result."""
    flags = [*toy, *SMALL, "--save_minutes", "0", "--lr", "5e-4", "--epochs", str(epochs), "--optimizer", optimizer]
    alone, out = train(tmp_path / "alone", *flags), tmp_path / "both"
    command = [sys.executable, *map(str, torchrun(2, "--out", out, *flags, *engine.split()))]
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while launcher.poll() is None and not (out / "checkpoint").exists():
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    launcher.communicate()
    assert launcher.returncode != 0 and time.monotonic() - began < 30
    resume = ("--resume", out)
    if others == 1:
        inside(*resume)
    else:
        done = run(*torchrun(others, *resume))
        assert done.returncode == 0, done.stderr
    same(out, alone)


@sharding
def test_a_sharded_run_equals_one_process_and_goes_on_from_before_its_validation(toy, tmp_path):
    """FSDP begins then with a validation, which is no pass of the whole model. And a damaged part is one line."""
    out = two_like_one(toy, tmp_path, "adamw", "--shard")
    config, lines = json.loads((out / "config.json").read_text()), log(out)
    config["arguments"]["epochs"] = 3
    (out / "config.json").write_text(json.dumps(config))
    kept = [line for line in lines if (line["step"], "val_lm" in line) != (8, True)]
    assert len(kept) == len(lines) - 1
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    done = run(*torchrun(2, "--resume", out))
    assert done.returncode == 0, done.stderr
    again = [line for line in log(out) if "val_lm" in line]
    assert [line["step"] for line in again] == [4, 8, 12]
    assert again[1]["val_lm"] == pytest.approx(lines[-1]["val_lm"], rel=1e-5)
    next((out / "checkpoint").glob("*.distcp")).write_bytes(b"damaged")
    done = run(*torchrun(2, "--resume", out))
    assert "checkpoint: cannot be read (" in done.stderr and 'train.py", line' not in done.stderr, done.stderr


def test_an_old_torch_shards_on_no_cpu(monkeypatch):
    """Up to 2.8, gloo summed what FSDP2 asked it to average: gradients were WORLD times what they should be."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cpu"))
    monkeypatch.setattr(processes, "WORLD", 2)
    with pytest.raises(UserError, match="--shard on CPUs needs torch 2.9"):
        processes.spread(LLMJEPA(toy_decoder("llama"), 1), shard=True)


def test_ctrl_c_at_the_launcher_leaves_a_run_that_goes_on(toy, tmp_path):
    flags = [*toy, *SMALL, "--lr", "5e-4", "--epochs", "50"]
    out = tmp_path / "both"
    command = [sys.executable, *map(str, torchrun(2, "--out", out, *flags))]
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True)
    while launcher.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.01)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    launcher.communicate(timeout=60)
    step = torch.load(out / "checkpoint/training.pt", weights_only=True)["step"]
    assert 0 < step < 200 and all(line["step"] <= step for line in log(out))


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds processes by pgrep")
def test_workers_end_when_their_launcher_is_killed(toy, tmp_path):
    """Nobody is left writing into the run, and the run can go on."""
    out, flags = tmp_path / "both", [*toy, *SMALL, "--lr", "5e-4", "--epochs", "400"]
    command = [sys.executable, *map(str, torchrun(2, "--out", out, *flags))]
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    while launcher.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    began, alive = time.monotonic(), True
    while alive and time.monotonic() - began < 30:
        time.sleep(0.2)
        alive = subprocess.run(["pgrep", "-f", f"train.py --out {out}"], capture_output=True).returncode == 0
    assert not alive
    written = (out / "log.jsonl").stat().st_size
    step = torch.load(out / "checkpoint/training.pt", weights_only=True)["step"]
    assert 0 < step < 1600 and (out / "log.jsonl").stat().st_size == written


def test_finite_everywhere_looks_at_every_weight():
    model = torch.nn.Linear(2, 2)
    assert processes.finite_everywhere(model)
    with torch.no_grad():
        model.bias[1] = float("nan")
    assert not processes.finite_everywhere(model)


def test_world_size_without_torchrun_is_one_line(tmp_path):
    for more in ({"RANK": "0"}, {}):
        done = subprocess.run([sys.executable, ROOT / "train.py", "--out", tmp_path / "run"], text=True,
                              env=os.environ | {"WORLD_SIZE": "2"} | more, capture_output=True)
        assert done.returncode == 2 and "torchrun did not start this process" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_rank_of_something_else_is_none():
    """RANK without WORLD_SIZE, as some clusters set it: this process is the only one, and does all the work."""
    for world in ({}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("WORLD_SIZE", raising=False)
            for name, value in ({"RANK": "1"} | world).items():
                patch.setenv(name, value)
            fresh = runpy.run_path(processes.__file__)  # it looks when it is imported
        assert (fresh["RANK"], fresh["WORLD"]) == (0, 1)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "17")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="--device cuda:17"):
            processes.hardware(name)


def test_bfloat16_is_refused_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="this cpu has no fast bfloat16"):
        processes.hardware("cpu", "bfloat16")
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: True)
    for dtype, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float32), ("float32", torch.float32)):
        _, autocast = processes.hardware("cpu", dtype)
        with autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back at once")
def test_memory_is_kept_from_step_to_step():
    """Page faults of the last 35 of 40 steps of a model whose embedding has 29 MiB: a single step says little."""
    code = """if True:
        import resource, sys, torch
        from model import Config, Decoder
        from support import processes
        if sys.argv[1:]:
            processes.keep_memory()
        decoder, ids, faults = Decoder(Config(30_000, 1, 1, 256, 64)), torch.arange(8)[None], []
        for _ in range(40):
            decoder(ids).logsumexp(-1).sum().backward()
            decoder.zero_grad()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[-36])"""
    count = lambda *words: int(subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True,  # noqa: E731
                                              capture_output=True).stdout)
    assert 4 * count("keep") < count()


def test_whoever_chooses_the_hardware_keeps_memory(monkeypatch):
    called = []
    monkeypatch.setattr(processes, "keep_memory", lambda: called.append(True))
    processes.hardware("cpu")
    assert called == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told what to return")
def test_large_blocks_are_returned():
    """In the heap, those of SmolLM2's steps left holes: at batch 32 memory grew by 40 MB a step, and ran out."""
    code = """if True:
        import re, torch
        from support import processes
        processes.keep_memory()
        resident = lambda: int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read()).group(1))
        block = torch.ones(25_000_000)
        held = resident()
        del block
        print(held - resident())"""
    freed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert int(freed.stdout) > 90_000  # KiB, of 97,656


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bytes_of_training_are_those_of_the_formula(lora_rank):
    """4 bytes for each parameter, 12 more for each that is trained: gradient and AdamW's two moments."""
    from argparse import Namespace

    import data
    from hf import lora
    from train import make_optimizer

    model = LLMJEPA(toy_decoder("llama"), 2)
    if lora_rank:
        lora.add(model.decoder, lora_rank)
    optimizer = make_optimizer(model, Namespace(lr=1e-3, weight_decay=0.1, optimizer="adamw"))
    example = data.Example([1, 2, 3, 4], [False, False, True, True], 2, [1, 2], [3])
    model(data.collate([example], 2)).total.backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
    total, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    assert sum(t.numel() * t.element_size() for t in tensors) == 4 * total + 12 * trained
    assert (trained < total) == bool(lora_rank)


@pytest.mark.parametrize("flags, fast", [("sse2 avx512f", False), ("avx512_bf16", True), ("fp asimd bf16", True)])
def test_a_cpu_says_whether_it_has_bfloat16(monkeypatch, flags, fast):
    monkeypatch.setattr(processes.Path, "exists", lambda self: True)
    monkeypatch.setattr(processes.Path, "read_text", lambda self: f"flags\t: fpu {flags}\n")
    assert processes.has_bfloat16(torch.device("cpu")) is fast


def test_several_processes_on_a_mac_use_its_cpu(monkeypatch):
    """gloo has no way to send what lies on its GPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(processes, "WORLD", 2)
    assert processes.hardware("auto")[0] == torch.device("cpu")
