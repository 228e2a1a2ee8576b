"""What the commands share: flags with checked values, one-line errors, printing that cannot fail, files written whole.

A user's mistake ends in one line and exit code 2, and so does any failure to read or write a file.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: where (file:line), what is wrong, what to do."""

    code = 2  # exit code of the command


class Stopped(UserError):
    """The command did its work as far as it could, and cannot go on."""

    code = 1


# ---- flags


def parser(doc):
    """An ArgumentParser that prints `doc` as written and reports bad flags as UserError."""
    made = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)

    def error(message):
        message = re.sub(r"^argument (--\w+): (?=.*: must )", r"\1 ", message).removeprefix("argument ")
        raise UserError(f"{message} ({made.prog} --help lists the flags)")

    made.error = error
    return made


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag that has one, the description's own line breaks kept."""

    def _get_help_string(self, action):
        return action.help if isinstance(action.default, bool | None) else super()._get_help_string(action)


def number(least=0, most=math.inf, above=False, kind=float):
    """The `type` of a flag: a finite number from `least` (or `above` it) to `most`."""
    def convert(text):
        value = least
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and math.isfinite(value) and not (above and value == least):
                return value
        limits = f"{'above' if above else 'at least'} {least}" + (f" and at most {most}" if value > most else "")
        raise argparse.ArgumentTypeError(f"{text}: must be a {'whole' if kind is int else 'finite'} number, {limits}")
    return convert


def whole(least, most=2**31 - 1):
    """The `type` of a flag: a whole number from `least` to `most`."""
    return number(least, most, kind=int)


# ---- running a command


def run(main):
    """Call main() as a command: a UserError or a file that cannot be used -> one line, Ctrl-C -> exit code 130."""
    sys.stdin = sys.stdin or open(os.devnull)  # None: the shell has closed it
    sys.stdout, sys.stderr = (Unbreakable(s or open(os.devnull, "w")) for s in (sys.stdout, sys.stderr))
    try:
        for word in sys.argv[1:]:
            if re.fullmatch("--[^=]*=--", word):  # Python 3.11's argparse makes an empty list of it
                raise UserError(f"{word}: -- is no value; give one, or leave the flag out")
        main()
    except UserError as mistake:
        sys.exit(_say(f"error: {mistake}", mistake.code))
    except OSError as failure:
        where = f"{failure.filename}: " if failure.filename else ""
        sys.exit(_say(f"error: {where}{failure.strerror or failure}; give a file that can be used", 2))
    except (MemoryError, RuntimeError) as failure:
        if re.search(r"working C\+\+ compiler|working triton|find C compiler", str(failure)):
            sys.exit(_say("error: --compile needs a C++ compiler, or triton on a GPU; install it, or leave it out", 2))
        if isinstance(failure, RuntimeError) and not re.search("(out of|enough|allocate) memory", str(failure)):
            raise
        sys.exit(_say("error: out of memory; try a smaller --batch_size or model, or fewer or shorter rows", 2))
    except ImportError as failure:
        sys.exit(_say(f"error: {failure}; pip install -r requirements.txt -r tests/requirements.txt", 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def _say(line, code):
    """Print one line, whatever the files and flags that it quotes hold: control characters, or pages of text."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(line.split("\n")))
    print(shown if len(shown) < 1900 else f"{shown[:1500]} ... {shown[-300:]}", file=sys.stderr)
    return code


class Unbreakable:
    """A stream to print on, whatever happens to it: printing must never end a run. A character that its encoding lacks
    becomes an escape; when the reader leaves (head, a closed terminal) or the disk is full, the rest goes nowhere."""

    def __init__(self, stream):
        self.stream = stream
        self.write, self.flush = partial(self._try, stream.write), partial(self._try, stream.flush)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def _try(self, action, *text):
        try:
            return action(*text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


# ---- files


@contextlib.contextmanager
def writing(path):
    """A context whose value is the name to write a file under: it then becomes `path`, or on failure vanishes. So a
    file is there whole or not at all. Its folder is made if need be. UserError where that fails."""
    path = Path(path)
    unfinished = path.parent / (path.name + ".partial")
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror or failure}; choose a place that can be written") from None


def write(path, text):
    """Write a text file, whole or not at all (see `writing`)."""
    with writing(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "backslashreplace"))  # a file's name may be no text


def write_files(files, force):
    """Write {path: bytes}, all of them or none; other content that is already there needs `force`, the flag --force."""
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content and not force:
            raise UserError(f"{path}: exists with other content; move it away, or give --force to replace it")
    with contextlib.ExitStack() as all_written:
        for path, content in files.items():
            all_written.enter_context(writing(path)).write_bytes(content)


def write_json(path, value):
    write(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in a file. Raises UserError naming the file."""
    path = Path(path)
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > 2**26):  # a pipe would be waited for
            raise UserError(f"{path}: is no file of JSON of at most 64 MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(f"{path}: {failure}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value
