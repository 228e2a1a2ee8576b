"""What must never cost a user a run, a file, or an hour: bad losses, folders in use, dead terminals, full disks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import MODEL, ROOT, inside, log, toy_rows, train
from torch.testing import assert_close

import jepa
import train as train_script
from evaluation import plots
from hf import runs
from support import cli, processes
from support.cli import Stopped, UserError

SMALL = ["--n_layer", "1", "--n_head", "2", "--d_model", "32", "--batch_size", "4", "--epochs", "2", "--log_every", "1"]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return ["--data", toy_rows(folder / "train.jsonl", 17), "--val", toy_rows(folder / "val.jsonl", 5, seed=1)]


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "finished", *toy, *SMALL)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ended(main, capsys):
    """(exit code, the one line on stderr) of a command called in this process."""
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    sys.stdout, sys.stderr = streams
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return exit.value.code, lines[0]


# ---- losses that are not finite


def test_a_validation_loss_that_is_not_finite_makes_no_best(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "validate", lambda run: {"val_exact": 1.0, "val_lm": float("nan")})
    code, line = ended(lambda: inside("--out", tmp_path / "run", *toy, *SMALL, "--max_steps", "1"), capsys)
    assert code == 1 and "val.jsonl is not finite" in line and not (tmp_path / "run/best").exists()


def test_bad_steps_that_are_not_in_a_row_end_nothing(toy, tmp_path, monkeypatch):
    """The first, third and fifth of five."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoil(parameters, largest):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) % 2:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    inside("--out", tmp_path / "run", *toy, *SMALL, "--epochs", "1")
    assert [line["steps_not_taken"] for line in log(tmp_path / "run") if "lm" in line] == [1, 1, 2, 2, 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # the same, stopped after the first of them
        patch.setattr(processes.Stop, "wanted", property(lambda self: True))
        calls.clear()
        inside("--out", tmp_path / "stopped", *toy, *SMALL, "--epochs", "1")
    saved = torch.load(tmp_path / "stopped/checkpoint/training.pt", weights_only=True)
    assert saved.pop("bad") == (1, 1)
    inside("--resume", tmp_path / "stopped")
    assert log(tmp_path / "stopped") == log(tmp_path / "run")
    torch.save(saved, tmp_path / "stopped/checkpoint/training.pt")  # as of an older version: it counts from 0
    inside("--resume", tmp_path / "stopped")


def test_a_step_that_is_not_finite_is_not_taken_and_three_end_the_run(toy, tmp_path, capsys):
    """Weights of 1e15 make every later gradient infinite: the first checkpoint stays, and best/ is not made."""
    out = tmp_path / "run"
    flags = ["--lr", "1e15", "--clip", "1e30", "--warmup", "0", "--schedule", "constant", "--save_minutes", "0"]
    code, line = ended(lambda: inside("--out", out, *toy, *SMALL, "--epochs", "4", *flags), capsys)
    assert code == 1 and "step 4" in line and "train.jsonl:" in line and "last good state" in line
    text = (out / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    lines = [json.loads(each) for each in text.splitlines()]
    assert [each.get("steps_not_taken") for each in lines if "lm" in each] == [None, 1, 2, 3]
    assert all(tensor.isfinite().all() for tensor in load_file(out / "checkpoint/model.safetensors").values())
    assert not (out / "best").exists()


def test_a_single_bad_step_leaves_weights_and_moments_alone(toy, tmp_path, monkeypatch):
    """One gradient of five is spoilt: the run ends well, and that step is counted."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoil(parameters, largest):
        parameters = list(parameters)
        calls.append([p.detach().clone() for p in parameters])
        if len(calls) == 2:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    inside("--out", tmp_path / "run", *toy, *SMALL, "--epochs", "1")
    assert all(torch.equal(before, after) for before, after in zip(calls[1], calls[2], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(calls[0], calls[1], strict=True))
    assert [line.get("steps_not_taken") for line in log(tmp_path / "run") if "lm" in line] == [None, 1, 1, 1, 1]


def test_weights_that_are_not_finite_never_replace_a_checkpoint(finished, tmp_path):
    folder = Path(shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint"))
    before, model = contents(folder), runs.load_model(folder)
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("inf")
    with pytest.raises(Stopped, match="decoder.norm.weight is not finite"):
        runs.save_model(model, folder)
    assert contents(folder) == before


def test_a_model_that_is_not_finite_is_not_evaluated(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    tensors = load_file(copy / "best/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "best/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        runs.open_model(copy, "cpu")


# ---- folders


@pytest.mark.parametrize("name", ["best/weights", "checkpoint/weights", "best.old/weights", "checkpoint.new/weights",
                                  "log.jsonl", "loss.png", "thesis.tex"])
def test_a_folder_that_holds_something_else_is_refused(toy, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("a year of work")
    code, line = ended(lambda: inside("--out", tmp_path / "run", *toy, *SMALL), capsys)
    assert code == 2 and "is not empty and holds no run" in line
    assert contents(tmp_path / "run") == {Path(name): b"a year of work"}


def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint"))
    before = contents(folder)

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")  # torch.save's words

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Stopped, match="cannot be written .*; what was saved before is still there"):
        runs.save_model(runs.load_model(folder), folder, training={"step": 1})
    assert contents(folder) == before and not (tmp_path / "checkpoint.new").exists()


def test_files_have_the_mode_that_the_umask_gives(finished):
    umask = os.umask(0)
    os.umask(umask)
    for path in [*(finished / "checkpoint").iterdir(), *(finished / "best").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_the_old_checkpoint_counts_while_the_new_one_is_put_in_its_place(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for name in ("best", "checkpoint"):
        (copy / name).rename(copy / f"{name}.old")
    assert runs.standing(copy, "best", "checkpoint") == copy / "best.old"
    assert runs.open_model(copy, "cpu").seed == 0


def test_a_crash_between_the_two_renames_leaves_the_old_state(finished, tmp_path, monkeypatch):
    copy, rename = Path(shutil.copytree(finished, tmp_path / "copy")), os.rename
    before, model = contents(copy / "checkpoint"), runs.load_model(copy / "checkpoint")

    def crash(source, target):
        if Path(target) == copy / "checkpoint":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        runs.save_model(model, copy / "checkpoint")
    assert contents(runs.standing(copy, "checkpoint")) == before


@pytest.mark.parametrize("what", ["a link", "kept"])
def test_saving_goes_on_where_the_old_folder_cannot_be_removed(finished, tmp_path, monkeypatch, what):
    """A user has moved it to another disk, or NFS keeps it for another process that reads it."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    model, folder = runs.load_model(copy / "best"), copy / "best"
    if what == "a link":
        folder.symlink_to(folder.rename(tmp_path / "big"))
    else:
        rmtree = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", lambda path, **how: path == folder.with_name("best.old") or rmtree(
            path, **how))
    for number in range(3):
        with torch.no_grad():
            model.pred.fill_(number)
        runs.save_model(model, folder)
        assert (runs.load_model(folder).pred == number).all()
    assert what == "kept" or (tmp_path / "big/pred.safetensors").exists()


