"""Names to tokenizers, the plain chat template, and text that must stay text."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

import data
import hf
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


def test_gpt2_template(monkeypatch):
    """Needs tiktoken's own files: with TIKTOKEN_CACHE_DIR set, or kept in the folder beside the repository."""
    beside = ROOT.parent / "shared" / "tiktoken"
    if beside.exists():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(beside))
    try:
        gpt2 = hf.tokenizer("gpt2")
    except UserError:
        pytest.skip("tiktoken's gpt2 files are not at hand")
    assert (gpt2.vocab_size, gpt2.stop) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]  # as GPT-2's published vocabulary has it
    assert gpt2.stop not in gpt2.encode("<|endoftext|>")
    pieces = gpt2.chat([{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "Hi"}])
    assert gpt2.decode(sum((p.ids for p in pieces), [])) == "User:\nHello world\n\nAssistant:\nHi<|endoftext|>"


def test_the_shipped_ranks_are_what_the_script_makes(tmp_path):
    """On a tenth of the rows nearly all merges are the same, and the file is tiktoken's format."""
    out = tmp_path / "few.tiktoken"
    rows = ROOT / "datasets/synth_train.jsonl"
    command = [sys.executable, ROOT / "datasets/make_tokenizer.py", "--data", rows, "--rows", "200", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    lines = out.read_text().split("\n")
    assert len(lines) == 509 and base64.b64decode(lines[300].split()[0])
    shipped, few = data.read_ranks(data.SYNTH_RANKS), data.read_ranks(out)
    assert len(set(shipped) & set(few)) > 450


def test_a_missing_file_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "datasets/make_tokenizer.py", "--data", tmp_path / "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.jsonl" in done.stderr
