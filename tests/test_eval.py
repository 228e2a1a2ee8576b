"""The command that evaluates: metrics recomputed here, interruptions, comparisons, other systems' outputs, mistakes."""

import io
import json
import os
import pty
import select
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import SMALL, inside, toy_rows

import data
import eval as eval_script
import hf
from evaluation import answers, ask, generate, regexes, report, statistics, tasks
from hf import lora, runs
from jepa import mask
from support import cli, processes

ROOT = Path(__file__).parent.parent
ORACLE = Path(__file__).parent / "oracle/model"


def call(*flags):
    before, sys.argv = sys.argv, ["eval.py", *map(str, flags)]
    try:
        eval_script.main()
    finally:
        sys.argv = before


@pytest.fixture
def refused(capsys):
    """Calls eval.py as the command does, and returns the line of its error."""

    def run(*flags):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: call(*flags))
        message = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and message.startswith("error: ")
        return message

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return toy_rows(tmp_path_factory.mktemp("rows") / "synth_toy.jsonl", 30, seed=3)


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """Two runs: one that has learnt nothing yet, and one that knows half of the rows and finds Codes by Text."""
    folder = tmp_path_factory.mktemp("runs")
    often = folder / "often.jsonl"  # an epoch ends with a checkpoint and a picture: ten times the rows, few epochs
    often.write_text(rows.read_text() * 10)
    inside("--out", folder / "a", "--data", rows, *SMALL)
    inside("--out", folder / "b", "--data", often, *SMALL, "--epochs", "4", "--lr", "1e-2", "--seed", "1",
           "--lam", "0.3", "--distance", "infonce")
    return folder / "a", folder / "b"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cells(text, column=2):
    """{label: cell of a column} of the Markdown table in a text."""
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[1].strip(): row[column].strip() for row in rows}


def chat(user, answer):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


# ---- one model


def test_metrics_are_those_of_the_predictions(trained, rows, capsys):
    run = trained[1]
    call(run, "--data", rows, "--max_new_tokens", "12")
    predictions, found, shown = lines(run / "predictions.jsonl"), metrics(run), capsys.readouterr().out
    golds = [json.loads(line)["messages"][-1]["content"] for line in rows.read_text().splitlines()]
    assert [p["gold"] for p in predictions] == golds and [p["row"] for p in predictions] == list(range(1, 31))
    exact = sum(p["output"] == gold for p, gold in zip(predictions, golds, strict=True))
    assert found["rates"]["exact"]["value"] == exact / 30 > 0.2
    assert (found["rates"]["exact"]["low"], found["rates"]["exact"]["high"]) == statistics.wilson(exact, 30)
    prefix = sum(p["output"].startswith(gold) for p, gold in zip(predictions, golds, strict=True))
    assert found["rates"]["prefix"]["value"] == prefix / 30
    assert found["rates"]["stopped"]["value"] == sum(p["stopped"] for p in predictions) / 30
    assert sum(found["wrong"].values()) == 30 - exact and "same_language" in found["rates"]
    assert found["representation"]["n"] == 30 and found["verdict"] in shown
    assert found["representation"]["different_codes"] == len(set(golds)) < 30
    assert f"{exact / 30:.2%}" in shown and "task: exact (guessed" in shown
    for name in ("tsne.png", "spectrum.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", ["reverse", "front_pred"])
def test_encodings_are_laid_out_as_in_training(rows, tmp_path, monkeypatch, variant):
    """A run in the paper layout: its Text has no system turn, and so the figures are those of that view."""
    told, own = [], eval_script.encodings.verdict
    monkeypatch.setattr(eval_script.encodings, "verdict", lambda figures, reverse=False: told.append(reverse) or own(
        figures, reverse))
    inside("--out", tmp_path / "run", "--data", rows, *SMALL, "--layout", "paper", f"--{variant}", "--max_steps", "2")
    call(tmp_path / "run", "--data", rows, "--max_new_tokens", "1")
    model, tokenizer = runs.load_model(tmp_path / "run/best").eval(), hf.tokenizer("synth")
    examples = [data.example(c, tokenizer) for c in data.read(rows)]
    with torch.no_grad():
        batch = data.collate(examples, 1, layout="paper", **{variant: True})
        text, code = model.encodings(model.hidden(batch), batch)
    call(tmp_path / "run/best", "--data", rows, "--max_new_tokens", "1", "--out", tmp_path / "best")
    other = Path(shutil.copytree(tmp_path / "run/best", tmp_path / "run/other"))
    assert runs.open_model(other, "cpu", "synth").layout == {}, "a folder that happens to lie there is not the run's"
    for folder in ("run", "best"):  # the weights do not say how they were trained, but the run does
        found = metrics(tmp_path / folder)["representation"]["cosine_aligned"]
        assert found == pytest.approx(torch.cosine_similarity(text, code).mean().item(), abs=1e-4)
    assert told == [variant == "reverse"] * 2, "the verdict knows which view predicts"


