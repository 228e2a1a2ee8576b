"""What the commands share: a user's mistake ends in one line and exit code 2, and `--help` shows every default."""

import argparse
import sys


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
