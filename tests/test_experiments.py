"""Sweeps survive what happens to them; tables and pictures come from the committed JSON."""

import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_readme import help_of

import jepa
import train
from evaluation import statistics
from experiments import figures, report, sweep
from support import cli
from support.cli import UserError

REPOSITORY = Path(__file__).parent.parent
TRAIN = """
import json, os, pathlib, signal, sys, time
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
    signals = []
    signal.signal(signal.SIGINT, lambda *_: signals.append(1))
    (out / "ready").touch()
    while not signals:
        time.sleep(0.05)
    time.sleep(0.5)
    (out / "signals").write_text(str(len(signals)))
    sys.exit(130)
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
    grid = {"about": "", "seeds": seeds, "rows": 3, "source": "datasets/synth_train.jsonl", "few": "first-3.jsonl",
            "train": "", "eval": on_eval, "keep": True, "arms": arms}
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
    """And the result names the code of both attempts, where a commit came between them."""
    def commit():
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "more"], cwd=place, check=True)
        named = subprocess.run(["git", "describe", "--always"], cwd=place, capture_output=True, text=True)
        return named.stdout.strip()

    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    toy(monkeypatch, {"a": ""}, on_eval="--die")
    cell, = sweep.cells("toy")
    first = commit()
    assert sweep.run_all([cell], 1, True) == 1
    assert "a-seed0: eval.py ended with exit code 7; see runs/sweep/toy/a-seed0.log" in capsys.readouterr().out
    second = commit()
    assert sweep.run_all([cell], 1, True) == 0 and seen(cell) == ["anew"]
    assert json.loads(cell.result.read_text())["versions"]["code"] == f"{first}, {second}"


def test_what_was_begun_by_other_commands_is_run_again(place, monkeypatch):
    toy(monkeypatch, {"a": "--die"})
    sweep.run_all(sweep.cells("toy"), 1, True)
    toy(monkeypatch, {"a": ""})
    cell, = sweep.cells("toy")
    assert sweep.state(cell) == "not run" and sweep.run_all([cell], 1, True) == 0 and seen(cell) == ["anew"]
    assert sweep.logged(cell).startswith(f"$ {cell.commands['train']}\n") and "--die" not in sweep.logged(cell)


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
        assert sweep.run_cell(cell, 1, True) == "is being run by another process"
    assert sweep.run_all([cell], 1, True) == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_goes_on(place, monkeypatch, how):
    """Ctrl-C, which a terminal sends to all, reaches each training once; what goes on after a kill is not disturbed."""
    grid = toy(monkeypatch, {"a": "--slow", "b": "--slow"})
    (place / "datasets").mkdir()
    shutil.copy(REPOSITORY / "datasets" / "synth_train.jsonl", place / "datasets")
    code = (f"import sys, pathlib; from experiments import sweep; from support import cli; "
            f"sweep.ROOT = pathlib.Path({str(place)!r}); sweep.GRIDS['toy'] = {grid!r}; "
            f"sys.argv = ['sweep', 'toy', '--jobs', '2']; cli.run(sweep.main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    todo = sweep.cells("toy")
    for _ in range(600):
        if all((cell.folder / "ready").exists() for cell in todo):
            break
        time.sleep(0.1)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, said = process.communicate(timeout=30)
    if how != signal.SIGINT:
        assert sweep.run_cell(todo[0], 1, True) == "is being run by another process"
        for cell in todo:
            os.kill(int((cell.folder / "pid").read_text()), signal.SIGKILL)
        time.sleep(0.5)
    else:
        assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
        assert [(cell.folder / "signals").read_text() for cell in todo] == ["1", "1"]
    assert [sweep.state(cell) for cell in todo] == ["begun", "begun"]
    assert sweep.run_all(todo, 2, True) == 0
    assert [seen(cell) for cell in todo] == [["anew", "resumed"]] * 2


def test_what_another_command_made_does_not_count(place, monkeypatch):
    """The grid's evaluation is another now, and the result deleted, as one is told to: it is evaluated again."""
    toy(monkeypatch, {"a": "--lam 0"})
    (cell,) = sweep.cells("toy")
    assert sweep.run_all([cell], 1, True) == 0
    cell.result.unlink()
    toy(monkeypatch, {"a": "--lam 0"}, on_eval="--limit 1")
    (cell,) = sweep.cells("toy")
    assert sweep.run_all([cell], 1, True) == 0
    assert sweep.logged(cell).count("$ python eval.py") == 2 and sweep.logged(cell).count("$ python train.py") == 1
    assert "--limit 1" in json.loads(cell.result.read_text())["commands"]["eval"]


