"""What the commands share: a user's mistake ends in one line and exit code 2, `--help` shows every default, and a text
file is written whole or not at all."""

import argparse
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


def write(path, text):
    """Write a text file, whole or not at all; its folder is made if need be. Raises UserError where that fails."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}; choose a place that can be written (--out)") from None


def write_json(path, value):
    write(path, json.dumps(value, indent=1) + "\n")
