"""Whatever a file or a flag holds, a command does its work or says in one line what is wrong and where.

    python -m pytest tests/test_fuzz.py        # a small fixed budget, the same cases every time
    python tests/test_fuzz.py 10000            # about so many cases in all, others every time

A case fails on any exception that `cli.run` does not turn into a line, on a message of several lines or without its
place, after 10 seconds of computing, and when anything is written, removed or started outside the case's own folder.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # makes a folder for its cache, which is no case's doing
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import data  # noqa: E402
import eval as evaluate  # noqa: E402
import hf  # noqa: E402
import train  # noqa: E402
from evaluation import plots  # noqa: E402
from hf import runs, weights  # noqa: E402
from jepa import LLMJEPA  # noqa: E402
from model import Config, Decoder  # noqa: E402
from support import cli  # noqa: E402

BUDGET = {"rows": 150, "files": 100, "flags": 150, "runs": 30, "models": 40, "tokenizers": 4}  # cases under pytest
SHARE = {"rows": 0.35, "files": 0.15, "flags": 0.25, "runs": 0.12, "models": 0.12, "tokenizers": 0.01}  # of a large one
SECONDS, MEMORY = 10, 2**32  # what a case may take: seconds of computing (of waiting ten times as many), bytes
ENDED = {}  # kind: [seconds of each case, how many ended in a line]
KINDS = {}  # kind: (function that makes and runs a case, strategies of its arguments)


def kind(name, *strategies):
    def register(function):
        KINDS[name] = function, strategies
        return function
    return register


def try_cases(kind, count, derandomize):
    """Run so many cases of a kind; raises what the first bad one raised, made as simple as possible."""
    function, strategies = KINDS[kind]
    how = settings(max_examples=count, derandomize=derandomize, deadline=None, database=None,
                   phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    how(given(*strategies)(function))()


@pytest.mark.parametrize("kind", BUDGET)
def test_every_case_ends_well_or_in_one_line(kind):
    try_cases(kind, BUDGET[kind], derandomize=True)


# ---- running a case


class Hang(BaseException):
    """A case took too long."""


class Trespass(BaseException):
    """A case did something outside its folder."""


ALLOWED = []  # the folder of the case that is running
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
           "os.truncate": 1, "shutil.rmtree": 1}  # event: how many of its arguments are paths
SANDBOXES = (["-m", "hf.templates"], ["-m", "hf.weights"])  # processes with limits of their own
STARTED_BY = ("subprocess.Popen", "os.posix_spawn")  # the second from Python 3.13 on, by the first
STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def watch(event, args):
    """An audit hook: what happens outside the folder of the case that is running is an error."""
    if not ALLOWED:
        return
    touched = args[: CHANGES.get(event, 0)]
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITES:
        touched = args[:1]
    for path in map(os.fsdecode, touched):
        where = os.path.realpath(os.path.join(ALLOWED[0], path))
        if where != os.devnull and not where.startswith(str(ALLOWED[0])):
            raise Trespass(f"{event} {path}")
    if event in STARTS and not (event in STARTED_BY and args[1][1:3] in SANDBOXES):
        raise Trespass(f"{event} {args}")


sys.addaudithook(watch)


TIMERS = [(signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 10 * SECONDS)]


@contextlib.contextmanager
def limits():
    """10 seconds and 4 GB; outside, signals are as they were."""
    def too_long(*_):
        raise Hang(f"longer than {SECONDS} s")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    memory = resource.getrlimit(resource.RLIMIT_DATA)
    for timer, number, seconds in TIMERS:
        signal.signal(number, too_long)
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, memory[1]))
    try:
        yield
    finally:
        for timer, _, _ in TIMERS:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_DATA, memory)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def case(kind):
    """A context whose value is a new folder, the working directory, and a function that runs a command there."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        folder = Path(folder).resolve()
        with mock.patch.object(tempfile, "tempdir", str(folder)):
            yield folder, lambda action, place: run(kind, folder, action, place)


def run(kind, folder, action, place):
    """action() as a command's main; True if it did its work. A line that says why not must match `place`."""
    out, err = io.StringIO(), io.StringIO()
    record, began, code = ENDED.setdefault(kind, [[], 0]), time.monotonic(), None
    with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ALLOWED.append(folder)
        try:
            cli.run(action)
        except SystemExit as ended:
            code = ended.code
        finally:
            ALLOWED.clear()
            record[0].append(time.monotonic() - began)
    lines = [line for line in err.getvalue().split("\n") if line and not line.startswith(("skipped ", f"{folder}"))]
    note(f"code {code}, {lines}")
    if not code:
        assert lines == [], lines
        return True
    record[1] += 1
    assert code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    assert re.search(place, lines[0]) and "convert value" not in lines[0], lines
    assert len(lines[0]) < 2000, "a line that nobody reads"
    return False


