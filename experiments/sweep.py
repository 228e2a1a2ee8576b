"""Run a named grid of grids.json: arms x seeds, each cell a call of train.py and one of eval.py as they are.

    python -m experiments.sweep pilot --list                 # the cells and how far they are
    python -m experiments.sweep pilot --jobs 2               # what is not done yet; two at once, each on half the cores
    python -m experiments.sweep pilot --only lam0 cosine     # two of its arms

A cell that is done is one file, experiments/results/NAME/ARM-seedN.json, and holds the commands that repeat it. After
Ctrl-C or a crash, the same call goes on: a training from its last checkpoint, an evaluation from its last answer. Run
folders go to runs/sweep/. Then: python -m experiments.report NAME
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.bench import machine
from support import cli
from support.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS, TRAIN_ROWS = Path("runs/sweep"), Path("experiments/results"), Path("datasets/synth_train.jsonl")

GRIDS = cli.read_json(ROOT / "experiments" / "grids.json")  # rows: how many shipped ones; keep: the weights, too?


class Cell(NamedTuple):
    name: str  # arm and seed
    arm: str
    seed: int
    folder: Path  # of the run
    result: Path  # the JSON file
    commands: dict  # {"data", "train", "eval": what one would type in the root of the repository}


def cells(grid_name, only=()):
    """Every `Cell` of a grid, or those of the arms `only`; all arms of a seed before the next seed."""
    grid, made = GRIDS[grid_name], []
    few = RUNS / f"first-{grid['rows']}.jsonl"
    for seed in range(grid["seeds"]):
        for arm, flags in grid["arms"].items():
            name = f"{arm}-seed{seed}"
            folder = RUNS / grid_name / name
            commands = {
                "data": f"mkdir -p {RUNS} && head -n {grid['rows']} {TRAIN_ROWS} > {few}",
                "train": f"python train.py --data {few} {grid['train']} {flags} --seed {seed} --out {folder}",
                "eval": f"python eval.py {folder} {grid['eval']}",
            }
            if not only or arm in only:
                made.append(Cell(name, arm, seed, ROOT / folder, ROOT / RESULTS / grid_name / f"{name}.json", commands))
    return made


def beside(cell, ending):
    """A file next to the run folder: what the cell printed, how far it is."""
    return cell.folder.with_name(cell.name + ending)


def parts_of(cell):
    """What was run of a cell that is not done: [{"stage", "seconds", "exit"}, ...]; None if it was not begun."""
    path = beside(cell, ".parts.json")
    found = cli.read_json(path) if path.exists() else {}
    return found["parts"] if found.get("commands") == cell.commands else None


def state(cell):
    """"done", "done with other commands", "begun" or "not run"."""
    if cell.result.exists():
        return "done" if cli.read_json(cell.result)["commands"] == cell.commands else "done with other commands"
    return "not run" if parts_of(cell) is None else "begun"


# ---- running


class Jobs:
    """The processes at work: `call` runs one to its end, `stop` ends all of them as Ctrl-C does."""

    def __init__(self, threads):
        self.threads, self.children, self.stopping = threads, set(), False

    def call(self, words, log):
        """Run a command, as a process group of its own (so that Ctrl-C reaches it once, from here): its exit code."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, *(os.path.expandvars(word) for word in words[1:])]
        if self.stopping:
            return 130
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment,
                              start_new_session=True) as child:
            self.children.add(child)
            if self.stopping:
                child.send_signal(signal.SIGINT)
            return child.wait()

    def stop(self):
        self.stopping = True
        for child in list(self.children):
            child.send_signal(signal.SIGINT)  # does nothing to a child that has ended