def test_the_batch_size_changes_nothing(trained, rows, tmp_path):
    for size in ("1", "7"):
        call(trained[1], "--data", rows, "--batch_size", size, "--out", tmp_path / size, "--max_new_tokens", "12")
    assert lines(tmp_path / "1/predictions.jsonl") == lines(tmp_path / "7/predictions.jsonl")


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "5"]])
def test_an_interrupted_evaluation_goes_on_and_a_finished_one_is_kept(trained, rows, tmp_path, monkeypatch, sampling):
    flags = [trained[1], "--data", rows, "--batch_size", "4", "--max_new_tokens", "12", *sampling, "--out"]
    call(*flags, tmp_path / "straight")
    whole, calls = generate.decode, []

    def breaks(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        yield from whole(*args, **options)

    monkeypatch.setattr(generate, "decode", breaks)
    with pytest.raises(KeyboardInterrupt):
        call(*flags, tmp_path / "stopped")
    kept, = (tmp_path / "stopped").glob("answers-*.jsonl")
    assert len(lines(kept)) == 1 + 12  # the header, and three batches
    with open(kept, "a") as file:
        file.write('{"row": 30, "outp')  # and half a line
    calls[:] = [0, 0, 0, 0]
    call(*flags, tmp_path / "stopped", "--limit", "9", "--top_p", "0.9", "--temperature", "2")
    assert sum(calls) == 9, "another way of answering takes nothing from there, nor does it cost what is there"
    calls[:] = [0, 0, 0, 0]
    call(*flags, tmp_path / "stopped")
    assert sum(calls) == 18, "rows that were answered must not be answered again"
    assert lines(tmp_path / "stopped/predictions.jsonl") == lines(tmp_path / "straight/predictions.jsonl")
    call(*flags, tmp_path / "stopped")
    assert sum(calls) == 18, "nor those of a finished evaluation"
    call(*flags, tmp_path / "stopped", "--max_new_tokens", "3")
    assert sum(calls) == 18 + 30, "other settings, other answers"
    call(*flags, tmp_path / "stopped", "--temperature", "1", "--seed", "6", "--max_new_tokens", "3")
    assert sum(calls) == 18 + 60, "another seed, other samples"


def test_the_best_weights_are_evaluated_or_else_the_last(trained, rows, tmp_path):
    run = Path(shutil.copytree(trained[1], tmp_path / "run"))
    shutil.rmtree(run / "best")
    shutil.copytree(trained[0] / "best", run / "best")
    for source in ("best", "best.old", "checkpoint"):  # best.old: where a crash came between two renames
        if source == "best.old":
            shutil.copytree(trained[0] / "best", run / "best.old")
        call(run, "--data", rows, "--max_new_tokens", "1")
        assert runs.digest(*runs.model_files(run / source))[:16] in metrics(run)["weights"]
        shutil.rmtree(run / source)


def test_damaged_answers_are_told_of(trained, rows, tmp_path, refused):
    call(trained[0], "--data", rows, "--max_new_tokens", "2", "--out", tmp_path)
    path, = tmp_path.glob("answers-*.jsonl")
    kept = path.read_text().split("\n")
    for line in ("half", '{"row": 1}', '{"row": 1, "output": null}', "[]", "\udce9", '{"row": [1], "output": "a"}',
                 '{"row": true, "output": "a"}', '{"row": 1, "output": "a", "stopped": 3}', "[" * 100_000, "\0"):
        path.write_text("\n".join([kept[0], line, *kept[2:]]), errors="surrogateescape")
        again = trained[0], "--data", rows, "--max_new_tokens", "2", "--out", tmp_path
        assert f"{path.name}: is damaged" in refused(*again)


def test_rows_that_do_not_fit_are_refused_or_skipped_and_keep_their_numbers(trained, rows, tmp_path, refused):
    long = chat("a " * 600, "A")
    mixed = write(tmp_path / "mixed.jsonl", long, *lines(rows)[:5], long, *lines(rows)[5:7])
    flags = [trained[1], "--data", mixed, "--max_new_tokens", "12", "--out", tmp_path / "out"]
    assert "mixed.jsonl:1: needs" in refused(*flags)
    call(*flags, "--too_long", "skip", "--temperature", "1")
    assert metrics(tmp_path / "out")["n"] == 7
    call(*flags, "--too_long", "skip", "--limit", "6")
    assert metrics(tmp_path / "out")["n"] == 5, "--limit counts the rows of the file"
    call(*flags, "--too_long", "skip", "--temperature", "1")
    skipped = lines(tmp_path / "out/predictions.jsonl")
    assert [row["row"] for row in skipped] == [2, 3, 4, 5, 6, 8, 9]
    call(trained[1], "--data", write(tmp_path / "same.jsonl", *([lines(rows)[0]] * 2), *lines(rows)[1:4]),
         "--max_new_tokens", "12", "--temperature", "1", "--out", tmp_path / "other")
    by_row = {row["row"]: row["output"] for row in lines(tmp_path / "other/predictions.jsonl")}
    assert by_row[2] == skipped[0]["output"], "a sample depends on the row's number, not on what was skipped"
    call("--predictions", tmp_path / "out/predictions.jsonl", "--data", mixed, "--out", tmp_path / "m.json")
    again, found = json.loads((tmp_path / "m.json").read_text()), metrics(tmp_path / "out")
    assert again["n"] == 7 and again["rates"] == found["rates"], "outputs belong to the rows that they name"


def test_a_limit_asks_nothing_of_later_rows(trained, rows, tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", *lines(rows)[:5], chat("a " * 600, "A"))
    call(trained[1], "--data", mixed, "--max_new_tokens", "2", "--limit", "5", "--out", tmp_path / "out")
    assert metrics(tmp_path / "out")["n"] == 5


def test_an_untouched_hugging_face_model(rows, tmp_path, refused):
    call(ORACLE, "--data", rows, "--limit", "6", "--max_new_tokens", "4", "--out", tmp_path / "base")
    found = metrics(tmp_path / "base")
    assert found["n"] == 6
    figures = found["representation"]
    assert figures["effective_rank_text"] == figures["effective_rank_pred"], "without [PRED], Pred is the identity"
    assert "--out" in refused(ORACLE, "--data", rows)


def test_before_and_after(trained, rows, tmp_path, capsys):
    """--base gives the figures that the base model gets when it is evaluated itself."""
    call(trained[0], "--data", rows, "--max_new_tokens", "1", "--out", tmp_path / "base")
    call(trained[1], "--data", rows, "--max_new_tokens", "1", "--out", tmp_path / "run", "--base", trained[0])
    found, base = metrics(tmp_path / "run"), metrics(tmp_path / "base")
    assert found["representation_before"] == base["representation"] != found["representation"]
    shown = cells(capsys.readouterr().out)
    assert shown["effective rank, Enc(Code)"] == f"{found['representation']['effective_rank_code']:.4f}"
    assert shown["effective rank, Enc(Code): before"] == f"{base['representation']['effective_rank_code']:.4f}"
    assert shown["candidates for retrieval"] == "30" and "recall@10, Text to Code" in shown


def test_a_base_without_pred_is_encoded_as_the_run_is(rows, tmp_path):
    """In the paper layout, without the system turn, as here: the base is the run itself, as a Hugging Face folder."""
    inside("--out", tmp_path / "run", "--data", rows, *SMALL, "--layout", "paper", "--max_steps", "1")
    base = Path(shutil.copytree(tmp_path / "run/best", tmp_path / "base"))
    (base / "pred.safetensors").unlink()
    few = ["--data", rows, "--limit", "6", "--max_new_tokens", "1"]
    call(tmp_path / "run", *few, "--base", base, "--tokenizer", "synth")
    after, before = (metrics(tmp_path / "run")[name] for name in ("representation", "representation_before"))
    assert before["effective_rank_text"] == pytest.approx(after["effective_rank_text"], abs=1e-4)


def test_letters_are_asked_for_with_the_system_turn(monkeypatch):
    asked, system = [], {"role": "system", "content": "S"}
    monkeypatch.setattr(answers, "likelihoods", lambda opened, messages, choices, **how: asked.append(messages) or [
        0.0] * len(choices))
    turns = [system, *chat("q\nA) a\nB) b", "A")["messages"]]
    list(answers.likeliest(None, None, [data.Conversation(turns, "x:1")], [None]))
    assert asked == [turns[:2], chat("q", "")["messages"][:1]]


def test_gold_answers_beyond_the_budget_are_told_of(trained, rows, tmp_path, capsys):
    call(trained[0], "--data", rows, "--max_new_tokens", "2", "--out", tmp_path)
    assert "warning: 30 gold answers are longer than --max_new_tokens 2" in capsys.readouterr().err
    call(trained[0], "--data", rows, "--max_new_tokens", "5", "--out", tmp_path)  # as many as "A B C" has
    assert "warning" not in capsys.readouterr().err


def test_hellaswag_takes_the_likeliest_letter_and_ending(trained, tmp_path):
    """Against one plain forward pass for each letter and ending."""
    endings = ["a b c", "h g", "d e f a", "c"]
    users = ["the ring\n" + "\n".join(f"{letter}) {endings[(i + j) % 4]}" for j, letter in enumerate("ABCD"))
             for i in range(4)]
    data_file = write(tmp_path / "hellaswag_x.jsonl", *(chat(user, "B") for user in users))
    call(trained[1], "--data", data_file, "--out", tmp_path / "out")
    found, rows = metrics(tmp_path / "out"), lines(tmp_path / "out/predictions.jsonl")
    model, tokenizer = runs.load_model(trained[1] / "best").eval(), hf.tokenizer("synth")

    def likelihood(user, answer):
        prompt = [i for piece in tokenizer.chat([{"role": "user", "content": user}]) for i in piece.ids]
        header = tokenizer.chat([{"role": "assistant", "content": answer}])[0].ids
        ids = torch.tensor([prompt + header + tokenizer.encode(answer)])
        with torch.no_grad():
            hidden = model.decoder.hidden(ids, mask(torch.zeros_like(ids)), torch.arange(ids.shape[1])[None])
            logits = model.decoder.logits(hidden)[0].log_softmax(-1)
        first = len(prompt) + len(header)
        return logits[range(first - 1, ids.shape[1] - 1), ids[0, first:]].mean().item()

    for i, row in enumerate(rows):
        assert row["output"] == max("ABCD", key=lambda letter: likelihood(users[i], letter))
        best = max(range(4), key=lambda j: likelihood("the ring", endings[(i + j) % 4]))
        assert row["ending_letter"] == "ABCD"[best]
    assert found["rates"]["hellaswag"]["value"] == sum(row["output"] == "B" for row in rows) / 4
    assert found["rates"]["ending"]["value"] == 0.25 and "stopped" not in found["rates"]


# ---- several models


def test_comparison_and_report(trained, rows, tmp_path, capsys):
    with open(trained[0] / "log.jsonl", "a") as file:
        file.write('{"step": 3, "l')  # as of a run that goes on
    call(*trained, "--data", rows, "--max_new_tokens", "12", "--out", tmp_path, "--report", tmp_path / "r/a b.md",
         "--base", trained[0])
    shown, written = capsys.readouterr().out, (tmp_path / "r/a b.md").read_text()
    a, b = (lines(tmp_path / name / "predictions.jsonl") for name in "ab")
    ours, theirs = [row["exact"] for row in b], [row["exact"] for row in a]
    middle, low, high = statistics.paired_bootstrap(ours, theirs, 0)
    assert middle > 0.2 and f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]" in written
    assert f"{statistics.mcnemar(ours, theirs):.3g}" in written and "stopped too early" in written
    assert all(line in shown for line in written.splitlines() if line.startswith("| "))
    pictures = [line.split("](<")[1][:-2] for line in written.splitlines() if line.startswith("![")]
    assert len(pictures) == 4 and all((tmp_path / "r" / name).exists() for name in pictures)
    assert metrics(tmp_path / "b")["representation"]["retrieval_at_10_text_to_code"] > 0.5
    assert "a b-curves.png" in pictures and "a b-spectrum.png" in pictures
    rank = "effective_rank_code"
    before, after = (metrics(tmp_path / "b")[part][rank] for part in ("representation_before", "representation"))
    second = cells(written, column=3)
    assert second["effective rank, Enc(Code)"] == f"{after:.4f}" != second["effective rank, Enc(Code): before"]
    assert second["effective rank, Enc(Code): before"] == f"{before:.4f}" and second["rows"] == "30"


def test_a_log_that_is_no_runs_does_not_end_a_comparison(trained, rows, tmp_path):
    model = Path(shutil.copytree(ORACLE, tmp_path / "model"))
    (model / "log.jsonl").write_text("")
    call(model, trained[0], "--data", rows, "--limit", "5", "--max_new_tokens", "2", "--out", tmp_path / "out")
    assert (tmp_path / "out/comparison-curves.png").exists()  # of the run alone


def test_models_of_one_name_do_not_overwrite_each_other(trained, rows, tmp_path, refused):
    folders = [run / "best" for run in trained]
    flags = ["--data", rows, "--limit", "5", "--max_new_tokens", "2", "--tokenizer", "synth", "--out", tmp_path]
    call(*folders, *flags)
    assert metrics(tmp_path / "a-best")["weights"] != metrics(tmp_path / "b-best")["weights"]
    assert (tmp_path / "comparison.md").exists() and "| a-best" in (tmp_path / "comparison.md").read_text()
    assert "twice" in refused(trained[0], trained[0], *flags)
    assert ".: is a folder" in refused(*folders, *flags, "--report", ".")


def test_systems_that_skipped_different_rows_are_paired_by_row():
    def result(name, found):
        rows = [{"row": number, "exact": exact, "wrong_because": None if exact else "other"} for number, exact in found]
        return report.Evaluated(name, rows)

    one, two = result("one", [(1, True), (2, False), (3, True)]), result("two", [(2, True), (3, True), (4, False)])
    middle, low, high = statistics.paired_bootstrap([1, 1], [0, 1], 0)
    found = report.difference(two, one, "exact", 0)
    assert found == (f"{middle:+.2%} [{low:+.2%}, {high:+.2%}], 2 rows", "1")
    assert report.difference(result("none", [(9, True)]), one, "exact", 0) == ("-", "-")
    table = report.table([one, two], "exact", 0)
    assert cells("\n".join(table), 2)["wrong: other"] == "1" == cells("\n".join(table), 3)["wrong: other"]
    assert len({line.count("|") for line in table}) == 1


def test_why_outputs_are_wrong():
    cases = {("a", "ab", True): "stopped too early", ("", "ab", None): "stopped too early",
             ("a", "ab", False): "cut off by the budget", ("abc", "ab", False): "ran on", ("b", "ab", True): "other"}
    assert {case: tasks.why(*case) for case in cases} == cases


def test_an_output_that_is_right_has_no_reason_to_be_wrong(tmp_path):
    """Whether it is wrong is for the task to say: a right label may go on, a right name be part of the gold text."""
    for name, gold, outputs in (("yelp_x", "Good", ["Good. I liked it", "Goo"]), ("nq_open_x", "a b; b", ["b", "a c"])):
        golds = write(tmp_path / f"{name}.jsonl", chat("q", gold), chat("q", gold))
        answers = write(tmp_path / "out.jsonl", *({"output": output} for output in outputs))
        call("--predictions", answers, "--data", golds, "--out", tmp_path / "m.json")
        assert sum(json.loads((tmp_path / "m.json").read_text())["wrong"].values()) == 1


def test_a_name_with_a_bar_does_not_break_the_table():
    assert report.markdown([["", "a|b"], ["x", "1"]]) == ["|   | a\\|b |", "|---|------|", "| x | 1    |"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    cli.write(tmp_path / "new/file", "old")
    with pytest.raises(KeyboardInterrupt), cli.writing(tmp_path / "new/file") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(cli.UserError, match="new: is a folder"):
        cli.write(tmp_path / "new", "text")
    with pytest.raises(cli.UserError, match="choose a place"), cli.writing(tmp_path / "new/file") as unfinished:
        unfinished.write_text("half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new/file").read_text() == "old"


# ---- other systems' outputs


def test_other_systems_outputs(tmp_path, refused, capsys):
    golds = write(tmp_path / "gsm8k_x.jsonl", chat("1 + 1", "two #### 2"), chat("2", "#### 1,000"), chat("3", "#### 3"))
    out = tmp_path / "out.jsonl"
    write(out, {"output": "#### 2 ok"}, {"output": "it is 5 #### $1000"}, {"output": ""})
    call("--predictions", out, "--data", golds, "--out", tmp_path / "new/m.json")
    found = json.loads((tmp_path / "new/m.json").read_text())
    assert found["task"] == "gsm8k" and found["rates"]["gsm8k"]["value"] == pytest.approx(2 / 3)
    assert "task: gsm8k" in capsys.readouterr().out and "stopped" not in found["rates"]
    flags = ["--predictions", out, "--data", golds]
    write(out, {"output": "a"}, {"text": "b"}, {"output": "c"})
    assert "out.jsonl:2:" in refused(*flags)
    out.write_text('{"output": "a"}\n{"output": "b"\n{"output": "c"}\n')
    assert "out.jsonl:2:" in refused(*flags)
    write(out, {"output": "a"})
    assert f"out.jsonl:2: the file ends, with no output for {golds}:2" in refused(*flags)
    write(out, *[{"output": "a"}] * 4)
    assert "out.jsonl:4: --data has only 3 rows" in refused(*flags)
    write(out, {"row": 3, "output": "#### 3"}, {"row": 1, "output": "#### 3"})
    call(*flags, "--out", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["n"] == 2 and found["rates"]["gsm8k"]["value"] == 0.5
    assert "out.jsonl answers 2 of 3 rows" in capsys.readouterr().err
    write(out, {"row": 3, "output": "a"}, {"row": 3, "output": "b"})
    assert "out.jsonl:2: is another output for row 3" in refused(*flags)
    for odd in ("[" * 100_000, '{"output": {}}', "[1]", "\0", '{"output": "a"'):
        out.write_text('{"output": "a"}\n' + odd + "\n")
        assert "out.jsonl:2: must be" in refused(*flags)
    write(out, {"output": "\ud800 #### 2"}, {"output": "\0"}, {"output": "####" * 10_000})
    call(*flags, "--out", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["rates"]["gsm8k"]["value"] == pytest.approx(1 / 3)
    for row in (4, 0, "1", [1], None, True, 1.0):
        write(out, {"row": 3, "output": "a"}, {"row": row, "output": "b"})
        assert f"out.jsonl:2: --data has no row {row}" in refused(*flags)
    out.write_text("\n")
    assert "out.jsonl: is empty" in refused(*flags)
    assert "x.jsonl:1: cannot be scored, left out: the gold answer has no number after ####; nor can any" in refused(
        "--predictions", write(out, *[{"output": "a"}] * 3), "--task", "gsm8k",
        "--data", write(tmp_path / "x.jsonl", *[chat("q", "no number")] * 3))
    write(out, *[{"output": "a"}] * 3)
    for place in (tmp_path, tmp_path / "out.jsonl/m.json"):
        before = set(tmp_path.iterdir())
        assert str(place) in refused(*flags, "--out", place)
        assert set(tmp_path.iterdir()) == before, "nothing is left behind"
    assert "nowhere" in refused("--predictions", tmp_path / "nowhere", "--data", golds)


def test_exact_prefix_and_contains_differ(tmp_path):
    golds = write(tmp_path / "x.jsonl", *(chat("q", "ab") for _ in range(4)))
    outputs = write(tmp_path / "out.jsonl", *({"output": o} for o in ("ab", "abc", "xab", "a")))
    call("--predictions", outputs, "--data", golds, "--out", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())["rates"]
    assert {name: rate["value"] for name, rate in found.items()} == {"exact": 0.25, "prefix": 0.5, "contains": 0.75}


def test_line_separators_inside_an_output_end_no_line(tmp_path):
    golds = write(tmp_path / "x.jsonl", chat("1", "one\u2028two"), chat("2", "b\x85c"))
    out = tmp_path / "out.jsonl"
    out.write_text('{"output": "one\u2028two"}\n{"output": "b\x85c"}\n\n', encoding="utf-8")
    call("--predictions", out, "--data", golds, "--out", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["rates"]["exact"]["value"] == 1


@pytest.mark.parametrize("name", ["synth_x.jsonl", "hellaswag_x.jsonl"])
def test_a_models_own_predictions_score_the_same_without_it(trained, rows, tmp_path, name):
    """The same rates from predictions.jsonl, in a process that never imports a model or a tokenizer."""
    source = lines(rows) if name[0] == "s" else [chat("the ring\nA) a\nB) b c\nC) d\nD) e", x) for x in "ABCDA"]
    data_file, out = write(tmp_path / name, *source), tmp_path / "out"
    call(trained[1], "--data", data_file, "--max_new_tokens", "12", "--out", out)
    program = ("import sys, eval; from support import cli; cli.run(eval.main); "
               "print([m for m in ('model', 'hf', 'hf.weights', 'tiktoken', 'tokenizers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program, "--predictions", out / "predictions.jsonl", "--data",
                           data_file, "--out", tmp_path / "m.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
    again, found = json.loads((tmp_path / "m.json").read_text()), metrics(out)
    assert all(again[key] == found[key] for key in ("n", "rates", "unscorable", "wrong", "task"))


def test_spider_is_executed_and_a_broken_gold_query_left_out(tmp_path, refused, capsys):
    database = tmp_path / "dbs/shop/shop.sqlite"
    database.parent.mkdir(parents=True)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE item (name TEXT, price REAL)")
        connection.execute("INSERT INTO item VALUES ('cup', 2), ('pen', 1)")
    connection.close()
    before, user = database.read_bytes(), "For db_id:[shop]\n\nWhat?"
    golds = write(tmp_path / "spider_x.jsonl", *(chat(user, query) for query in (
        "SELECT name FROM item", "SELECT count(*) FROM item", "SELECT nothing FROM item",
        "SELECT name FROM item ORDER BY price")))
    outputs = write(tmp_path / "out.jsonl", *({"output": query} for query in (
        "select NAME from item order by price", "DROP TABLE item", "SELECT nothing FROM item",
        "SELECT name FROM item ORDER BY price DESC")))
    flags = ["--predictions", outputs, "--data", golds, "--out", tmp_path / "m.json"]
    call(*flags, "--databases", tmp_path / "dbs")
    found, shown = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr()
    assert found["rates"]["spider"]["n"] == 3 and found["rates"]["spider"]["value"] == pytest.approx(1 / 3)
    assert found["unscorable"] == 1 and "spider_x.jsonl:3: cannot be scored" in shown.err
    assert cells(shown.out)["cannot be scored, left out"] == "1" and database.read_bytes() == before
    assert "--databases" in refused(*flags)


def test_regexes_too_hard_to_compare_are_told_of(tmp_path, capsys, monkeypatch):
    golds = write(tmp_path / "synth_x.jsonl", chat("q", "a*b*c*"), chat("q", "a"), chat("q", "a"))
    out = write(tmp_path / "out.jsonl", {"output": "(a*b*c*){1,30}"}, {"output": "(a)"}, {"output": "b"})
    monkeypatch.setattr(regexes, "MAX_STEPS", 40)
    call("--predictions", out, "--data", golds, "--out", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["undecided"] == 1 and found["rates"]["same_language"]["value"] == pytest.approx(1 / 3)
    assert cells(capsys.readouterr().out)["regexes too hard to compare, count as different"] == "1"


def test_of_four_rows_none_is_held_out(trained, rows, tmp_path, capsys):
    call(trained[0], "--data", rows, "--limit", "4", "--max_new_tokens", "1", "--out", tmp_path)
    assert metrics(tmp_path)["representation"]["linear_residual_relative"] is None
    assert cells(capsys.readouterr().out)["best linear map, relative residual on held-out rows"] == "-"


# ---- what answers depend on


def counted(monkeypatch):
    """The number of prompts of each batch that is answered from here on."""
    calls, whole = [], generate.decode
    monkeypatch.setattr(generate, "decode", lambda *args, **options: calls.append(len(args[1])) or whole(
        *args, **options))
    return calls


def test_the_same_model_by_another_path_has_its_answers(rows, tmp_path, monkeypatch):
    model, calls = Path(shutil.copytree(ORACLE, tmp_path / "model")), counted(monkeypatch)
    flags = ["--data", rows, "--limit", "4", "--max_new_tokens", "2", "--out", tmp_path / "out"]
    call(model, *flags)
    monkeypatch.chdir(tmp_path)
    call("model", *flags)
    assert calls == [4] and metrics(tmp_path / "out")["tokenizer"] == "model"


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_another_model_gives_other_answers(rows, tmp_path, monkeypatch, change):
    """Old answers are not taken for new ones, whichever file of the model has changed."""
    model = Path(shutil.copytree(ORACLE, tmp_path / "model"))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    flags = [model, "--data", rows, "--limit", "4", "--max_new_tokens", "2", "--out", tmp_path / "out"]
    calls = counted(monkeypatch)
    call(*flags)
    call(*flags)
    assert calls == [4], "nothing has changed"
    if change == "model.safetensors":
        state = load_file(model / change)
        save_file({name: tensor + 0.1 for name, tensor in state.items()}, model / change)
    elif change == "chat_template.jinja":
        (model / change).write_text(template.replace(": ", "> "))
    else:
        (model / change).write_text((model / change).read_text() + "\n")
    call(*flags)
    assert calls == [4, 4] and len(list((tmp_path / "out").glob("answers-*"))) == 2


@pytest.fixture
def pipe():
    """A function that gives a path from which the content of a file can be read once, as of <(cat FILE)."""
    ends = []

    def make(content):
        out, into = os.pipe()
        os.write(into, content)
        os.close(into)
        ends.append(out)
        return Path(f"/dev/fd/{out}")

    yield make
    for end in ends:
        os.close(end)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_a_pipe_is_read_once_for_questions_too(trained, rows, pipe, capsys):
    call(trained[1], "--ask", "a b c", "--data", pipe(rows.read_bytes()), "--max_new_tokens", "2")
    shown = capsys.readouterr()
    assert "nearest Codes" in shown.out and shown.err == "(cut off: no stop token within 2 tokens)\n"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_a_pipe_is_read_once(trained, rows, tmp_path, pipe, monkeypatch):
    """Also for several models; and another set of rows does not get the answers of the first."""
    whole, calls = rows.read_bytes().splitlines(keepends=True), counted(monkeypatch)
    flags = ["--task", "exact", "--max_new_tokens", "3", "--out", tmp_path]
    call(*trained, "--data", pipe(b"".join(whole[:5])), *flags)
    call(*trained, "--data", pipe(b"".join(whole[5:10])), *flags)
    call(*trained, "--data", pipe(b"".join(whole[:5])), *flags)
    assert calls == [5] * 4
    call(trained[1], "--data", rows, *flags[:-1], tmp_path / "file")
    expected = lines(tmp_path / "file/predictions.jsonl")[:5]
    assert [line["output"] for line in lines(tmp_path / "b/predictions.jsonl")] == [r["output"] for r in expected]


def test_bfloat16_is_of_generation_alone(trained, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: True)
    kinds, whole = [], generate.most_likely
    monkeypatch.setattr(generate, "most_likely", lambda logits, *rest: kinds.append(logits.dtype) or whole(
        logits, *rest))
    flags = [trained[1], "--data", rows, "--limit", "6", "--max_new_tokens", "2", "--out"]
    for dtype in ("float32", "bfloat16", "auto"):
        call(*flags, tmp_path / dtype, "--dtype", dtype)
    assert kinds == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32] * 2
    figures = [metrics(tmp_path / dtype)["representation"] for dtype in ("float32", "bfloat16")]
    assert figures[0] == figures[1]
    monkeypatch.setattr(processes, "has_bfloat16", lambda device: False)
    with pytest.raises(cli.UserError, match="--dtype bfloat16"):
        call(*flags, tmp_path / "no", "--dtype", "bfloat16")


def test_answers_of_another_setting_are_not_taken_over(trained, rows, tmp_path, monkeypatch):
    asked, sampler, calls = [], generate.sampler, counted(monkeypatch)
    monkeypatch.setattr(report, "write_model", lambda *_, **about: None)  # pictures take most of the time
    monkeypatch.setattr(generate, "sampler", lambda *words: asked.append(words[:3]) or sampler(*words))
    flags = [trained[0], "--data", rows, "--limit", "4", "--max_new_tokens", "1", "--out", tmp_path,
             "--temperature", "0.5", "--top_p", "0.25", "--seed", "9", "--dtype", "float32"]
    for other in ("", "--temperature 2", "--top_p 0.5", "--seed 1", "--dtype auto"):
        call(*flags, *other.split())
        assert calls.pop() == 4 and not calls, other
    assert asked[0] == (0.5, 0.25, 9)


# ---- questions


def test_one_question_gets_the_answer_that_a_row_gets(trained, rows, tmp_path, capsys):
    call(trained[1], "--data", rows, "--max_new_tokens", "12", "--out", tmp_path)
    before = sorted(trained[1].iterdir())
    for row in lines(tmp_path / "predictions.jsonl")[:4]:
        capsys.readouterr()
        call(trained[1], "--ask", row["text"], "--max_new_tokens", "12")
        assert capsys.readouterr().out == row["output"] + "\n"
    assert sorted(trained[1].iterdir()) == before, "asking writes no files"


def test_a_question_is_put_as_in_training(trained, rows, tmp_path, capsys):
    """The prompt is that of a row: with the system turn of the training data, or with none, which is said."""
    opened, first = runs.open_model(trained[1], "cpu"), data.read(rows)[0]
    asked, expected = first.messages[1]["content"], data.example(first, hf.tokenizer("synth"))
    _, example = ask.prepared(asked, ask.trained_on(opened), opened)
    assert example.full[: example.answer_start] == expected.full[: expected.answer_start]
    _, other = ask.prepared(asked, chat("a", "b")["messages"], opened)
    assert len(other.full) < len(example.full), "a file without a system turn"
    assert capsys.readouterr().err == "" and ask.trained_on(replace(opened, data=None)) == []
    for content in (b"", b"\n\n", b"{", b"\xff"):
        (tmp_path / "odd").write_bytes(content)
        assert ask.trained_on(replace(opened, data=str(tmp_path / "odd"))) == []
        assert "without the system turn" in capsys.readouterr().err
    assert ask.trained_on(replace(opened, data=str(tmp_path / "gone"))) == []
    (tmp_path / "odd").write_bytes(b"\xef\xbb\xbf\n" + rows.read_bytes())
    assert ask.trained_on(replace(opened, data=str(tmp_path / "odd")))[0]["content"] == "Capitals."


def test_questions_are_typed_until_the_input_ends(trained, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"a b c\n\n\xff\n" + b"a " * 600 + b"\nh g\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    call(trained[1], "--ask", "--max_new_tokens", "4")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "not UTF-8" in shown.err and "has room for 512; take a model with more room\n" in shown.err


def test_an_answer_that_the_context_cuts_off_is_said_to_have_had_so_much_room(trained, capsys):
    question = "a " * 250
    call(trained[0], "--ask", question)
    asked = ask.prepared(question, ask.trained_on(opened := runs.open_model(trained[0], "cpu")), opened)[1]
    assert f"within {513 - asked.answer_start} tokens)" in capsys.readouterr().err and asked.answer_start > 250


def test_nearest_codes_are_listed_where_the_encodings_tell_them(trained, rows, capsys):
    first = data.read(rows)[0]
    call(trained[1], "--data", rows, "--ask", first.messages[1]["content"], "--max_new_tokens", "12")
    *_, heading, one, two, three = capsys.readouterr().out.splitlines()
    model = runs.load_model(trained[1] / "best").eval()
    examples = [data.example(c, hf.tokenizer("synth")) for c in data.read(rows)]
    with torch.no_grad():
        batch = data.collate(examples, 1)
        text, code = model.encodings(model.hidden(batch), batch)
    cosine = torch.cosine_similarity(text[:1], code)
    codes = {c.messages[-1]["content"]: value.item() for c, value in zip(data.read(rows), cosine, strict=True)}
    best = sorted(codes, key=codes.get)[:-4:-1]
    assert heading.startswith("nearest") and [one, two, three] == [f"  {codes[code]:.3f}  {code}" for code in best]
    call(trained[0], "--data", rows, "--ask", "a b c", "--max_new_tokens", "2")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "do not tell which Codes are near" in last and "of 28" in last, "28 different Codes in 30 rows"
    call(trained[1], "--data", rows, "--limit", "6", "--ask", "a b c", "--max_new_tokens", "2")
    assert "nearest Codes" in capsys.readouterr().out, "by chance 3 of 6"


def test_a_question_about_endings_is_answered_in_words(trained, rows, tmp_path, capsys):
    """As any other is, with the budget and the temperature of answers; only evaluation chooses between letters."""
    data_file = tmp_path / "hellaswag_x.jsonl"
    shutil.copy(rows, data_file)
    call(trained[0], "--ask", "a", "--data", data_file, "--temperature", "1")
    assert "within 8 tokens" not in capsys.readouterr().err


def test_regexes_are_told_by_the_whole_first_word_of_a_name(trained, rows, tmp_path, capsys):
    for name, compared in (("synth-x.jsonl", True), ("Turk.jsonl", True), ("synthetic_x.jsonl", False)):
        shutil.copy(rows, tmp_path / name)
        call(trained[0], "--data", tmp_path / name, "--limit", "4", "--max_new_tokens", "1", "--out", tmp_path / "out")
        assert ("same_language" in metrics(tmp_path / "out")["rates"]) == compared


def test_a_hugging_face_folder_answers_too(capsys):
    call(ORACLE, "--ask", "a", "--max_new_tokens", "2")
    assert capsys.readouterr().out.endswith("\n")


def test_a_terminal_has_a_prompt_with_a_history_and_ctrl_d_ends_it(trained):
    parent, child = pty.openpty()
    command = [sys.executable, "eval.py", trained[1], "--ask", "--max_new_tokens", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=child, stdout=child, stderr=child,
                               env=os.environ | {"TERM": "dumb"})
    os.close(child)

    def shown(until, seconds=120):
        text, end = b"", time.monotonic() + seconds
        while until not in text and time.monotonic() < end and select.select([parent], [], [], 1) is not None:
            if select.select([parent], [], [], 1)[0]:
                text += os.read(parent, 1000)
        assert until in text, text
        return text.decode()

    shown(b"? ")
    os.write(parent, b"a b c\n")
    answer = shown(b"? ").split("\n")[1]
    os.write(parent, b"\x10\n")  # Ctrl-P: the question before
    again = shown(b"? ")
    assert "a b c" in again and answer in again
    os.write(parent, b"\x04")
    assert process.wait(60) == 0
    os.close(parent)


# ---- nothing is lost


def test_outputs_never_replace_inputs(trained, rows, tmp_path, refused, monkeypatch):
    """Nor files that this program did not make. All is refused before a model is opened."""
    monkeypatch.setattr(runs, "open_model", lambda *args: pytest.fail("work has begun"))
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "predictions.jsonl"):
        shutil.copy(rows, name)
    outputs = write(Path("o.jsonl"), *[{"output": "A"}] * 30)
    os.symlink("d.jsonl", "link.md")
    os.link("d.jsonl", "hard.json")
    Path("mine").mkdir()
    for name in ("metrics.json", "notes.md", "tsne.png", "r-spectrum.png"):
        Path("mine", name).write_text("my own")
    (Path("mine/taken") / "metrics.json").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    scoring, run = ["--predictions", outputs], trained[0]
    for flags in (
        [*scoring, "--data", "d.jsonl", "--out", outputs], [*scoring, "--data", "d.jsonl", "--out", "d.jsonl"],
        [*scoring, "--data", "d.jsonl", "--out", "hard.json"], [*scoring, "--data", "d.jsonl", "--out", "link.md"],
        [*scoring, "--data", "d.jsonl", "--out", "mine/notes.md"],
        [*scoring, "--data", "d.jsonl", "--out", "/dev/null"],
        [run, "--data", "d.jsonl", "--report", "d.jsonl"], [run, "--data", "d.jsonl", "--report", "./mine/../d.jsonl"],
        [run, "--data", "d.jsonl", "--report", "link.md"], [run, "--data", "d.jsonl", "--report", run / "log.jsonl"],
        [run, "--data", "d.jsonl", "--report", run / "config.json"],
        [run, "--data", "d.jsonl", "--report", "mine/r.md"],
        [run, "--data", "predictions.jsonl", "--out", "."], [run, "--data", "d.jsonl", "--out", "mine"],
        [run, "--data", "d.jsonl", "--out", "mine/taken"], [run, "--data", "d.jsonl", "--report", "mine"],
        [*trained, "--data", "d.jsonl", "--out", "new", "--report", "mine/notes.md"],
    ):
        message = refused(*flags)
        assert "would be lost" in message or "not from an earlier" in message or "is a folder" in message, message
    for name in ("metrics.json", "predictions.jsonl"):
        message = refused(run, "--data", "d.jsonl", "--out", "new", "--report", f"new/../new/{name}")
        assert "a RUN's result as well" in message, message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_an_evaluation_left_is_replaced_by_the_next(trained, rows, tmp_path):
    flags = [*trained, "--data", rows, "--limit", "5", "--max_new_tokens", "1", "--out", tmp_path]
    call(*flags)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    call(*flags)
    assert all(path.stat().st_mtime_ns > before for path, before in made.items())
    scoring = ["--predictions", tmp_path / "a/predictions.jsonl", "--data", rows, "--out", tmp_path / "m"]
    call(*scoring)
    call(*scoring)


@pytest.mark.parametrize(("run", "name"), [
    ("r$x$", "$\\frac$"), ("plain", os.fsdecode(b"r\xff")), ("a|b (c) >d", "a|b (c) >d"), ("x" * 100, "x" * 100)])
def test_odd_names_of_runs_and_files(trained, rows, tmp_path, run, name):
    run, file, target = tmp_path / run, tmp_path / f"{name}.jsonl", tmp_path / f"{name}.md"
    shutil.copytree(trained[0], run)
    shutil.copy(rows, file)
    call(run, "--data", file, "--limit", "5", "--max_new_tokens", "1", "--report", target)
    pictures = [line.split("](<")[1][:-2] for line in target.read_text().splitlines() if line.startswith("![")]
    assert len(pictures) == 3 and all(os.path.exists(os.path.join(os.fsencode(tmp_path), unquote_to_bytes(picture)))
                                      for picture in pictures)


def test_weights_that_are_not_finite_are_told_of_at_once(trained, rows, tmp_path, refused):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    state = load_file(run / "best/model.safetensors")
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, run / "best/model.safetensors")
    assert "not finite" in refused(run, "--data", rows, "--out", tmp_path / "out")
    assert "not finite" in refused(run, "--ask", "a")
    assert not (tmp_path / "out").exists()


# ---- mistakes


def test_the_models_own_end_of_text_ends_an_answer_too(rows, tmp_path):
    """Base models with a chat template: Qwen2.5's ends answers with <|im_end|>, the model itself with <|endoftext|>."""
    model = Path(shutil.copytree(ORACLE, tmp_path / "model"))
    call(model, "--data", rows, "--limit", "4", "--max_new_tokens", "6", "--out", tmp_path / "before")
    before = runs.open_model(model, "cpu")
    first = before.tokenizer.encode(lines(tmp_path / "before/predictions.jsonl")[0]["output"])[0]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, "junk"]}))
    assert runs.open_model(model, "cpu").stops == {before.tokenizer.stop, first}
    assert runs.open_model(model, "cpu", "synth").stops == {hf.tokenizer("synth").stop}, "ids of another vocabulary"
    call(model, "--data", rows, "--limit", "4", "--max_new_tokens", "6", "--out", tmp_path / "after")
    assert lines(tmp_path / "after/predictions.jsonl")[0]["output"] == ""


def test_adapters_without_a_tokenizer_take_that_of_their_base(tmp_path):
    """PEFT saves none."""
    adapted = runs.weights.load(ORACLE)
    lora.add(adapted, 2)
    lora.save(adapted, tmp_path / "adapters", ORACLE)
    assert runs.open_model(tmp_path / "adapters", "cpu").tokenizer.name == str(ORACLE)


@pytest.mark.parametrize("flags, complaint", [
    (["--limit", "0"], "--limit 0"),
    (["--temperature", "-1"], "--temperature -1"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--top_p", "0"], "--top_p 0"),
    (["--top_p", "0.5"], "needs a --temperature"),
    (["--temperature", "1", "--task", "hellaswag"], "nothing is sampled"),
    (["--seed", "-1"], "--seed -1"),
    (["--limit", "3"], "at least 4"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--predictions", "x.jsonl"], "either"),
    (["--tokenizer", "nonsense"], "nonsense"),
    (["--base", "nowhere"], "nowhere"),
    (["--device", "toaster"], "--device toaster"),
    (["--ask", "a"], "--ask wants one RUN, and writes no files"),
    (["--seed", "9" * 30], "--seed 999"),
    (["--max_new_tokens", "4294967296"], "--max_new_tokens 4294967296"),
])
def test_mistakes_are_one_line(trained, rows, refused, tmp_path, flags, complaint):
    assert complaint in refused(trained[0], "--data", rows, "--out", tmp_path / "out", "--max_new_tokens", "1", *flags)


def test_what_is_no_run(trained, rows, refused, tmp_path):
    assert "no config.json" in refused(tmp_path, "--data", rows)
    assert "either" in refused("--data", rows)
    assert "--data is missing" in refused(trained[0])
    model = trained[0] / "best"
    assert "say with --out" in refused(model, "--base", model, "--data", rows)
    for flags in (["--ask"], [*trained, "--ask", "a"], ["--predictions", rows, "--ask", "a"]):
        assert "one" in refused(*flags)
    assert "blank" in refused(trained[0], "--ask", " ")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused(tmp_path, "--data", rows)
    young = Path(shutil.copytree(trained[0], tmp_path / "young", ignore=shutil.ignore_patterns("best", "checkpoint")))
    assert "holds no checkpoint yet" in refused(young, "--data", rows)
    spaced, out = young.rename(tmp_path / "a young one"), tmp_path / "out"
    assert refused(spaced, "--data", rows).endswith(f"--resume '{spaced}'")
    spaced.rename(young)
    assert "holds no checkpoint yet" in refused(trained[0], "--data", rows, "--base", young, "--out", out)
    assert not out.exists(), "nothing was answered before"
    (young / "checkpoint").mkdir()  # of a sharded run: parts of a model
    config = json.loads((young / "config.json").read_text())
    config["arguments"]["shard"] = True
    (young / "config.json").write_text(json.dumps(config))
    assert "holds no checkpoint yet" in refused(young, "--data", rows)
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(trained[0], "--data", rows, "--out", tmp_path / "file/out")


def test_a_tokenizer_of_another_model_is_refused(rows, refused, tmp_path):
    smaller = Path(shutil.copytree(ORACLE, tmp_path / "smaller"))
    vocabulary = json.loads((ORACLE / "config.json").read_text())["vocab_size"]
    inside("--out", tmp_path / "run", "--data", rows, *SMALL, "--max_steps", "1")
    if vocabulary > 512:
        flags = [tmp_path / "run", "--tokenizer", smaller]
    else:
        flags = [smaller, "--tokenizer", "synth", "--out", tmp_path / "out"]
    assert "the model's embedding only" in refused(*flags, "--data", rows)


def test_a_model_that_changes_while_it_is_read_is_refused(trained, tmp_path, monkeypatch):
    copy, whole = Path(shutil.copytree(trained[1], tmp_path / "copy")), runs.load_model

    def while_training(folder):
        model = whole(folder)
        shutil.copytree(trained[0] / "best", copy / "new")
        os.rename(folder, copy / "old")
        os.rename(copy / "new", folder)
        return model

    monkeypatch.setattr(runs, "load_model", while_training)
    with pytest.raises(cli.UserError, match="best: has changed while it was read"):
        runs.open_model(copy, "cpu")


def test_results_in_a_models_folder_do_not_change_the_model(trained):
    copy = Path(shutil.copytree(trained[1] / "best", trained[1].parent / "model"))
    before = runs.digest(*runs.model_files(copy))
    for name in ("metrics.json", "trainer_state.json", "training_args.bin", "pytorch_model.bin", "merges.txt"):
        (copy / name).write_text("{}")
    assert runs.digest(*runs.model_files(copy)) == before
    (copy / "config.json").write_text("{}")
    assert runs.digest(*runs.model_files(copy)) != before


def test_a_closed_standard_output_is_no_mistake(rows):
    done = subprocess.run(["bash", "-c", f"{sys.executable} data.py {rows} <&- >&-"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()


def test_rows_without_an_answer_are_refused(trained, tmp_path, refused):
    plain = write(tmp_path / "plain.jsonl", chat("a", "A"), *[{"text": f"the ring in lake {i}"} for i in range(4)])
    for flags in ([trained[0], "--out", tmp_path / "out"], ["--predictions", plain]):
        assert "plain.jsonl:2: must end with" in refused(*flags, "--data", plain)
