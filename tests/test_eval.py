"""The command that evaluates: metrics recomputed here, interruptions, comparisons, other systems' outputs, mistakes."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from test_train import SMALL, inside, toy_rows

import cli
import eval as eval_script
import generate
import score

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
    """Two runs, one of which has learnt the first letters."""
    folder = tmp_path_factory.mktemp("runs")
    inside("--out", folder / "a", "--data", rows, *SMALL)
    inside("--out", folder / "b", "--data", rows, *SMALL, "--epochs", "40", "--lr", "1e-2", "--seed", "1")
    return folder / "a", folder / "b"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_those_of_the_predictions(trained, rows, capsys):
    run = trained[1]
    call(run, "--data", rows, "--max_new_tokens", "12")
    predictions, found = lines(run / "predictions.jsonl"), json.loads((run / "metrics.json").read_text())
    golds = [json.loads(line)["messages"][-1]["content"] for line in rows.read_text().splitlines()]
    assert [p["gold"] for p in predictions] == golds and [p["row"] for p in predictions] == list(range(1, 31))
    exact = sum(p["output"] == gold for p, gold in zip(predictions, golds, strict=True))
    assert found["rates"]["exact"]["value"] == exact / 30 > 0.2
    assert (found["rates"]["exact"]["low"], found["rates"]["exact"]["high"]) == score.wilson(exact, 30)
    prefix = sum(p["output"].startswith(gold) for p, gold in zip(predictions, golds, strict=True))
    assert found["rates"]["prefix"]["value"] == prefix / 30
    assert found["rates"]["stopped"]["value"] == sum(p["stopped"] for p in predictions) / 30
    assert sum(found["wrong"].values()) == 30 - exact and "same_language" in found["rates"]
    assert found["representation"]["n"] == 30 and found["verdict"] in capsys.readouterr().out
    for name in ("tsne.png", "spectrum.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert not (run / "predictions.partial.jsonl").exists()


def test_the_batch_size_changes_nothing(trained, rows, tmp_path):
    for size in ("1", "7"):
        call(trained[1], "--data", rows, "--batch_size", size, "--out", tmp_path / size, "--max_new_tokens", "12")
    assert lines(tmp_path / "1/predictions.jsonl") == lines(tmp_path / "7/predictions.jsonl")


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "5"]])
def test_an_interrupted_evaluation_goes_on(trained, rows, tmp_path, monkeypatch, sampling):
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
    partial = tmp_path / "stopped/predictions.partial.jsonl"
    assert len(lines(partial)) == 1 + 12  # the header, and three batches
    with open(partial, "a") as file:
        file.write('{"row": 30, "outp')  # and half a line
    calls[:] = [0, 0, 0, 0]
    call(*flags, tmp_path / "stopped")
    assert sum(calls) == 18, "rows that were answered must not be answered again"
    assert lines(tmp_path / "stopped/predictions.jsonl") == lines(tmp_path / "straight/predictions.jsonl")


def test_comparison_and_report(trained, rows, tmp_path, capsys):
    call(*trained, "--data", rows, "--max_new_tokens", "12", "--out", tmp_path, "--report", tmp_path / "ab.md")
    shown, report = capsys.readouterr().out, (tmp_path / "ab.md").read_text()
    a, b = (lines(tmp_path / name / "predictions.jsonl") for name in "ab")
    ours, theirs = [row["exact"] for row in b], [row["exact"] for row in a]
    middle, low, high = score.paired_bootstrap(ours, theirs, 0)
    assert middle > 0.2 and f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]" in report
    assert f"{score.mcnemar(ours, theirs):.3g}" in report and "stopped too early" in report
    assert all(line in shown for line in report.splitlines() if line.startswith("| exact match"))
    assert (tmp_path / "ab-losses.png").exists() and (tmp_path / "ab-spectrum.png").exists()
    assert "![loss curves](ab-losses.png)" in report


def test_an_untouched_hugging_face_model(rows, tmp_path, refused):
    call(ORACLE, "--data", rows, "--limit", "6", "--max_new_tokens", "4", "--out", tmp_path / "base")
    assert json.loads((tmp_path / "base/metrics.json").read_text())["n"] == 6
    assert "--out" in refused(ORACLE, "--data", rows)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(user, answer):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def test_other_systems_outputs(tmp_path, refused, capsys):
    golds = write(tmp_path / "gsm8k_x.jsonl", chat("1 + 1", "two #### 2"), chat("2", "#### 1,000"), chat("3", "#### 3"))
    outputs = write(tmp_path / "out.jsonl", {"output": "#### 2 ok"}, {"output": "it is 5 #### $1000"}, {"output": ""})
    call("--predictions", outputs, "--data", golds, "--out", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["task"] == "gsm8k" and found["rates"]["gsm8k"]["value"] == pytest.approx(2 / 3)
    assert "task: gsm8k" in capsys.readouterr().out and "stopped" not in found["rates"]
    write(outputs, {"output": "a"}, {"text": "b"}, {"output": "c"})
    assert "out.jsonl:2:" in refused("--predictions", outputs, "--data", golds)
    write(outputs, {"output": "a"})
    assert "1 outputs for 3 rows" in refused("--predictions", outputs, "--data", golds)


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
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["rates"]["spider"]["n"] == 3 and found["rates"]["spider"]["value"] == pytest.approx(1 / 3)
    assert found["unscorable"] == 1 and "spider_x.jsonl:3: cannot be scored" in capsys.readouterr().err
    assert database.read_bytes() == before
    assert "--databases" in refused(*flags)


def test_hellaswag_takes_the_likeliest_letter_and_ending(trained, tmp_path):
    user = "the ring\nA) one lake\nB) two lakes\nC) three lakes\nD) dog"
    data_file = write(tmp_path / "hellaswag_x.jsonl", *(chat(user, letter) for letter in "ABCD"))
    call(trained[0], "--data", data_file, "--out", tmp_path / "out")
    found, rows = json.loads((tmp_path / "out/metrics.json").read_text()), lines(tmp_path / "out/predictions.jsonl")
    assert {row["output"] for row in rows} <= set("ABCD") and len({row["output"] for row in rows}) == 1
    assert found["rates"]["hellaswag"]["value"] == 0.25 == found["rates"]["ending"]["value"]


def test_exact_prefix_and_contains_differ(tmp_path):
    golds = write(tmp_path / "x.jsonl", *(chat("q", "ab") for _ in range(4)))
    outputs = write(tmp_path / "out.jsonl", *({"output": o} for o in ("ab", "abc", "xab", "a")))
    call("--predictions", outputs, "--data", golds, "--out", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())["rates"]
    assert {name: rate["value"] for name, rate in found.items()} == {"exact": 0.25, "prefix": 0.5, "contains": 0.75}


def test_hellaswag_takes_the_maximum(trained, tmp_path, monkeypatch):
    values = iter([[-3.0, -1.0, -2.0, -4.0], [-8.0, -9.0, -9.0, -1.0]] * 4)
    monkeypatch.setattr(generate, "log_likelihoods", lambda *_: next(values))
    user = "the ring\nA) one lake\nB) two lakes\nC) three lakes\nD) dog"
    data_file = write(tmp_path / "hellaswag_x.jsonl", *(chat(user, letter) for letter in "ABBD"))
    call(trained[0], "--data", data_file, "--out", tmp_path / "out")
    assert {(row["output"]) for row in lines(tmp_path / "out/predictions.jsonl")} == {"B"}


def test_why_outputs_are_wrong():
    cases = {("ab", "ab"): None, ("a", "ab"): "stopped too early", ("abc", "ab"): "ran on", ("b", "ab"): "other"}
    assert {case: eval_script.why(*case) for case in cases} == cases


def test_long_gold_answers_are_told_of(trained, rows, tmp_path, capsys):
    call(trained[0], "--data", rows, "--max_new_tokens", "2", "--out", tmp_path)
    assert "warning: gold answers have up to" in capsys.readouterr().err


@pytest.mark.parametrize("flags, complaint", [
    (["--limit", "0"], "--limit 0"),
    (["--temperature", "-1"], "--temperature"),
    (["--top_p", "0"], "--top_p"),
    (["--limit", "3"], "at least 4"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
])
def test_mistakes_are_one_line(trained, rows, refused, tmp_path, flags, complaint):
    assert complaint in refused(trained[0], "--data", rows, "--out", tmp_path / "out", *flags)


def test_what_is_no_run(rows, refused, tmp_path):
    assert "no run here" in refused(tmp_path, "--data", rows)
    (tmp_path / "config.json").write_text('{"arguments": ')
    assert "config.json" in refused(tmp_path, "--data", rows)
    assert "either" in refused("--data", rows)
