"""Run a named grid of grids.json: arms x seeds, each cell a call of train.py and one of eval.py as they are.

    python -m experiments.sweep pilot --list                 # the cells and how far they are
    python -m experiments.sweep pilot --jobs 2               # what is not done yet; two at once, on half the cores each
    python -m experiments.sweep pilot --only lam0 cosine-k1  # two of its arms

A cell that is done is one file, experiments/results/NAME/ARM-seedN.json, and holds the commands that repeat it. After
Ctrl-C or a crash, the same call goes on: a training from its last checkpoint, an evaluation from its last answer. Run
folders and logs go to runs/sweep/. Then: python -m experiments.report NAME
"""

import fcntl
import json
import os
import re
import shlex
import shutil
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
RUNS, RESULTS = Path("runs/sweep"), Path("experiments/results")
GRIDS = cli.read_json(ROOT / "experiments" / "grids.json")  # rows: how many of the source's; keep: the weights, too?


class Cell(NamedTuple):
    name: str  # arm and seed
    arm: str
    seed: int
    folder: Path  # of the run
    log: Path  # what its commands printed, each between "$ command" and "= stage seconds, exit code"
    result: Path  # the JSON file
    commands: dict  # {"data", "train", "eval": what one would type in the root of the repository}


def cells(grid_name, only=()):
    """Every `Cell` of a grid, or those of the arms `only`; all arms of a seed before the next seed."""
    grid, made = GRIDS[grid_name], []
    few = RUNS / grid["few"]
    for seed in range(grid["seeds"]):
        for arm, flags in grid["arms"].items():
            name = f"{arm}-seed{seed}"
            folder = RUNS / grid_name / name
            commands = {
                "data": f"mkdir -p {RUNS} && head -n {grid['rows']} {grid['source']} > {few}",
                "train": f"python train.py --data {few} {grid['train']} {flags} --seed {seed} --out {folder}",
                "eval": f"python eval.py {folder} {grid['eval']}",
            }
            if not only or arm in only:
                made.append(Cell(name, arm, seed, ROOT / folder, ROOT / f"{folder}.log",
                                 ROOT / RESULTS / grid_name / f"{name}.json", commands))
    return made


def state(cell):
    """"done", "done with other commands", "begun" or "not run"."""
    if cell.result.exists():
        return "done" if cli.read_json(cell.result)["commands"] == cell.commands else "done with other commands"
    begun = cell.log.exists() and logged(cell).startswith(f"$ {cell.commands['train']}\n")
    return "begun" if begun else "not run"


def logged(cell):
    return cell.log.read_text(encoding="utf-8", errors="replace")


def run_cell(cell, threads, keep):
    """Train, evaluate, write the result. Returns a sentence where that did not come to its end, else None. The log is
    locked while this process or the one it started lives, so that no two work on the same cell."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "is being run by another process"
        if state(cell) == "not run":
            log.truncate(0)
            shutil.rmtree(cell.folder, ignore_errors=True)
        for stage in ("train", "eval"):
            since = logged(cell).partition(f"$ {cell.commands[stage]}\n")[2]  # by this command, not one of another grid
            if cell.result.exists() or re.search(f"^= {stage} .* exit 0$", since, re.MULTILINE):
                continue  # the first: made by another process since we looked
            command, began = cell.commands[stage], time.time()
            if stage == "train" and any((cell.folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
                command = f"python train.py --resume {cell.folder.relative_to(ROOT)}"
            elif stage == "train":
                shutil.rmtree(cell.folder, ignore_errors=True)  # stopped before its first checkpoint
            tag = subprocess.run("git describe --always --dirty", shell=True, cwd=ROOT, capture_output=True, text=True)
            print(f"$ {command}\n= code {tag.stdout.strip()}", file=log, flush=True)
            words = [sys.executable, *(os.path.expandvars(word) for word in shlex.split(command)[1:])]
            code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                                  env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
            print(f"\n= {stage} {time.time() - began:.1f} s, exit {code}", file=log, flush=True)
            if code:
                return f"{stage}.py ended with exit code {code}; see {cell.log.relative_to(ROOT)}"
        if not cell.result.exists():
            cli.write(cell.result, portable(json.dumps(collect(cell, threads), indent=1) + "\n"))
        for part in ("checkpoint", *(() if keep else ("best",))):
            shutil.rmtree(cell.folder / part, ignore_errors=True)
    return None


def collect(cell, threads):
    """What the JSON of a cell holds. attempts: calls of train.py and eval.py, more than 2 if some were stopped."""
    config, metrics = (cli.read_json(cell.folder / name) for name in ("config.json", "metrics.json"))
    log, rows = ([json.loads(line) for line in (cell.folder / name).read_text(encoding="utf-8").split("\n")[:-1]]
                 for name in ("log.jsonl", "predictions.jsonl"))
    codes = dict.fromkeys(re.findall(r"^= code (.+)", logged(cell), re.MULTILINE))  # of each attempt
    times = re.findall(r"^= (\w+) (\S+) s, exit", logged(cell), re.MULTILINE)
    return {
        "arm": cell.arm, "seed": cell.seed, "commands": cell.commands, "settings": config["arguments"],
        "sha256": config["sha256"], "versions": config["versions"] | {"code": ", ".join(codes)},
        "hardware": machine() | {"threads": threads}, "attempts": len(times),
        "seconds": {stage: round(sum(float(seconds) for name, seconds in times if name == stage), 1)
                    for stage in ("train", "eval")},
        "metrics": metrics, "validation": [line for line in log if "val_lm" in line],
        "correct": "".join(str(int(row["exact"])) for row in rows),
    }


def portable(text):
    """The text of a JSON file without this machine's folders."""
    text, folder = text.replace(f"{ROOT}/", ""), os.environ.get("LLMJEPA_SMOLLM2")
    return text.replace(str(Path(folder).resolve()), "$LLMJEPA_SMOLLM2") if folder else text


