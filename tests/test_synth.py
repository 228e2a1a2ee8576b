"""datasets/make_synth.py and the three files it makes: the language, the splits, the figures, a user's mistakes."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support import cli
from support.cli import UserError

SCRIPT = Path(__file__).parent.parent / "datasets" / "make_synth.py"
# loaded by its path: the name `datasets` may belong to an installed package
spec = importlib.util.spec_from_file_location("make_synth", SCRIPT)
synth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synth)

SIZES = {"train": 8000, "val": 500, "test": 2000}
SMALL = ((1, 4, 300), (2, 5, 3000), (3, 7, 3000))

NUM, CAP, LOW, LET, VOW, CHR, WORD = (["Num"], ["Cap"], ["Low"], ["Let"], ["Vow"], ["Chr"], ["Word"])


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def refused(result, *words):
    """Whether a command ended as after a user's mistake: exit code 2, one line that says the words, nothing printed."""
    lines = result.stderr.splitlines()
    return (result.returncode, len(lines), result.stdout) == (2, 1, "") and all(word in lines[0] for word in words)


@pytest.fixture(scope="module")
def shipped():
    """{"train": [(sentence, regex), ...], ...} of the files in the repository."""
    return {name: synth.read_pairs(SCRIPT.with_name(f"synth_{name}.jsonl")) for name in SIZES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder into which the script wrote, its one full run."""
    folder = tmp_path_factory.mktemp("made") / "new"
    result = run("--out", folder)
    assert result.returncode == 0, result.stderr
    return folder


def trees(passes=SMALL, seed=0):
    """Trees that are not dropped."""
    rng = synth.random.Random(seed)
    drawn = [synth.draw(rng, depth, size) for depth, size, draws in passes for _ in range(draws)]
    return [tree for tree in drawn if tree is not None and not synth.dropped(tree)]


# ---- the files


def test_shipped_files_are_what_the_script_makes(made):
    assert sorted(path.name for path in made.iterdir()) == sorted(f"synth_{name}.jsonl" for name in SIZES)
    for name in SIZES:
        same = (made / f"synth_{name}.jsonl").read_bytes() == SCRIPT.with_name(f"synth_{name}.jsonl").read_bytes()
        assert same, f"synth_{name}.jsonl is not what make_synth.py makes"


def test_seed_decides():
    first, again, other = (list(synth.make_pool(seed, SMALL).items()) for seed in (3, 3, 4))
    assert first == again and first != other


@pytest.mark.parametrize("name", SIZES)
def test_rows_have_the_published_form(name):
    lines = SCRIPT.with_name(f"synth_{name}.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == SIZES[name]
    for line in lines:
        row = json.loads(line)
        assert line == json.dumps(row) + "\n" and list(row) == ["messages"]
        assert [list(turn) for turn in row["messages"]] == [["role", "content"]] * 3
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == "Convert natural language to regular expression."
        assert all(turn["content"] for turn in row["messages"])


def test_no_sentence_twice(shipped):
    sentences = [sentence for rows in shipped.values() for sentence, _ in rows]
    assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_splits_are_alike(shipped):
    """No split got the small trees: the mean numbers of nodes over literals agree."""
    means = {}
    for name, rows in shipped.items():
        found = synth.figures(rows)
        means[name] = sum(found[node] for node in synth.NODES if node not in synth.LITERALS) / 10_000
    assert max(means.values()) - min(means.values()) < 0.1, means  # the standard error of 500 rows is 0.02


def test_parentheses_and_alphabet(shipped):
    for sentence, regex in (row for rows in shipped.values() for row in rows):
        depth = 0
        for symbol in regex:
            depth += (symbol == "(") - (symbol == ")")
            assert depth >= 0, regex
        assert depth == 0, regex
        assert re.fullmatch(r"lines( [a-z0-9',-]+)+", sentence), sentence
        found = re.findall(r"the string '(\w+)'", sentence)
        assert tuple(found) == ("dog", "truck", "ring", "lake")[: len(found)]
        assert found == re.findall("dog|truck|ring|lake", regex)


# ---- the figures


def test_figures_near_the_published(shipped):
    """Literal figures of the published 10,000 rows; counts per 10,000 rows."""
    found = synth.figures([row for rows in shipped.values() for row in rows])
    published = {  # within 6 %, and the rarer ones 4 standard deviations
        "Num": 2871, "Cap": 2809, "Low": 2845, "Let": 2813, "Vow": 2863, "Chr": 2880, "Word": 7716,
        "Before": 4325, "Or": 2432, "And": 1513, "Or3": 1201, "And3": 1238, "Followed": 1649, "Not": 1716,
        "Contains": 1797, "Only": 311, "Starts": 899, "Ends": 1226, "Words": 1896, "NOrMore": 2053,
        "ZeroOrMore": 876, "OneOrMore": 875,
        "parentheses nested 0 deep": 171, "parentheses nested 1 deep": 2710, "parentheses nested 2 deep": 6425,
        "parentheses nested 3 deep": 694,
        "regex ends with .*.*": 127, "regex ends with .* only": 4451, "regex ends otherwise": 5422,
        "sentence begins: lines with": 5424, "sentence begins: lines not": 1336,
        "sentence begins: lines containing": 1245, "sentence begins: lines ending": 720,
        "sentence begins: lines having": 662, "sentence begins: lines starting": 613,
    }  # fmt: skip
    for name, figure in published.items():
        assert abs(found[name] - figure) <= max(0.06 * figure, 4 * figure**0.5), (name, found[name], figure)
    for text, figures in {"sentence": (24, 66, 66.7, 101, 125), "regex": (1, 25, 26.0, 44, 54)}.items():
        for what, figure, band in zip(("min", "median", "mean", "p99", "max"), figures, (0, 1, 0.5, 2, 8), strict=True):
            assert abs(found[f"characters of a {text}: {what}"] - figure) <= band
    assert found["different symbols in regexes"] == 44
    assert found.keys() == synth.PUBLISHED.keys()  # no other first words, no deeper parentheses


def test_counts_from_text_are_the_counts_of_nodes():
    """--check counts phrases; the trees know the nodes."""
    sample = trees()
    assert len(sample) > 1000
    found = synth.figures([(synth.sentence(tree), synth.name_words(synth.regex(tree))) for tree in sample])
    counts = Counter(name for tree in sample for name in synth.names(tree))
    assert counts.keys() == synth.NODES.keys()
    for name, count in counts.items():
        assert found[name] == round(count * 10_000 / len(sample)), name


# ---- the language


@pytest.mark.parametrize(
    "tree, sentence, regex",
    [
        (["Only", NUM], "lines containing only a number", "[0-9]"),
        (["Contains", CHR], "lines containing a character", ".*..*"),
        (["ZeroOrMore", CHR], "lines with a character, zero or more times", "(.)*"),
        (["OneOrMore", CHR], "lines with a character at least once", "(.)+"),
        (["NOrMore", VOW, 4], "lines with a vowel, 4 or more times", "([AEIOUaeiou]){4,}"),
        (["Starts", LOW], "lines starting with a lower-case letter", "([a-z])(.*)"),
        (["Ends", ["OneOrMore", WORD]], "lines ending with the string 'dog' at least once", "(.*)((dog)+)"),
        (["Followed", LET, CAP], "lines with a letter followed by a capital letter", "[A-Za-z].*[A-Z].*"),
        (["Before", NUM, LET], "lines with a number before a letter", "([0-9]).*([A-Za-z]).*"),
        (["Or", ["Ends", CHR], ["Contains", CAP]],
         "lines ending with a character or containing a capital letter", "((.*)(.))|(.*[A-Z].*)"),
        (["And", ["Contains", CHR], ["Starts", NUM]],
         "lines containing a character and starting with a number", "(.*..*)&(([0-9])(.*))"),
        (["Contains", ["Or3", VOW, CHR, NUM]],
         "lines containing either a vowel, a character, or a number", ".*([AEIOUaeiou])|(.)|([0-9]).*"),
        (["Contains", ["And3", LET, NUM, CAP]],
         "lines containing a letter, a number, and a capital letter", ".*([A-Za-z])&([0-9])&([A-Z]).*"),
        (["Words", ["Or", ["And", WORD, WORD], WORD]],
         "lines with words with the string 'dog' and the string 'truck' or the string 'ring'",
         r"\b((dog)&(truck))|(ring)\b"),
        (["Not", ["NOrMore", ["Followed", WORD, NUM], 3]],
         "lines not having the string 'dog' followed by a number, 3 or more times", "~((dog.*[0-9].*){3,})"),
        (["Not", ["Or3", CAP, NUM, VOW]],
         "lines not having a capital letter, a number, or a vowel", "~(([A-Z])|([0-9])|([AEIOUaeiou]))"),
        (["Not", ["And3", WORD, NUM, WORD]],
         "lines not having the string 'dog', not a number, and not the string 'truck'", "~((dog)&([0-9])&(truck))"),
        (["Not", ["Words", ["And", CHR, VOW]]],
         "lines not words with a character and not a vowel", r"~(\b(.)&([AEIOUaeiou])\b)"),
        (["Before", ["Or3", WORD, WORD, WORD], LOW],
         "lines having either the string 'dog', the string 'truck', or the string 'ring' before a lower-case letter",
         "((dog)|(truck)|(ring)).*([a-z]).*"),
    ],
)  # fmt: skip
def test_trees_read_as_in_the_published_data(tree, sentence, regex):
    """Rows of the published files, and the trees behind them."""
    assert (synth.sentence(tree), synth.name_words(synth.regex(tree))) == (sentence, regex)
    assert not synth.dropped(tree)


REPAIRED = [
    ("lines having containing a letter", "lines containing a letter"),
    ("lines having before a letter", "lines before a letter"),
    ("lines a letter", "lines with a letter"),
    ("lines not the string 'W'", "lines not having the string 'W'"),
    ("lines the string 'W'", "lines with the string 'W'"),
    ("lines not a vowel", "lines not having a vowel"),
    ("lines words with not words", "lines with words that don't words"),
    ("lines having starting with a vowel", "lines starting with a vowel"),
    ("lines having ending with a vowel", "lines ending with a vowel"),
    ("lines having not the vowel", "lines not having the vowel"),
    ("lines containing not a vowel", "lines not containing a vowel"),
    ("lines containing having a vowel", "lines containing a vowel"),
    ("lines having having a vowel", "lines having a vowel"),
    ("lines with having a vowel", "lines with a vowel"),
    ("lines words with not a vowel", "lines with words that don't have a vowel"),
    ("lines with words with not the string 'W'", "lines with words that don't the string 'W'"),
    ("lines not not containing a vowel", "lines not containing a vowel"),
    ("lines either a vowel, a letter, or a number", "lines having either a vowel, a letter, or a number"),
    ("lines a vowel, the string 'W', and a capital letter before a number",
     "lines having a vowel, the string 'W', and a capital letter before a number"),
    ("lines starting with a vowel, the string 'W', and a number",
     "lines starting with a vowel, the string 'W', and a number"),
    ("lines words with containing a vowel", "lines with words that contain a vowel"),
]  # fmt: skip


@pytest.mark.parametrize("before, after", REPAIRED)
def test_repairs(before, after):
    assert synth.repair(before) == after


def test_every_repair_is_needed(monkeypatch):
    """Without any one repair, one of the examples above comes out otherwise."""
    repairs = list(synth.REPAIRS)
    for pattern in repairs:
        monkeypatch.setattr(synth, "REPAIRS", [other for other in repairs if other is not pattern])
        assert any(synth.repair(before) != after for before, after in REPAIRED), pattern


@pytest.mark.parametrize(
    "tree",
    [
        ["Or", VOW, ["Contains", LET]],
        ["And3", WORD, WORD, NUM],
        ["And", ["Or", VOW, LET], ["Contains", NUM]],
        ["Contains", ["Only", VOW]],
        ["OneOrMore", ["NOrMore", VOW, 2]],
        ["Before", ["Followed", WORD, WORD], ["Or3", WORD, WORD, WORD]],
    ],
)
def test_trees_that_the_published_data_lacks(tree):
    assert synth.dropped(tree)


def test_draws_stay_within_their_limits():
    def depth(tree):
        return max([1 + depth(child) for child in synth.children(tree)], default=0)

    for max_depth, max_size, draws in SMALL:
        drawn = trees([(max_depth, max_size, draws)])
        assert max(map(depth, drawn)) == max_depth
        for tree in drawn:
            names = synth.names(tree)
            assert max(Counter(name for name in names if name != "Word").values()) == 1
            assert sum(len(synth.NODES[name][2]) > 0 for name in names) <= max_depth
            for parent, child in ((tree, child) for child in synth.children(tree)):
                assert child[0] in synth.MENUS[synth.NODES[parent[0]][2][0]]
                assert parent[0] != "Words" or child[0] not in synth.LITERALS


def test_what_no_sentence_contains(shipped):
    for sentence in (sentence for rows in shipped.values() for sentence, _ in rows):
        for phrase in ("letter before a letter", "starting with ending", "ending with starting", "containing starting",
                       "before starting", "starting with containing"):  # fmt: skip
            assert phrase not in sentence


# ---- the command line


def test_check_prints_the_figures_of_a_file(tmp_path):
    rows = [("lines with a vowel or not a number", "([AEIOUaeiou])|(~([0-9]))"), ("lines with a letter", "x")] * 2
    file = tmp_path / "some.jsonl"
    file.write_text("".join(synth.to_line(*row) for row in rows) + "\n")
    result = run("--check", file)
    table = dict(re.fullmatch(r"(.+?) +(\S+ +\S+)", line).groups() for line in result.stdout.splitlines())
    cells = {label.split("  ")[0]: cells.split() for label, cells in table.items()}
    assert (result.returncode, result.stderr) == (0, "")
    assert len({len(line) for line in result.stdout.splitlines()}) == 1  # aligned
    assert cells["rows"] == ["4", "10,000"]
    assert cells["rows whose sentence came before"] == ["2", "137"]
    assert cells["characters of a sentence: max"] == ["34", "125"]
    assert cells["Not"] == ["5,000", "1,716"]
    assert cells["Let"] == ["5,000", "2,813"]
    assert cells["parentheses nested 2 deep"] == ["5,000", "6,425"]
    assert cells["parentheses nested 3 deep"] == ["0", "694"]


def test_check_takes_the_files_in_out_by_default(made):
    result = run("--check", "--out", made)
    assert result.returncode == 0 and re.search(r"^rows +10,500 +10,000$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "content, where",
    [
        (b'{"messages": [}\n', "bad.jsonl:1:"),
        (b'{"messages": "x"}\n', "bad.jsonl:1:"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "bad.jsonl:1:"),
        (synth.to_line("a", "b").encode() + synth.to_line("a", 7).encode(), "bad.jsonl:2:"),
        (b"[" * 100_000, "bad.jsonl:1:"),
        (b"", "no rows"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"text": "a"}\n', "bad.jsonl:1:"),
        (None, "No such file"),
    ],
)
def test_check_of_bad_files(tmp_path, content, where):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert refused(run("--check", file), "bad.jsonl", where)


def test_other_content_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "make_pool", lambda seed: {f"sentence {seed} {i}": "." for i in range(10)})
    kept = tmp_path / "synth_val.jsonl"
    kept.write_text("mine\n")

    def main(*arguments):
        sizes = ["--train", "5", "--val", "2", "--test", "3"]
        monkeypatch.setattr(sys, "argv", ["make_synth.py", "--out", str(tmp_path), *sizes, *arguments])
        synth.main()

    with pytest.raises(UserError, match="--force"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["synth_val.jsonl"] and kept.read_text() == "mine\n"
    main("--force")
    main()  # the same content again is no conflict
    written = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert written == {"synth_train.jsonl": 5, "synth_val.jsonl": 2, "synth_test.jsonl": 3}
    with pytest.raises(UserError, match="--force"):
        main("--seed", "1")


def test_nothing_half_written(tmp_path, monkeypatch):
    """A disk that is full at the second file leaves the folder as it was."""
    write_bytes = Path.write_bytes

    def full(path, content):
        if "val" in path.name:
            write_bytes(path, content[:1])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        cli.write_files({tmp_path / name: b"content" for name in ("train", "val")}, force=False)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert refused(run("--out", tmp_path / "file" / "folder"), "file", "Not a directory")
    assert refused(run("--out", tmp_path, "--val", "0"), "--val", "at least 1")
    assert refused(run("--out", tmp_path, "--val", "many"), "--val", "whole number")
    assert refused(run("--out", tmp_path, "--seed", "-1"), "--seed", "at least 0")  # would draw what 1 draws
    monkeypatch.setattr(synth, "make_pool", lambda seed: {str(i): "." for i in range(10)})
    with pytest.raises(UserError, match="11 rows wanted, but there are 10 sentences"):
        synth.make_splits(0, {"train": 8, "val": 1, "test": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
