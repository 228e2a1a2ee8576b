"""What the commands share: a user's mistake ends in one line and exit code 2, `--help` shows every default, and a
file is written whole or not at all."""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: where (file:line), what is wrong, what to do."""


def parser(doc):
    """An ArgumentParser that prints `doc` as written and reports bad flags as UserError."""
    made = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)

    def error(message):
        raise UserError(f"{message} ({made.prog} --help lists the flags)")

    made.error = error
    return made


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag, the description's own line breaks kept."""


def run(main):
    """Call main() as a command: UserError -> one line and exit code 2, Ctrl-C -> 130, a closed pipe is no error."""
    try:
        main()
    except UserError as mistake:
        sys.exit(_say(f"error: {mistake}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) left: nothing to say, and nobody to say it to
        sys.exit(0)


def _say(line, code):
    print(" ".join(line.split("\n")), file=sys.stderr)
    return code


@contextlib.contextmanager
def writing(path):
    """A context whose value is the name to write a file under: it then becomes `path`, or on failure vanishes.

    So a file is there whole or not at all. Its folder is made if need be. Raises UserError where that fails.
    """
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
        unfinished.write_text(text, encoding="utf-8")


def write_json(path, value):
    write(path, json.dumps(value, indent=1) + "\n")