def test_a_grid_trains_on_the_first_rows(place, monkeypatch):
    toy(monkeypatch, {"a": "--lam 0"})
    rows = [f'{{"row": {number}}}\n' for number in range(5)]
    cli.write(place / "datasets/synth_train.jsonl", "".join(rows))
    monkeypatch.setattr(sys, "argv", ["sweep", "toy"])
    sweep.main()
    assert (place / sweep.RUNS / "first-3.jsonl").read_text() == "".join(rows[:3])


@pytest.mark.parametrize("name", sweep.GRIDS)
def test_every_result_is_of_the_first_rows(name):
    grid = sweep.GRIDS[name]
    if not (REPOSITORY / grid["source"]).exists():
        pytest.skip("needs the published data")
    first = b"".join((REPOSITORY / grid["source"]).read_bytes().splitlines(keepends=True)[: grid["rows"]])
    found = {cell["sha256"]["data"] for cells in report.read_grid(name).values() for cell in cells.values()}
    assert found == {hashlib.sha256(first).hexdigest()} and str(grid["rows"]) in grid["few"]


# ---- tables and pictures


def cell(arm, seed, correct):
    """What sweep writes of a cell, with made-up figures."""
    rates = {name: {"value": sum(map(int, correct)) / len(correct)} for name in ("exact", "same_language", "stopped")}
    found = {"n": len(correct), "cosine_aligned": 0.5, "cosine_shuffled": 0.25, "retrieval_at_1_text_to_code": 0.125}
    wrong = {"stopped too early": 1, "cut off by the budget": 2, "ran on": 3, "other": 4}
    return {"arm": arm, "seed": seed, "correct": correct, "versions": {"code": "abc"},
            "validation": [{"val_lm": 0.125, "val_exact": 0.4}, {"val_lm": 0.25, "val_exact": 0.5}],
            "metrics": {"rates": rates, "representation": found, "wrong": wrong},
            "seconds": {"train": 3600.0, "eval": 1800.0}, "hardware": {"gpu": None, "processor": "a CPU", "threads": 1}}


