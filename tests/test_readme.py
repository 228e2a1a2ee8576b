"""The README tells the truth: its commands and flags exist, its code is the code, its links lead somewhere."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^.*(?:python|torchrun) .*\.py.*$", README, re.MULTILINE)
            if not line.startswith("|")]


@cache
def help_of(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout) > 200 and done.stderr == ""
    return done.stdout


def test_there_are_commands():
    assert len(COMMANDS) > 8 and "pip install -r requirements.txt && python train.py --lam 2 --k 1" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command):
    script = re.search(r"\S+\.py", command).group()
    known = help_of(script)
    for flag in re.findall(r" (--\w+)", command.split(script)[1]):
        assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"
    for file in re.findall(r"datasets/\w+\.jsonl", command):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("script", ["train.py", "eval.py", "bench.py", "data.py", "datasets/make_synth.py",
                                    "datasets/make_tokenizer.py", "datasets/download.py"])
def test_help_teaches(script):
    assert f"python {script} " in help_of(script), "an example, as one would type it"


def test_the_quoted_code_is_the_code():
    quote = re.search(r"<!-- from jepa.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    source = (ROOT / "jepa.py").read_text()
    parts = [part.strip("\n") for part in quote.split("...\n")]
    assert len(parts) == 3 and all(len(part) > 60 and part in source for part in parts)


def test_files_that_are_named_exist():
    for name in re.findall(r"`([\w/]+\.py)`", README) + re.findall(r"\]\((?!http)([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name


def test_every_source_file_is_in_the_tour():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name


def test_requirements_are_explained():
    for line in (ROOT / "requirements.txt").read_text().split():
        assert re.search(rf"\b{re.split('[<>=]', line)[0]}\b", README.split("## Dependencies")[1]), line