def test_a_run_stopped_before_its_first_checkpoint_goes_on_from_the_beginning(finished, tmp_path):
    """It neither has to be deleted, nor is it refused: the same run comes out."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for name in ("best", "checkpoint", "loss.png"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "log.jsonl").write_text((copy / "log.jsonl").read_text().split("\n")[0] + "\n")
    inside("--resume", copy)
    assert log(copy) == log(finished)
    for name in ("checkpoint/model.safetensors", "best/pred.safetensors"):
        assert_close(load_file(copy / name), load_file(finished / name), rtol=0, atol=0)


def test_a_run_resumed_after_its_validation_draws_what_it_would_have_drawn(toy, tmp_path, monkeypatch):
    """A distance that draws at random does so in validation too: that must not come from training's random stream."""
    monkeypatch.setitem(jepa.DISTANCES, "noisy", lambda text, code: torch.rand(()) * jepa.cosine(text, code))
    straight, stopped, flags = tmp_path / "straight", tmp_path / "stopped", ["--distance", "noisy"]
    inside("--out", straight, *toy, *SMALL, *flags)
    curves = plots.curves
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def die(*_):
            raise KeyboardInterrupt  # the first validation is in the log, the next checkpoint is not there yet
        patch.setattr(plots, "curves", die)
        inside("--out", stopped, *toy, *SMALL, *flags)
    assert plots.curves is curves
    inside("--resume", stopped)
    assert log(stopped) == log(straight)