@pytest.fixture
def rough():
    """Pictures as they are shown, unlike in other tests."""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A grid with four arms, three of which were run with two seeds."""
    toy(monkeypatch, {"lam0": "--lam 0", "better": "", "same": "", "never": ""}, seeds=3)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for made in (cell("lam0", 0, "1100000000"), cell("lam0", 1, "1110000000"), cell("better", 0, "1111111111"),
                 cell("better", 1, "1111111100"), cell("same", 0, "1100000000"), cell("same", 1, "1110000000")):
        cli.write_json(tmp_path / report.RESULTS / "toy" / f"{made['arm']}-seed{made['seed']}.json", made)
    return tmp_path


def test_the_table_of_a_grid(results):
    about, _, head, _, *rows, _, not_run, _, picture = report.grid_table("toy")
    rows = {row[0]: row[1:] for row in ([part.strip() for part in line.split("|")[1:-1]] for line in rows)}
    head = [part.strip() for part in head.split("|")[2:-1]]
    assert about == ("`python -m experiments.sweep toy`: 6 of 12 cells, 9.0 hours in all, threads each: 1; a CPU; "
                     "code abc.")
    assert picture == "![toy: exact match against retrieval@1](results/toy.png)"
    better = dict(zip(head, rows["better"], strict=True))
    half = 12.706 * math.sqrt(2) * 0.1 / math.sqrt(2)  # of 1.0 and 0.8: Student's t for two values
    assert better["exact match"] == f"90.00% ± {half:.2%}" and better["seeds"] == "2"
    assert better["minus lam 0 (points)"] == f"+65.00 ± {100 * 12.706 * 0.15:.2f}"
    assert better["retrieval@1"] == "12.5% ± 0.0%" and better["cosine of pairs / shuffled"] == "0.500 / 0.250"
    _, p = report.compare(report.read_grid("toy")["better"], report.read_grid("toy")["lam0"])
    assert better["p"] == f"{2 * p:.2g}" and rows["same"][head.index("p")] == "1"  # Holm: the smaller of two p values
    assert better["wrong: stopped too early / cut off by the budget / ran on / other"] == "1 / 2 / 3 / 4"
    assert better["prefix match"] == "-"
    assert better["recall@10"] == "-" and better["candidates"] == "10"
    assert rows["lam0"][head.index("p")] == "-" and "never" not in rows and not_run == (
        "Not run: of lam0, better, same seeds 2; of never seeds 0, 1, 2.")
    assert better["validation loss"] == "0.2500"
    cli.write_json(results / report.RESULTS / "toy" / "gone-seed0.json", cell("gone", 0, "1100000000"))
    assert any(line.startswith("| gone ") for line in report.grid_table("toy")), "no longer in the grid, but not hidden"


def test_a_grid_that_was_not_run_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    toy(monkeypatch, {"lam0": "", "a": ""}, seeds=3)
    assert report.grid_table("toy") == ["`python -m experiments.sweep toy`: not run. 3 seeds of lam0, a."]


def test_the_p_value_is_that_of_the_rows(results):
    """For one seed it is McNemar's, but for what is drawn at random; rows that both get right count for nothing."""
    one, other = "1" * 12 + "0" * 8, "1" * 6 + "0" * 13 + "1"
    differences, p = report.compare({0: cell("a", 0, one)}, {0: cell("lam0", 0, other)})
    assert differences == [pytest.approx(0.25)]
    assert p == pytest.approx(statistics.mcnemar([int(c) for c in one], [int(c) for c in other]), abs=0.003)
    assert report.flip_test([0.0] * 5) == 1.0
    assert report.flip_test([0.5] * 30 + [0.0] * 100) < 1e-4 < 0.5 < report.flip_test([0.5, -0.5, 0.5, -0.5, 1.0])


def test_seeds_that_only_one_arm_has_are_not_compared():
    arm = {0: cell("a", 0, "11"), 1: cell("a", 1, "11")}
    differences, _ = report.compare(arm, {1: cell("lam0", 1, "00"), 2: cell("lam0", 2, "11")})
    assert differences == [1.0]


def test_holm():
    """The example of Holm's rule: p times what is left, never less than the one before, at most 1."""
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.6, 0.7]) == [1.0, 1.0] and report.holm([]) == []


def test_every_arm_has_a_base():
    for grid in report.GRIDS.values():
        for arm in grid["arms"]:
            base = report.base_of(arm, grid["arms"])
            assert base.endswith("lam0") and "--lam 0" in grid["arms"][base].split("--k")[0]
    assert report.base_of("official-1e-4-infonce", report.GRIDS["pretrained"]["arms"]) == "official-1e-4-lam0"


def test_the_flags_of_every_grid_exist():
    """Each training of each grid is one that train.py accepts."""
    for name, grid in sweep.GRIDS.items():
        for made in sweep.cells(name):
            words = shlex.split(made.commands["train"].replace("$LLMJEPA_SMOLLM2", "folder"))[2:]
            args = train.check(train.FLAGS.parse_args(words))
            assert args.seed == made.seed and args.out.name == made.name
        assert grid["rows"] <= 8000 and grid["about"]


