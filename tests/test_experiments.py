"""Sweeps survive what happens to them; tables and pictures come from the committed JSON."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep
from support.cli import UserError

REPOSITORY = Path(__file__).parent.parent
TRAIN = """
import json, os, pathlib, sys, time
words = sys.argv
resumed = "--resume" in words
out = pathlib.Path(words[words.index("--resume" if resumed else "--out") + 1])
(out / "seen").mkdir(parents=True, exist_ok=True)
(out / "seen" / str(len(list((out / "seen").iterdir())))).write_text("resumed" if resumed else "anew")
settings = {"out": str(out.resolve()), "words": words}
if not resumed:
    (out / "config.json").write_text(json.dumps({"arguments": settings, "sha256": {}, "versions": {}}))
if "--no_checkpoint" in words and not (flag := out.parent / "died").exists():
    flag.touch()
    sys.exit(9)
(out / "pid").write_text(str(os.getpid()))
(out / "checkpoint").mkdir(exist_ok=True)
if "--die" in words and not resumed:
    sys.exit(9)
if "--slow" in words and not resumed:
    time.sleep(60)
(out / "log.jsonl").write_text('{"step": 1}\\n{"step": 1, "val_lm": 0.5}\\n')
(out / "best").mkdir()
"""
EVAL = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
if "--die" in sys.argv and not (out / "died").exists():
    (out / "died").touch()
    sys.exit(7)
(out / "metrics.json").write_text(json.dumps({"rates": {}}))
(out / "predictions.jsonl").write_text("".join(json.dumps({"exact": e}) + "\\n" for e in (True, False, True)))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which sweeps run, with scripts that do what train.py and eval.py do to files, and no more."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval.py").write_text(EVAL)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def toy(monkeypatch, arms, on_eval="", seeds=1):
    grid = {"about": "", "seeds": seeds, "rows": 3, "train": "", "eval": on_eval, "keep": True, "arms": arms}
    monkeypatch.setitem(sweep.GRIDS, "toy", grid)
    return grid


def seen(cell):
    """How its training was started, each time."""
    return [path.read_text() for path in sorted((cell.folder / "seen").iterdir())]


def test_every_cell_is_run_once(place, monkeypatch):
    toy(monkeypatch, {"a": "--lam 0", "b": "--lam 2"}, seeds=2)
    todo = sweep.cells("toy")
    assert [cell.name for cell in todo] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert {sweep.state(cell) for cell in todo} == {"not run"}
    assert sweep.run_all(todo, 2, True) == 0 and sweep.run_all(todo, 2, True) == 0
    for cell in todo:
        made = json.loads(cell.result.read_text())
        assert sweep.state(cell) == "done" and seen(cell) == ["anew"]
        assert made["commands"] == cell.commands and made["correct"] == "101" and made["attempts"] == 2
        assert made["validation"] == [{"step": 1, "val_lm": 0.5}] and made["hardware"]["threads"] >= 1
        assert str(place) not in cell.result.read_text()
        assert (cell.folder / "best").exists() and not (cell.folder / "checkpoint").exists()


def test_the_arms_that_are_named(place, monkeypatch):
    toy(monkeypatch, {"a": "", "b": "", "c": ""}, seeds=2)
    assert [cell.name for cell in sweep.cells("toy", ["c", "a"])] == ["a-seed0", "c-seed0", "a-seed1", "c-seed1"]


@pytest.mark.parametrize("flag, starts", [("--die", ["anew", "resumed"]), ("--no_checkpoint", ["anew"])])
def test_a_training_that_died_goes_on_from_its_checkpoint_or_is_run_again(place, monkeypatch, flag, starts):
    toy(monkeypatch, {"a": flag})
    cell, = sweep.cells("toy")
    assert sweep.run_all([cell], 1, True) == 1 and not cell.result.exists() and sweep.state(cell) == "begun"
    assert sweep.run_all([cell], 1, True) == 0 and sweep.state(cell) == "done" and seen(cell) == starts
    assert json.loads(cell.result.read_text())["attempts"] == 3


def test_an_evaluation_that_died_does_not_repeat_the_training(place, monkeypatch, capsys):
    toy(monkeypatch, {"a": ""}, on_eval="--die")
    cell, = sweep.cells("toy")
    assert sweep.run_all([cell], 1, True) == 1
    assert "a-seed0: eval.py ended with exit code 7; see runs/sweep/toy/a-seed0.log" in capsys.readouterr().out
    assert sweep.run_all([cell], 1, True) == 0 and seen(cell) == ["anew"]


def test_what_was_begun_by_other_commands_is_run_again(place, monkeypatch):
    toy(monkeypatch, {"a": "--die"})
    sweep.run_all(sweep.cells("toy"), 1, True)
    toy(monkeypatch, {"a": ""})
    cell, = sweep.cells("toy")
    assert sweep.state(cell) == "not run" and sweep.run_all([cell], 1, True) == 0 and seen(cell) == ["anew"]


def test_a_result_of_other_commands_is_not_taken_for_this_one(place, monkeypatch):
    toy(monkeypatch, {"a": ""})
    sweep.run_all(sweep.cells("toy"), 1, True)
    toy(monkeypatch, {"a": "--lam 3"})
    monkeypatch.setattr(sys, "argv", ["sweep", "toy"])
    with pytest.raises(UserError, match="a-seed0.json: was made by other commands"):
        sweep.main()


def test_no_two_processes_work_on_one_cell(place, monkeypatch):
    toy(monkeypatch, {"a": ""})
    cell, = sweep.cells("toy")
    cell.folder.parent.mkdir(parents=True)
    with open(cell.log, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert sweep.run_cell(cell, sweep.Jobs(1), True) == "is being run by another process"
    assert sweep.run_all([cell], 1, True) == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_goes_on(place, monkeypatch, how):
    """Ctrl-C stops the trainings too; after a kill, what goes on alone is left to end before the cell is touched."""
    grid = toy(monkeypatch, {"a": "--slow", "b": "--slow"})
    (place / "datasets").mkdir()
    shutil.copy(REPOSITORY / "datasets" / "synth_train.jsonl", place / "datasets")
    code = (f"import sys, pathlib; from experiments import sweep; from support import cli; "
            f"sweep.ROOT = pathlib.Path({str(place)!r}); sweep.GRIDS['toy'] = {grid!r}; "
            f"sys.argv = ['sweep', 'toy', '--jobs', '2']; cli.run(sweep.main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    todo = sweep.cells("toy")
    for _ in range(600):
        if all((cell.folder / "checkpoint").exists() for cell in todo):
            break
        time.sleep(0.1)
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    if how == signal.SIGKILL:
        assert sweep.run_cell(todo[0], sweep.Jobs(1), True) == "is being run by another process"
        for cell in todo:
            os.kill(int((cell.folder / "pid").read_text()), signal.SIGKILL)
        time.sleep(0.5)
    else:
        assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert [sweep.state(cell) for cell in todo] == ["begun", "begun"]
    assert sweep.run_all(todo, 2, True) == 0
    assert [seen(cell) for cell in todo] == [["anew", "resumed"]] * 2