# ---- odd values


LONG = "n" * 300  # longer than any file's name may be
ODD_NUMBERS = [0, -1, 1, 2, 0.5, -0.0, 2**31, 2**31 - 1, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 1e308, 1e-320,
               float("nan"), float("inf"), -float("inf")]
ODD_TEXTS = ["", " ", "\n", "\0", "x", "nan", "1e999", "../..", "/etc/passwd", LONG, "x" * 5000, "\ud800", "\ufdd0",
             "🙂", "<|end|>", "<|user|>", "{{ 1 / 0 }}", "\x1b[31m", "\u2028", "\r", "__class__", "@deep", "@huge"]
ODD = st.sampled_from([None, True, False, [], {}, [[]], *ODD_NUMBERS, *ODD_TEXTS])
NUMBERS = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats()
TEXTS = st.sampled_from([*ODD_TEXTS, "user", "assistant", "system"]) | st.text(max_size=30)
JSON = st.recursive(ODD | st.text(max_size=8) | st.integers() | st.floats(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=6).map(copy.deepcopy)  # what is drawn may be changed, and must not be shared


@st.composite
def near(draw, values):
    """One of these JSON values, in which up to four places are changed: replaced, left out, doubled or added."""
    value = json.loads(json.dumps(draw(st.sampled_from(values))))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 4]))):
        value = changed(draw, value)
    return value