def test_what_stands_between_the_marks_is_replaced():
    text = "before\n<!-- toy -->\nold\n<!-- end -->\nbetween\n<!-- other -->\nkept\n<!-- end -->\n"
    assert report.fill(text, "toy", ["a", "b"]) == text.replace("old", "a\nb")
    with pytest.raises(UserError, match="write <!-- no -->"):
        report.fill(text, "no", [])


def test_the_readme_is_what_the_committed_results_say():
    """Rebuild every table of experiments/README.md from the JSON beside it."""
    text = report.README.read_text(encoding="utf-8")
    names = re.findall(r"<!-- (?!end)(\S+) -->", text)
    assert set(report.GRIDS) <= set(names), "every grid has its section, run or not"
    kept = {path.stem for path in (report.ROOT / report.RESULTS).glob("*.json")}
    assert kept <= set(names), "every file of results is shown"
    assert all((report.README.parent / picture).exists() for picture in re.findall(r"!\[.*?\]\((.*?)\)", text))
    for name in names:
        assert report.fill(text, name, report.section(name)) == text, f"run python -m experiments.report {name}"


def test_the_main_readme_shows_the_committed_results():
    rows = {"`--lam 0`": "lam0", "`--lam 2 --k 1`, the paper's method": "cosine-k1",
            "the same with wrong pairs (`--shuffle_pairs`)": "cosine-k1-shuffled",
            "`--lam 0.05 --k 1 --distance infonce`": "infonce-0.05"}
    text, found = (REPOSITORY / "README.md").read_text(encoding="utf-8"), report.read_grid("synth-8000")
    for label, arm in rows.items():
        mean, shares = (lambda name, arm=arm: report.average(found[arm], name, "{:.2f}")), found[arm].values()
        exact = [100 * report.value(cell, "exact") for cell in shares]
        found_first = 100 * sum(report.value(cell, "retrieval_at_1_text_to_code") for cell in shares) / len(shares)
        row = (f"| {label} | {sum(exact) / len(exact):.2f} % ({', '.join(f'{share:.2f}' for share in exact)}) | "
               f"{mean('cosine_aligned')} / {mean('cosine_shuffled')} | {found_first:.1f} % |")
        assert row in text, row


def test_no_result_names_a_folder_of_a_machine():
    for path in (report.ROOT / report.RESULTS).rglob("*.json"):
        assert not re.search(r'"/|[ =]/(home|root|work|tmp|Users)/', path.read_text(encoding="utf-8")), path


def test_the_picture_of_a_grid(results, monkeypatch):
    """Across: retrieval@1; upwards: exact match; a point for each seed of an arm, and one for their mean."""
    report.draw_grid("toy", results / "toy.png")
    assert (results / "toy.png").stat().st_size > 5000
    figures = []
    monkeypatch.setattr(report.plots, "save", lambda figure, path: figures.append(figure))
    report.draw_grid("toy", results / "toy.png")
    seeds, mean, *others = [drawn.get_offsets().tolist() for drawn in figures[0].axes[0].collections]
    assert seeds == [[12.5, 20.0], [12.5, 30.0]] and mean == [[12.5, 25.0]] and len(others) == 4


