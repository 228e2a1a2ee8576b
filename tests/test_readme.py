"""The READMEs tell the truth: commands and flags exist, quoted code is the code, links and pictures lead somewhere."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = sorted(ROOT.glob("**/README.md"))
WINGS = ["hf", "evaluation", "support", "experiments", "datasets", "tests"]
COMMAND = re.compile(r"^.*(?:python |torchrun .*)(?:-m )?(?:\S+\.py|experiments\.\w+).*$", re.MULTILINE)
COMMANDS = [line.split("#")[0].strip(" `") for path in READMES for line in COMMAND.findall(path.read_text())
            if not line.startswith("|") and "python -c" not in line]
SCRIPTS = ["train.py", "eval.py", "data.py", "datasets/make_synth.py", "datasets/make_tokenizer.py",
           "datasets/download.py", "experiments.bench", "experiments.peers", "experiments.sweep", "experiments.report",
           "experiments.figures"]


@cache
def help_of(script):
    name = [script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run([sys.executable, *name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout) > 200 and done.stderr == ""
    return done.stdout


def test_there_are_commands():
    assert len(COMMANDS) > 12 and "pip install -r requirements.txt && python train.py --lam 2 --k 1" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command):
    for script in re.findall(r"(?:datasets/)?\b\w+\.py|experiments\.\w+", command):
        path = script if script.endswith(".py") else f"{script.replace('.', '/')}.py"
        assert any((ROOT / folder / path).exists() for folder in (".", "tests")), script
        if script == "jepa.py" or not re.search(r" --\w", command.split(script, 1)[1]):
            continue
        known = help_of(script)
        for flag in re.findall(r" (--\w+)", command.split(script, 1)[1].split("&&")[0].split("python")[0]):
            assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"
    for file in re.findall(r"datasets/\w+\.jsonl", command):
        assert (ROOT / file).exists() or "published" in file, file


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    name = script if script.endswith(".py") else f"-m {script}"
    assert f"python {name}" in help_of(script), "an example, as one would type it"
    assert "(default: None)" not in help_of(script), "None says nothing, and may contradict the text before it"


def test_the_quoted_code_is_the_code():
    quote = re.search(r"<!-- from jepa.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    source = (ROOT / "jepa.py").read_text()
    parts = [part.strip("\n") for part in quote.split("...\n")]
    assert len(parts) == 3 and all(len(part) > 60 and part in source for part in parts)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    text = path.read_text()
    for name in re.findall(r"\]\((?!http)<?([\w/.-]+)>?\)", text):
        assert (path.parent / name).exists(), name
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_every_room_is_in_the_tour():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name
    for wing in WINGS:
        assert f"]({wing}/README.md)" in README
        inside = (ROOT / wing / "README.md").read_text()
        for path in (ROOT / wing).glob("*.py"):
            assert f"`{path.name}`" in inside or path.name == "__init__.py", path


def test_the_readme_is_short():
    assert README.count("\n") <= 150
    assert "<!-- test command -->" in README and README.count("![") >= 3


def test_requirements_are_explained():
    """Each package has its reason behind it, or in a comment of its own line above."""
    for file in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.search(r"\S+\s+# \w", line), f"{file}: {line}"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.search(rf"\b{re.split('[<>=]', line)[0]}\b", README.split("## Dependencies")[1]), line


def test_tests_that_are_named_exist():
    """In tests/README.md; a name may be shortened by dots, and goes on in the file named before it."""
    file, text = None, (ROOT / "tests/README.md").read_text()
    names = re.findall(r"`(test_\w+\.py)?::(test_\w+?)_?(?:\.\.\.)?`", text)
    assert len(names) > 15
    for named, test in names:
        file = named or file
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