def run_cell(cell, jobs, keep):
    """Train, evaluate, write the result. Returns a sentence where that did not come to its end, else None.

    The log is locked as long as this process or the one it started lives, so that no two work on the same cell.
    """
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(beside(cell, ".log"), "a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "is being run by another process"
        if cell.result.exists():  # made by another process since we looked
            return None
        parts = parts_of(cell)
        if parts is None:
            shutil.rmtree(cell.folder, ignore_errors=True)
            parts = note(cell, [])
        for stage in ("train", "eval"):
            if any(part["stage"] == stage and part["exit"] == 0 for part in parts):
                continue
            words, began = shlex.split(cell.commands[stage]), time.time()
            if stage == "train" and any((cell.folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
                words = ["python", "train.py", "--resume", str(cell.folder)]
            elif stage == "train":
                shutil.rmtree(cell.folder, ignore_errors=True)  # stopped before its first checkpoint
            code = jobs.call(words, log)
            parts = note(cell, [*parts, {"stage": stage, "seconds": round(time.time() - began, 1), "exit": code}])
            if code:
                return f"{stage}.py ended with exit code {code}; see {RUNS}/{cell.folder.parent.name}/{cell.name}.log"
        cli.write(cell.result, portable(json.dumps(collect(cell, parts, jobs.threads), indent=1) + "\n"))
        for part in ("checkpoint", *(() if keep else ("best",))):
            shutil.rmtree(cell.folder / part, ignore_errors=True)
    return None


def note(cell, parts):
    cli.write_json(beside(cell, ".parts.json"), {"commands": cell.commands, "parts": parts})
    return parts


def collect(cell, parts, threads):
    """What the JSON of a cell holds."""
    config, metrics = (cli.read_json(cell.folder / name) for name in ("config.json", "metrics.json"))
    lines = {name: (cell.folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
             for name in ("log", "predictions")}
    rows = [json.loads(line) for line in lines["predictions"]]
    code = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "arm": cell.arm, "seed": cell.seed, "commands": cell.commands, "settings": config["arguments"],
        "sha256": config["sha256"], "versions": config["versions"] | {"code": code.stdout.strip()},
        "hardware": machine() | {"threads": threads},
        "seconds": {stage: round(sum(part["seconds"] for part in parts if part["stage"] == stage), 1)
                    for stage in ("train", "eval")},
        "parts": len(parts), "metrics": metrics,
        "validation": [line for line in map(json.loads, lines["log"]) if "val_lm" in line],
        "correct": "".join(str(int(row["exact"])) for row in rows),
    }


def portable(text):
    """The text of a JSON file without this machine's folders."""
    text = text.replace(f"{ROOT}/", "")
    folder = os.environ.get("LLMJEPA_SMOLLM2")
    return text.replace(str(Path(folder).resolve()), "$LLMJEPA_SMOLLM2") if folder else text


def run_all(todo, count, grid):
    """Run cells, `count` at a time. Returns how many did not come to their end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs, failed = Jobs(max(1, cores // count)), 0
    with ThreadPoolExecutor(count) as pool, tqdm(total=len(todo), unit="cell", smoothing=0) as bar:
        waiting = {pool.submit(run_cell, cell, jobs, grid["keep"]): cell for cell in todo}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1 if sys.stderr.isatty() else 60, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, problem = waiting.pop(future), future.result()
                    failed += problem is not None
                    tqdm.write(f"{cell.name}: {problem or 'done'}")
                bar.update(len(done))
                bar.refresh()
        except BaseException:
            jobs.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main():
    p = cli.parser(__doc__)
    p.add_argument("name", choices=GRIDS, help="the grid")
    p.add_argument("--only", nargs="+", default=[], metavar="ARM", help="only these arms")
    p.add_argument("--jobs", type=cli.whole(1), default=1, help="cells at a time; each gets its share of the cores")
    p.add_argument("--list", action="store_true", help="only say which cells are done, and how the others are run")
    args = p.parse_args()
    grid = GRIDS[args.name]
    for arm in args.only:
        if arm not in grid["arms"]:
            raise UserError(f"--only {arm}: {args.name} has the arms {', '.join(grid['arms'])}")
    states = [(cell, state(cell)) for cell in cells(args.name, args.only)]
    if args.list:
        print(grid["about"])
        for cell, found in states:
            print(f"{cell.name:32s} {found:24s} {cell.commands['train']}")
        return
    for cell, found in states:
        if found == "done with other commands":
            raise UserError(f"{cell.result}: was made by other commands than the grid's; delete it to run it again")
    if "$LLMJEPA_SMOLLM2" in grid["train"] and not Path(os.environ.get("LLMJEPA_SMOLLM2", "")).is_absolute():
        raise UserError("set LLMJEPA_SMOLLM2 to the (absolute) folder of SmolLM2-135M-Instruct, which this grid trains")
    shipped = (ROOT / TRAIN_ROWS).read_bytes().split(b"\n")[: grid["rows"]]
    cli.write(ROOT / RUNS / f"first-{grid['rows']}.jsonl", (b"\n".join(shipped) + b"\n").decode())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = run_all([cell for cell, found in states if found != "done"], args.jobs, grid)
    if failed:
        raise cli.Stopped(f"{failed} cells did not come to their end; the same command goes on with them")
    print(f"python -m experiments.report {args.name}")


if __name__ == "__main__":
    cli.run(main)