def test_the_picture_of_a_claim(results, monkeypatch):
    """A panel for each metric, a line for each arm: a point for each seed, one for the mean with its interval. The line
    of an arm that was not run is empty."""
    claim = {"title": "Does it help?", "arms": {"toy/lam0": "plain", "toy/better": "with", "toy/never": "not yet"},
             "metrics": {"exact": "right (%)", "gain": "more than plain (points)", "cosine_shuffled": "cosine"}}
    monkeypatch.setitem(report.CLAIMS, "toy", claim)
    report.draw_claim("toy", results / "claim.png")
    assert (results / "claim.png").stat().st_size > 5000
    drawn = []
    monkeypatch.setattr(report.plots, "save", lambda figure, path: drawn.append(figure))
    report.draw_claim("toy", results / "claim.png")
    wanted = [[[20, 30], [100, 80]], [[0, 0], [80, 50]], [[0.25, 0.25], [0.25, 0.25]]]
    for axis, by_arm in zip(drawn[0].axes, wanted, strict=True):
        seeds = [line for line in axis.lines if line.get_markersize() == 3]
        assert len(seeds) == 2
        for number, (line, values) in enumerate(zip(seeds, by_arm, strict=True)):
            assert list(line.get_xdata()) == pytest.approx(values) and set(line.get_ydata()) == {number}
            middle, _, (interval,) = axis.containers[number]
            assert middle.get_xdata() == [pytest.approx(sum(values) / 2)] and middle.get_ydata() == [number]
            (low, _), (high, _) = interval.get_segments()[0]
            assert high - low == pytest.approx(12.706 * abs(values[0] - values[1]), rel=1e-3)
    first = drawn[0].axes[0]
    assert drawn[0].get_suptitle() == "Does it help?" and first.yaxis_inverted()
    assert [label.get_text() for label in first.get_yticklabels()] == ["plain", "with", "not yet"]


def test_claims_are_drawn_from_arms_that_exist():
    page = report.README.read_text(encoding="utf-8")
    for name, claim in report.CLAIMS.items():
        assert f"(results/claim-{name}.png" in page or f'"results/claim-{name}.png"' in page
        for grid, arm in (arm.split("/") for arm in claim["arms"]):
            assert len(report.read_grid(grid)[arm]) > 0, f"{grid}/{arm}"


def test_the_mask_picture_is_the_committed_one():
    """It is made of jepa.mask: as many filled cells as there are pairs that may see each other, and valid XML."""
    picture = figures.mask_svg()
    assert picture == figures.MASK.read_text(encoding="utf-8")
    tokens, batch = figures.toy_row()
    allowed = jepa.mask(batch.segment)[0]
    cells = [box for box in ElementTree.fromstring(picture).iter() if box.get("width") == str(figures.SIDE - 2)]
    assert len(cells) == len(tokens) ** 2
    for box, sees in zip(cells, allowed.flatten().tolist(), strict=True):
        assert (box.get("fill") != "#eef1f4") == sees


# ---- commands


def test_the_list_says_how_far_each_cell_is(place, monkeypatch, capsys):
    toy(monkeypatch, {"a": "--lam 0", "b": "--die"})
    todo = sweep.cells("toy")
    sweep.run_all(todo, 1, True)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["sweep", "toy", "--list"])
    sweep.main()
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [["a-seed0", "done"], ["b-seed0", "begun"]]
    assert lines[0][2] == todo[0].commands["train"]


@pytest.mark.parametrize("words, said", [
    (["toy", "--only", "c"], "--only c: toy has the arms a, b"), (["toy", "--jobs", "0"], "at least 1"),
    (["none"], "invalid choice: 'none'"), (["smol"], "set LLMJEPA_SMOLLM2"),
])
def test_what_cannot_be_swept_is_said_in_one_line(place, monkeypatch, words, said):
    toy(monkeypatch, {"a": "", "b": ""})
    monkeypatch.setitem(sweep.GRIDS, "smol", sweep.GRIDS["toy"] | {"train": "--init $LLMJEPA_SMOLLM2"})
    monkeypatch.delenv("LLMJEPA_SMOLLM2", raising=False)
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(UserError, match=re.escape(said)):
        sweep.main()


@pytest.mark.parametrize("module", ["bench", "peers", "sweep", "report", "figures"])
def test_the_commands_of_the_readme_exist(module):
    help_text = help_of(f"experiments.{module}")
    assert f"python -m experiments.{module} " in help_text, "an example, as one would type it"
    commands = re.findall(rf"`python\s+-m\s+experiments\.{module}\b([^`]*)`", report.README.read_text(encoding="utf-8"))
    assert commands or module == "figures"
    for flag in re.findall(r"(--\w+)", " ".join(commands)):
        assert re.search(rf"{flag}\b", help_text), flag