def changed(draw, value):
    """The value with one place in it changed; mostly a text stays some text, a number some number."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 19)):
        return changed_inside(draw, value)
    likely = {str: TEXTS, int: NUMBERS, float: NUMBERS}.get(type(value), JSON)
    return draw(likely if draw(st.integers(0, 3)) else JSON)


def changed_inside(draw, value):
    places = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    place = draw(st.sampled_from(places))
    how = draw(st.sampled_from([*8 * ["inside"], "remove", "double", "add"]))
    if how == "inside":
        value[place] = changed(draw, value[place])
    elif how == "remove":
        del value[place]
    elif isinstance(value, list):
        value.insert(place, value[place] if how == "double" else draw(JSON))
    else:
        value[draw(st.sampled_from([*WORDS, *places]))] = value[place] if how == "double" else draw(JSON)
    return value


WORDS = "messages text code prompt completion group role content system assistant arguments".split()


def dumped(value):
    """JSON text, in which @deep is nested 100,000 deep and @huge is a number of 5,000 digits."""
    return json.dumps(value).replace('"@deep"', "[" * 100_000 + "]" * 100_000).replace('"@huge"', "9" * 5000)


@st.composite
def damaged(draw, content):
    """These bytes with some changed, cut off, doubled, or all replaced."""
    how = draw(st.sampled_from(["none", "flip", "flip", "cut", "insert", "replace", "zero", "empty", "other"]))
    at = draw(st.integers(0, len(content)) | st.integers(0, min(len(content), 300)))
    odd = [b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 64, b"\n\n", b"\r\n", b"[" * 2000, b'"', b"\\ud800", b"<|end|>"]
    some = draw(st.binary(min_size=1, max_size=40) | st.text(min_size=1).map(str.encode) | st.sampled_from(odd))
    return {
        "none": content,
        "flip": content[:at] + bytes(b ^ some[0] for b in content[at : at + 1]) + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + some + content[at:],
        "replace": content[:at] + some + content[at + len(some) :],
        "zero": content[:at] + bytes(len(content) - at),
        "empty": b"",
        "other": some,
    }[how]


# ---- rows and files


def turn(role, content):
    return {"role": role, "content": content}


QUESTION, ANSWER, SYSTEM = turn("user", "lines with a vowel"), turn("assistant", "[aeiou].*"), turn("system", "Answer.")
ROWS = [
    {"messages": [SYSTEM, QUESTION, ANSWER]},
    {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
    {"messages": [QUESTION, ANSWER], "text": "a vowel", "code": [ANSWER]},
    {"messages": [SYSTEM, QUESTION], "group": 7},
    {"messages": [turn("user", "lines that have a vowel")], "group": 7},
    {"prompt": "lines with a vowel", "completion": "[aeiou].*"},
    {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
    {"text": "lines with a vowel", "code": "[aeiou].*"},
    {"text": "plain text"},
]


@cache
def tiny_model():
    torch.manual_seed(0)
    return LLMJEPA(Decoder(Config(512, 1, 2, 16, 32, block_size=512)), 2)


def train_on(path, layout, targets, limit):
    """What training does with a file of rows, up to the gradient."""
    args = train.check(train.FLAGS.parse_args(["--data", str(path), "--layout", layout]))
    too_long = "skip" if limit < 200 else "refuse"
    _, examples = data.training_set(path, hf.tokenizer("synth"), limit, 2, too_long, train_on=targets)
    train.check_views(args, path, examples)
    for start in range(0, len(examples), 2):
        losses = tiny_model()(data.collate(examples[start : start + 2], 2, layout), 1.0)
        losses.total.backward()
        assert losses.total.isfinite()


def show(path, row, layout, targets):
    """What data.py prints of a file."""
    arguments = ["data.py", path.name, "--row", str(row), "--layout", layout, "--train_on", targets]
    with mock.patch.object(sys, "argv", arguments):
        data.main()


@kind("rows", near(ROWS).map(dumped), st.integers(1, 4), st.sampled_from(["fused", "paper"]),
      st.sampled_from(["answer", "all"]), st.sampled_from([0, 40, 512]))
def a_row(row, number, layout, targets, limit):
    """One odd row among good ones, used for training or (limit 0) shown: a complaint must name its line."""
    lines = [json.dumps(good) for good in (ROWS[0], *(ROWS[3:5] if targets == "all" else ROWS[:2]))]
    lines.insert(number - 1, row)
    with case("rows") as (folder, run):
        path = folder / "rows.jsonl"
        path.write_text("\n".join(lines))
        action = (lambda: train_on(path, layout, targets, limit)) if limit else (
            lambda: show(path, number, layout, targets))
        run(action, rf"rows\.jsonl(:{number})?: ")


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@kind("files", damaged(LINES) | damaged(LINES[: len(LINES) // 8]) | st.binary(max_size=200))
def a_file(content):
    with case("files") as (folder, run):
        path = folder / "rows.jsonl"
        path.write_bytes(content)
        run(lambda: show(path, 1, "paper", "all"), r"rows\.jsonl(:\d+)?: ")


# ---- flags


VALUES = st.sampled_from([
    *map(str, ODD_NUMBERS), "1e400", "-1e-400", "+5", "٣", "1_000", "0x10", "9" * 5000, "", " ", "true", "None", "[]",
    "{", "%s", "--", "cpu", "meta", "cuda:99", "tiny", "synth", "gpt2x", "a/b/c", "rows.jsonl", "none.jsonl", "folder",
    ".", "/", "/dev/null", "rows.jsonl/x", LONG, "x/" * 3000, "\udcff\udcfe", "ж" * 200, "a\nb", "\x1b[31m",
]) | st.integers().map(str) | st.floats().map(str) | st.text(st.characters(exclude_characters="\0"), max_size=8)


def prepared():
    """What train.py does before its first step; what cannot be made in 10 seconds is left out."""
    args = train.arguments()
    if args.n_layer * args.d_model**2 < 10**7 and not args.compile:
        train.prepare(args)


def evaluated():
    """What eval.py does before it opens anything."""
    evaluate.check(evaluate.FLAGS.parse_args())


COMMANDS = {"train.py": prepared, "eval.py": evaluated, "data.py": data.main}


@cache
def flags_of(command):
    """The flags of a command, as argparse knows them."""
    def taken(parser):
        raise Taken(parser._actions)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", taken), pytest.raises(Taken) as caught:
        COMMANDS[command]()
    return [action for action in caught.value.args[0] if action.dest != "help"]


class Taken(Exception):
    """Carries a parser's flags out of the command."""


def usual(flag):
    """Values that a flag takes."""
    found = list(flag.choices or [])
    for text in ["1", "2", "0.5", "0", "rows.jsonl", "synth", "cpu", "folder"]:
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            found += [text] if flag.type and flag.type(text) is not None and not flag.choices else []
    return found or ["synth"]


