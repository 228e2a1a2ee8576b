"""What strangers wrote runs in a process of its own, which may use so much memory and time and no more.

A chat template can loop for ever, a tokenizer can double a text with every rule it has, a pickle of a few kilobytes can
unpack to gigabytes. Rather than look for each of these, `start` has such work done by a module of this package in
another process. Questions and answers are lines of JSON. The operating system ends a process that goes beyond its
limits, and its question then raises UserError.
"""

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from support.cli import UserError

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 2**24  # characters of a question or an answer
MEMORY, SECONDS = 2**29, 5  # what a process may use beyond what it begins with; more where it is given large files


def start(module, path, size):
    """A function (name, *arguments) -> value that has one of the functions which `module` serves for `path` called.

    size: bytes that it has to read from there. Raises UserError, with the path in front, for whatever fails over there.
    """
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search, "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen([sys.executable, "-m", module, str(path), str(size)], env=environment,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(name, *arguments):
        question = json.dumps([name, *arguments]).encode() + b"\n"
        if len(question) > LONGEST:
            raise UserError(f"{path}: a text of {len(question):,} bytes is longer than any model reads")
        try:
            child.stdin.write(question)
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:  # the child has ended
            answer = b""
        except BaseException:  # Ctrl-C: what is still to come must not be taken for the answer to the next question
            child.kill()
            raise
        if not answer:
            raise UserError(f"{path}: reading it takes more memory or time than any real model needs, so it was stopped")
        value, complaint = json.loads(answer)
        if complaint:
            raise UserError(complaint)
        return value

    weakref.finalize(ask, end, child)
    return ask


def end(child):
    child.kill()
    child.communicate()


def serve(make):
    """Answer the questions on stdin, with what make(path) -> {name: function} gives, until the process that asks ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these are for the process that asks
        signal.signal(number, signal.SIG_IGN)
    path, size, functions, begins_with = sys.argv[1], int(sys.argv[2]), None, memory_in_use()
    answers, sys.stdout = sys.stdout, sys.stderr  # a library may print
    for question in sys.stdin:
        allow(size + len(question), begins_with)
        name, *arguments = json.loads(question)
        try:
            functions = functions or make(path)
            answer = json.dumps([functions[name](*arguments), None])
            if len(answer) > LONGEST:
                raise UserError(f"{path}: makes {len(answer):,} bytes of a text of {len(question):,}")
        except Exception as failure:  # whatever strange input provokes
            reason = str(failure) if isinstance(failure, UserError) else f"{path}: {type(failure).__name__}: {failure}"
            answer = json.dumps([None, reason[:1000]])
        print(answer, file=answers, flush=True)


def memory_in_use():
    """Bytes of data in this process; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def allow(size, begins_with):
    """Limit this process from here on. size: bytes of what it is given to work on."""
    import resource  # Unix only

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = begins_with + MEMORY + 4 * size
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS + size / 2**21)  # of computing; its signal ends the process at once
