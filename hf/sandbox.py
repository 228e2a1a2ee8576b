"""What strangers wrote runs in a process of its own, which may use so much memory and time and no more.

A chat template can loop for ever, a tokenizer can double a text with every rule it has, a pickle of a few kilobytes can
unpack to gigabytes. Rather than look for each of these, `start` has such work done by a module of this package in
another process. Questions and answers are lines of JSON. The operating system ends a process that goes beyond its
limits, and its question then raises UserError.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from support.cli import UserError

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 2**24  # characters of a question or an answer
MEMORY, SECONDS = 9 * 10**8, 5  # what a process may use: bytes of data, seconds of computing for an answer


def start(module, path, size):
    """A function (name, *arguments) -> value that has one of the functions which `module` serves for `path` called;
    UserError, with the path in front, for whatever fails over there. size: bytes that it has to read from `path`."""
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
            raise UserError(f"{path}: stopped, because it takes more memory or time than any real model needs")
        value, complaint = json.loads(answer)
        if complaint:
            raise UserError(complaint)
        return value

    owner = os.getpid()  # a fork of this process would wait for a child that is not its own
    weakref.finalize(ask, lambda: os.getpid() == owner and (child.kill(), child.communicate()))
    return ask


def serve(make):
    """Answer questions by the functions of make(path) -> {name: function}, until the process that asks them ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these are for the process that asks
        signal.signal(number, signal.SIG_IGN)
    path, size, functions = sys.argv[1], int(sys.argv[2]), None
    answers, sys.stdout = sys.stdout, sys.stderr  # a library may print
    for question in sys.stdin:
        limit(size + len(question))
        name, *arguments = json.loads(question)
        try:
            functions = functions or make(path)
            answer = json.dumps([functions[name](*arguments), None])
            if len(answer) > LONGEST:
                raise UserError(f"{path}: makes {len(answer):,} bytes of a text of {len(question):,}")
        except Exception as failure:  # whatever strange input provokes
            reason = str(failure) if isinstance(failure, UserError) else f"{path}: {type(failure).__name__}: {failure}"
            answer = json.dumps([None, " ".join(reason[:1000].split())])
        print(answer, file=answers, flush=True)


def limit(size):
    """Limit what this process may use from here on, in proportion to the bytes that it is given to work on."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    data = MEMORY + 4 * size if hard == resource.RLIM_INFINITY else min(MEMORY + 4 * size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (data, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS + size / 2**21)  # its signal ends the process, whatever it is doing