@st.composite
def command_lines(draw):
    """A command and flags with likely and unlikely values."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    line = ["rows.jsonl"] if command == "data.py" else ["--data=rows.jsonl"]
    for flag in draw(st.lists(st.sampled_from(flags_of(command)), max_size=4)):
        value, name = draw(st.sampled_from(usual(flag)) | VALUES), "".join(flag.option_strings[:1])
        joined = name and draw(st.booleans())
        line += [name] if flag.nargs == 0 else [f"{name}={value}"] if joined else [name, value]
    return command, list(filter(None, line))


@kind("flags", command_lines())
def a_command_line(given):
    command, line = given
    with case("flags") as (folder, run):
        (folder / "rows.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
        (folder / "folder").mkdir()
        with mock.patch.object(sys, "argv", [command, *line]):
            run(COMMANDS[command], "")


# ---- run folders


@cache
def tiny_run():
    """A folder with a finished run and its data."""
    folder = Path(tempfile.mkdtemp()).resolve()
    lines = (ROOT / "datasets" / "synth_val.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join(lines[:8]))
    line = "--data rows.jsonl --val rows.jsonl --n_layer 1 --d_model 16 --n_head 2 --epochs 1 --batch_size 4 --out run"
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["train.py", *line.split()]), limits():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main()
    return folder


def resume(run):
    """Go on with a run, but do not train."""
    line = ["train.py", "--resume", str(run)]
    with mock.patch.object(sys, "argv", line), mock.patch.object(train, "fit", lambda run: True):
        train.main()


def look_at(run):
    """What eval.py does with a run before its first question."""
    opened = runs.open_model(run, torch.device("cpu"))
    opened.tokenizer.encode("lines")


def draw_curves(run):
    plots.curves([run], run / "loss.png")


PAYLOAD = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle that runs a command
RUN_FILES = ["config.json", "log.jsonl", "checkpoint/config.json", "best/config.json", "checkpoint/training.pt",
             "checkpoint/pred.safetensors", "best/pred.safetensors", "checkpoint/model.safetensors"]


@kind("runs", st.data())
def a_run(drawn):
    name = drawn.draw(st.sampled_from(RUN_FILES))
    action = drawn.draw(st.sampled_from([resume, look_at] if name != "log.jsonl" else [resume, draw_curves]))
    content = (tiny_run() / "run" / name).read_bytes()
    if name.endswith(".json") and drawn.draw(st.booleans()):
        new = dumped(drawn.draw(near([json.loads(content)]))).encode()
    else:
        new = drawn.draw(damaged(content) | st.sampled_from([PAYLOAD, None]))
    with case("runs") as (folder, run):
        shutil.copytree(tiny_run() / "run", folder / "run")
        with contextlib.suppress(IsADirectoryError):
            (folder / "run" / name).unlink() if new is None else (folder / "run" / name).write_bytes(new)
        run(lambda: action(folder / "run"), "" if name == "config.json" else "run")  # config.json names other files
        assert not (folder / "executed").exists()


# ---- Hugging Face folders


MODEL = ROOT / "tests" / "oracle" / "model"


def copy_model(drawn, folder, name):
    """A copy of a small model in which a file is damaged."""
    content = (MODEL / name).read_bytes()
    shutil.copytree(MODEL, folder / "model")
    if name.endswith(".json") and drawn.draw(st.integers(0, 3)):
        content = dumped(drawn.draw(near([json.loads(content)]))).encode()
    elif name.endswith(".safetensors") and drawn.draw(st.booleans()):
        size = int.from_bytes(content[:8], "little")
        header = dumped(drawn.draw(near([json.loads(content[8 : 8 + size])]))).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        content = drawn.draw(damaged(content))
    (folder / "model" / name).write_bytes(content)


@kind("models", st.data())
def a_model(drawn):
    name = drawn.draw(st.sampled_from(["config.json", "model.safetensors"]))
    with case("models") as (folder, run):
        copy_model(drawn, folder, name)
        run(lambda: weights.load(folder / "model"), "model")


@kind("tokenizers", st.data())
def a_tokenizer(drawn):
    name = drawn.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]))
    with case("tokenizers") as (folder, run):
        copy_model(drawn, folder, name)

        def talk():
            tokenizer = hf.tokenizer(str(folder / "model"))
            data.example(data.Conversation([SYSTEM, QUESTION, ANSWER], "rows.jsonl:1"), tokenizer)
            tokenizer.decode(tokenizer.encode("<|end|> a\0b"))

        run(talk, "")


# ---- as a script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int, help="how many, in all")
    parser.add_argument("--kinds", nargs="*", choices=SHARE, default=list(SHARE), help="only these (default: all)")
    args = parser.parse_args()
    share = sum(SHARE[kind] for kind in args.kinds)
    for kind in args.kinds:
        wanted = max(1, round(args.cases * SHARE[kind] / share))
        try_cases(kind, wanted, derandomize=False)
        seconds, complaints = ENDED[kind]
        print(f"{kind:10} {len(seconds):6,} cases: {len(seconds) - complaints:6,} did their work, {complaints:6,} "
              f"ended in a line; {sum(seconds):5.0f} s, the slowest {max(seconds):.1f} s", flush=True)
    print(f"{sum(len(seconds) for seconds, _ in ENDED.values()):,} cases, none with a traceback")


if __name__ == "__main__":
    sys.exit(main())