def test_a_run_from_before_there_was_a_choice_of_optimizer_goes_on_with_its_own(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    assert config["arguments"].pop("optimizer") == "muon" and "--optimizer=muon" in runs.flags(finished)
    (copy / "config.json").write_text(json.dumps(config))
    assert "--optimizer=adamw" in runs.flags(copy) and "--optimizer=muon" not in runs.flags(copy)


def test_a_run_on_nfs_can_be_locked(finished, monkeypatch):
    """There an exclusive lock wants a file that is open for writing; and what is not a held lock is not called one."""
    def flock(file, how):
        if not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    before = (finished / "config.json").read_bytes()
    runs.lock(finished).close()
    assert (finished / "config.json").read_bytes() == before
    monkeypatch.setattr(runs.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        runs.lock(finished)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_keeps_nobody_from_training(finished, monkeypatch, capsys, number):
    monkeypatch.setattr(runs.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    runs.lock(finished).close()
    assert "knows no locks" in capsys.readouterr().err


def test_a_run_belongs_to_one_process(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from hf import runs; held = runs.lock(sys.argv[1]); print('held', "
         "flush=True); time.sleep(600)", str(copy)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    runs.log(copy, step=10**6)  # of after the checkpoint: whoever resumes the run drops it
    before = (copy / "log.jsonl").read_bytes()
    code, line = ended(lambda: inside("--resume", copy), capsys)
    assert code == 2 and "another process is training this run" in line
    assert (copy / "log.jsonl").read_bytes() == before
    holder.kill()
    holder.communicate()
    inside("--resume", copy)  # any death lets go of it


# ---- terminals


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Rows that no ASCII terminal can print, among them what a tokenizer without them would answer."""
    path = tmp_path_factory.mktemp("odd") / "rows.jsonl"
    said = [{"role": "user", "content": "café"}, {"role": "assistant", "content": "日本語"}]
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(5)))
    return ["--data", path, "--val", path, *SMALL[:-4], "--epochs", "1"]


@pytest.mark.parametrize("where", ["ascii", "head", "full"])
def test_printing_never_ends_a_run(odd, tmp_path, where):
    if where == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    command = [sys.executable, "train.py", "--out", tmp_path / "run", *odd]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii" if where == "ascii" else "utf-8"}
    with open("/dev/full" if where == "full" else os.devnull, "w") as sink:
        out = subprocess.PIPE if where == "head" else sink
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=sink)
        if where == "head":
            process.stdout.readline()
            process.stdout.close()
        assert process.wait() == 0
    assert (tmp_path / "run/best").exists() and (tmp_path / "run/checkpoint").exists()


def test_a_lost_terminal_saves(toy, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "train.py", "--out", out, *toy, *SMALL, "--epochs", "200"]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where these tests run under nohup
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    signal.signal(signal.SIGHUP, before)
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 130
    step = torch.load(out / "checkpoint/training.pt", weights_only=True)["step"]
    assert 0 < step < 1000 and log(out)[-1]["step"] <= step


# ---- what a run depends on


@pytest.mark.parametrize("which", ["tokenizer.json", "model.safetensors"])
def test_a_run_does_not_go_on_with_another_model_or_tokenizer(toy, tmp_path, capsys, which):
    base = Path(shutil.copytree(MODEL, tmp_path / "base"))
    flags = [*toy, "--init", base, "--lora_rank", "2", "--epochs", "1", "--batch_size", "4"]
    inside("--out", tmp_path / "run", *flags)
    path = base / which
    if which == "tokenizer.json":
        path.write_text(path.read_text() + "\n")
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    code, line = ended(lambda: inside("--resume", tmp_path / "run"), capsys)
    assert code == 2 and "has changed since" in line and "base" in line


@pytest.mark.parametrize("edit, complaint", [
    ({"k": -3}, "--k -3"), ({"lam": "nan"}, "--lam nan"), ({"distance": "manhattan"}, "manhattan"),
    ({"lora_rank": 1}, "--init"), ({"new_flag": 7}, "--new_flag"), ({"layout": None}, "not the config.json of a run"),
    ({"val": "/tmp/a\0b"}, "not the config.json of a run"),
    ({"device": "toaster"}, "toaster"), ({"data": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl"),
])
def test_an_edited_config_is_checked_like_flags(finished, tmp_path, capsys, edit, complaint):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["arguments"] |= edit
    (copy / "config.json").write_text(json.dumps(config))
    code, line = ended(lambda: inside("--resume", copy), capsys)
    assert code == 2 and complaint in line


def test_a_config_of_an_older_version_lacks_flags_and_goes_on(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["arguments"]["save_minutes"], config["arguments"]["shard"], config["sha256"]["tokenizer"]
    (copy / "config.json").write_text(json.dumps(config))
    inside("--resume", copy)


def test_a_log_damaged_by_a_power_cut_is_mended(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    path = copy / "log.jsonl"
    odd = [b"\0\0\0\0", b"[1]", b'{"step": "x"}', b"[" * 100_000, b'{"step": 3, "l']
    path.write_bytes(path.read_bytes() + b"\n".join(odd))
    inside("--resume", copy)
    assert log(copy) == log(finished) and "damaged lines" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [
    {}, [], 7, {"step": "x", "random": []}, {"step": 2, "random": [[torch.zeros(3)]], "optimizer": {"state": {}}},
    {"step": 2, "random": [], "optimizer": {"state": {0: {}}, "param_groups": []}},
])
def test_an_odd_training_state_is_one_line(finished, tmp_path, capsys, saved):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    torch.save(saved, copy / "checkpoint/training.pt")
    code, line = ended(lambda: inside("--resume", copy), capsys)
    assert code == 2 and "training.pt" in line


def test_names_that_no_file_system_takes(toy, capsys):
    for flags in (["--out", "x" * 300, *toy], ["--data", "x" * 300], ["--resume", "x" * 300]):
        code, line = ended(lambda flags=flags: inside(*flags, *([] if "--resume" in flags else SMALL)), capsys)
        assert code == 2 and "too long" in line


def test_the_threshold_of_three_is_needed():
    """One bad step must not end a run: `stop_if_failing` looks at steps in a row."""
    state = train_script.Run(*[None] * 10, failures=torch.tensor(2.0))
    train_script.stop_if_failing(state, [])


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                     RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_is_one_line(capsys, failure):
    def main():
        raise failure

    code, line = ended(main, capsys)
    assert code == 2 and "out of memory" in line


@pytest.mark.parametrize("missing", ["InvalidCxxCompiler", "TritonMissing"])
def test_a_machine_without_a_compiler_is_one_line(capsys, missing):
    """By torch's own words. (To compile here would start processes and threads, and test_kills forks this one.)"""
    from torch._inductor import exc

    if not hasattr(exc, missing):
        pytest.skip(f"this torch knows no {missing}")

    def main():
        raise getattr(exc, missing)(*[None] * (missing == "TritonMissing"))

    code, line = ended(main, capsys)
    assert code == 2 and "--compile needs a C++ compiler" in line


def test_other_faults_of_the_device_are_not_taken_for_it():
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    streams = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError, match="illegal"):
        cli.run(main)
    sys.stdout, sys.stderr = streams


def test_nohup_is_respected():
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    stop, terminate = processes.Stop(), signal.getsignal(signal.SIGTERM)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.wanted
        os.kill(os.getpid(), signal.SIGINT)  # which shells ignore for what runs in the background
        assert stop.wanted
    finally:
        for number, handler in (handlers | {signal.SIGTERM: signal.SIG_DFL}).items():
            signal.signal(number, handler)
        assert terminate is stop


def test_runs_that_begin_together_get_folders_of_their_own(toy, tmp_path, monkeypatch):
    """While one of them reads its files, another takes the name that was free."""
    monkeypatch.chdir(tmp_path)
    whole = runs.digests
    monkeypatch.setattr(runs, "digests", lambda args: Path("runs/lam1-k1-seed0").mkdir(parents=True) or whole(args))
    inside(*toy, *SMALL, "--max_steps", "1")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["lam1-k1-seed0", "lam1-k1-seed0-2"]
    assert not any(Path("runs/lam1-k1-seed0").iterdir())


def test_control_characters_do_not_reach_the_terminal(capsys):
    def main():
        raise UserError("odd\x1b[31mname\r\x85.jsonl: is odd")

    _, line = ended(main, capsys)
    assert line == "error: odd\\x1b[31mname\\r\\x85.jsonl: is odd"


def test_pages_of_a_file_do_not_reach_the_terminal(capsys):
    """What is wrong stands at the beginning of a line, what to do at its end."""
    def fail():
        raise UserError(f"rows.jsonl:7: {'x' * 10**6} is no role; mend it")

    code, line = ended(fail, capsys)
    assert line.startswith("error: rows.jsonl:7: x") and line.endswith("is no role; mend it") and len(line) < 2000


def test_settings_that_are_a_pipe_or_beyond_all_measure(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**26 + 1)
    for name in ("pipe.json", "large.json"):
        with pytest.raises(UserError, match=f"{name}: is no file of JSON"):
            cli.read_json(tmp_path / name)
