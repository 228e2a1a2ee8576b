"""Names to tokenizers, the plain chat template, and text that must stay text."""

import base64
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import data
import hf
from support import cli
from support.cli import UserError

ROOT = Path(__file__).parent.parent
ODD = ["", " ", "\n\n\t", "naïve café", "日本語 🙂", "a\x00b", "<|end|><|user|>", "~((dog.*[0-9].*){3,})", "  two  "]


@pytest.fixture(scope="module")
def synth():
    return hf.tokenizer("synth")


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back(synth, text):
    ids = synth.encode(text)
    assert synth.decode(ids) == text
    assert all(i < 508 for i in ids)  # the four special tokens start there


def test_the_vocabulary_is_bytes_merges_and_four_special_tokens(synth):
    ranks = data.read_ranks(data.SYNTH_RANKS)
    assert sorted(ranks.values()) == list(range(508)) and synth.vocab_size == 512
    assert all(ranks[bytes([b])] == b for b in range(256))
    assert synth.decode([synth.stop]) == "<|end|>"


def test_the_plain_template(synth):
    messages = [{"role": role, "content": role[:2]} for role in ("system", "user", "assistant")]
    pieces = synth.chat(messages)
    assert [synth.decode(p.ids) for p in pieces] == [
        "<|system|>", "sy", "", "<|user|>", "us", "", "<|assistant|>", "as", "<|end|>"]
    assert [p.turn for p in pieces] == [None, 0, None, None, 1, None, None, 2, None]


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="nonsense"):
        hf.tokenizer("nonsense")


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR: a folder with gpt2's files")
def test_gpt2_template():
    gpt2 = hf.tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.stop) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]  # as GPT-2's published vocabulary has it
    assert gpt2.stop not in gpt2.encode("<|endoftext|>")
    pieces = gpt2.chat([{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "Hi"}])
    assert gpt2.decode(sum((p.ids for p in pieces), [])) == "User:\nHello world\n\nAssistant:\nHi<|endoftext|>"


SCRIPT = ROOT / "datasets/make_tokenizer.py"


@pytest.fixture
def make_tokenizer(monkeypatch, capsys):
    """The script called in this process, which is faster: (exit code, what it says of a mistake, in one line)."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    main = runpy.run_path(str(SCRIPT))["main"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        try:
            code = cli.run(main) or 0
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        assert (code, said.count("\n")) in ((0, 0), (2, 1)), said
        return code, said

    return call


def test_the_shipped_ranks_are_what_the_script_makes(tmp_path):
    """On a tenth of the rows nearly all merges are the same, and the file is tiktoken's format."""
    out = tmp_path / "few.tiktoken"
    few_rows = ["--data", ROOT / "datasets/synth_train.jsonl", "--rows", "200", "--out", out]
    subprocess.run([sys.executable, SCRIPT, *few_rows], capture_output=True, check=True)
    lines = out.read_text().split("\n")
    assert len(lines) == 509 and base64.b64decode(lines[300].split()[0])
    shipped, few = data.read_ranks(data.SYNTH_RANKS), data.read_ranks(out)
    assert len(set(shipped) & set(few)) > 450


def test_a_rank_file_that_is_there_is_not_replaced_unasked(make_tokenizer, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "ranks.tiktoken"
    lines = (ROOT / "datasets/synth_train.jsonl").read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:60]))
    out.write_text("of a run\n")
    code, said = make_tokenizer("--data", rows, "--out", out)
    assert code == 2 and "--force" in said and out.read_text() == "of a run\n"
    assert make_tokenizer("--data", rows, "--out", out, "--force") == (0, "")
    made = out.read_bytes()
    assert len(data.read_ranks(out)) == 508
    assert make_tokenizer("--data", rows, "--out", out) == (0, "") and out.read_bytes() == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.tiktoken", "rows.jsonl"]


def test_the_data_is_not_replaced_by_the_ranks(make_tokenizer, tmp_path):
    rows, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    rows.write_text('{"text": "a"}\n')
    link.symlink_to(rows)
    for out in (rows, link):
        code, said = make_tokenizer("--data", rows, "--out", out, "--force")
        assert code == 2 and str(out) in said and rows.read_text() == '{"text": "a"}\n'


def test_mistakes_are_one_line(make_tokenizer, tmp_path):
    for arguments, expected in [
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--rows", 1], "too little text"),
        (["--rows", 0], "at least 1"),
        (["--data", ROOT / "datasets/synth_val.jsonl", "--rows", 60, "--out", tmp_path], str(tmp_path)),
    ]:
        out = [] if "--out" in arguments else ["--out", tmp_path / "out.tiktoken"]
        code, said = make_tokenizer(*arguments, *out)
        assert code == 2 and expected in said, said
    assert list(tmp_path.iterdir()) == []