def run_all(todo, count, keep):
    """Run cells, `count` at a time. Returns how many did not come to their end. A terminal's Ctrl-C reaches the
    trainings too, which stop at a checkpoint; here it only means that no cell is begun."""
    cores, failed = os.cpu_count(), 0
    with ThreadPoolExecutor(count) as pool, tqdm(total=len(todo), unit="cell", smoothing=0) as bar:
        waiting = {pool.submit(run_cell, cell, max(1, cores // count), keep): cell for cell in todo}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1 if sys.stderr.isatty() else 60, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, problem = waiting.pop(future), future.result()
                    failed += problem is not None
                    tqdm.write(f"{cell.name}: {problem or 'done'}")
                bar.update(len(done))
                bar.refresh()
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def main():
    p = cli.parser(__doc__)
    p.add_argument("name", choices=GRIDS, help="the grid")
    p.add_argument("--only", nargs="+", default=[], metavar="ARM", help="only these arms")
    p.add_argument("--jobs", type=cli.whole(1), default=1, help="cells at a time; each gets its share of the cores")
    p.add_argument("--list", action="store_true", help="only say which cells are done, and how they are run")
    args = p.parse_args()
    grid = GRIDS[args.name]
    for arm in args.only:
        if arm not in grid["arms"]:
            raise UserError(f"--only {arm}: {args.name} has the arms {', '.join(grid['arms'])}")
    states = [(cell, state(cell)) for cell in cells(args.name, args.only)]
    if args.list:
        lines = [f"{cell.name:32s} {found:24s} {cell.commands['train']}" for cell, found in states]
        return print("\n".join([grid["about"], *lines]))
    for cell, found in states:
        if found == "done with other commands":
            raise UserError(f"{cell.result}: was made by other commands than the grid's; to run it again, delete it "
                            f"and {cell.log}")
    if "$LLMJEPA_SMOLLM2" in grid["train"] and not Path(os.environ.get("LLMJEPA_SMOLLM2", "")).is_absolute():
        raise UserError("set LLMJEPA_SMOLLM2 to the (absolute) folder of SmolLM2-135M-Instruct, which this grid trains")
    if not (ROOT / grid["source"]).exists():
        raise UserError(f"{grid['source']}: no such file; python datasets/download.py synth fetches it")
    source = (ROOT / grid["source"]).read_bytes().splitlines(keepends=True)
    cli.write(ROOT / RUNS / grid["few"], b"".join(source[: grid["rows"]]).decode())
    failed = run_all([cell for cell, found in states if found != "done"], args.jobs, grid["keep"])
    if failed:
        raise cli.Stopped(f"{failed} cells did not come to their end; the same command goes on with them")
    print(f"python -m experiments.report {args.name}")


if __name__ == "__main__":
    cli.run(main)
