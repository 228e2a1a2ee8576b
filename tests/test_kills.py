"""A run that is killed at any moment and resumed is the run that was not: bit for bit, log included.

`python tests/test_kills.py 100` kills a hundred runs (about two seconds each); pytest a few.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_train import log, state, toy_rows  # noqa: E402

import train as train_script  # noqa: E402

FLAGS = "--n_layer 1 --n_head 2 --d_model 32 --batch_size 4 --epochs 3 --log_every 1 --save_minutes 0".split()


def start(*flags):
    """train.py in a process of its own, forked from this one (torch is imported already); its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    sys.argv = ["train.py", *map(str, flags)]
    try:
        train_script.main()
    except SystemExit as ended:
        os._exit(ended.code or 0)
    except BaseException:
        os._exit(99)
    os._exit(0)


def finish(child):
    """The exit code, or minus the signal, of a process of `start`."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(folder):
    """Flags, and the run that the others are compared with."""
    rows = ["--data", toy_rows(folder / "train.jsonl", 22), "--val", toy_rows(folder / "val.jsonl", 5, seed=1)]
    began = time.monotonic()
    assert finish(start("--out", folder / "straight", *rows, *FLAGS)) == 0
    return rows, folder / "straight", time.monotonic() - began


def kill_and_resume(folder, number, rows, straight, seconds):
    """Kill a run up to three times at random moments, then let it end; it must equal the straight one."""
    draw, out = random.Random(number), folder / f"killed-{number}"
    command = ["--out", out, *rows, *FLAGS]
    for _ in range(draw.randint(1, 3)):
        child = start(*command)
        time.sleep(draw.uniform(0.05, 0.9 * seconds))
        os.kill(child, signal.SIGKILL)
        finish(child)  # by the signal, or well: it may have been quicker than the straight one
        if (out / "config.json").exists():
            command = ["--resume", out]
    assert finish(start(*command)) == 0
    assert_close(state(out), state(straight), rtol=0, atol=0)
    assert log(out) == log(straight)
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return folder, *prepare(folder)


@pytest.mark.parametrize("number", range(4))
def test_a_killed_run_equals_the_run_that_was_not(prepared, number):
    folder, rows, straight, seconds = prepared
    kill_and_resume(folder, number, rows, straight, seconds)


if __name__ == "__main__":
    count = int(sys.argv[1]) if sys.argv[1:] else 20
    with tempfile.TemporaryDirectory() as name:
        rows, straight, seconds = prepare(Path(name))
        for number in range(count):
            kill_and_resume(Path(name), number, rows, straight, seconds)
            print(f"{number + 1} of {count} killed runs are bit-equal to the straight one", flush=True)
