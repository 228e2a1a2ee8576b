"""Regexes compared as languages: against laws, against all short strings, and within bounds whatever is asked."""

import doctest
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import regexes

ROOT = Path(__file__).resolve().parent.parent


def test_docstring_examples():
    assert doctest.testmod(regexes) == (0, 1)


@pytest.mark.parametrize(("one", "other"), [
    ("(a)&(b)", "~(.*)"),  # no string is both: the empty language
    ("~((a)|(b))", "~(a)&~(b)"), ("~((a)&(b))", "~(a)|~(b)"), ("~(~(a.*))", "a.*"),  # De Morgan
    ("a|b&c", "a|(b&c)"), ("a&b|c", "(a&b)|c"), ("ab&a.", "ab"), ("ab*", "a(b*)"), ("~a*", "(~a)*"), ("~ab", "(~a)b"),
    ("ab|cd", "(ab)|(cd)"), ("~~a", "a"), ("a**", "a*"), ("(a|b)*", "(a*b*)*"), ("a+", "aa*"), ("a?", "a|()"),
    ("a{2,}", "aaa*"), ("a{2}", "aa"), ("a{1,3}", "a|aa|aaa"), ("a{0}", "()"), ("a{3,2}", "~(.*)"),
    ("(a{3,2}){2}", "~(.*)"), ("(a{3,2})*", "()"), ("(a?){3}", "a{0,3}"), ("(a*){3,}", "a*"), ("(~(.*)){0,}", "()"),
    ("[ab]", "a|b"), ("[a-c]", "[abc]"), ("[^a]", "~(a)&."), ("[A-Za-z]", "[a-zA-Z]"), ("a\nb", "a[\n]b"),
    (r"\bdog\b", "bdogb"), (r"\^a\$", "^a$"), (r"[\]a]", r"\]|a"), (r"\.", "[.]"), (".*.*", ".*"), ("dog.*.*", "dog.*"),
    ("((dog.*..*)|(truck)){6,}", "(((dog.*..*)|(truck)){6,})&((.)*)"),
    ("~((dog.*[0-9].*){3,})", ".*&~((dog.*[0-9].*){3}(dog.*[0-9].*)*)"),
])
def test_equal_languages(one, other):
    assert regexes.same_regex(one, other) and regexes.same_regex(other, one)


@pytest.mark.parametrize(("one", "other"), [
    ("(.*)(([0-9]){2,})", "((.*)([0-9])){2,}"),  # the two readings of "lines ending with a number, 2 or more times"
    ("(a)&(b)", "a"), ("(a)&(b)", "()"), ("(a|b)&c", "a|(b&c)"), ("~(ab)", "(~a)b"), ("~(a*)", "~a*"), ("(ab)*", "ab*"),
    ("a{2,}", "a{3,}"), ("a{2}", "a{2,}"), ("a{1,3}", "a{1,4}"), ("a*", "a+"), ("[a-c]", "[ac]"), ("[^a]", "~(a)"),
    (r"\bdog\b", "dog"), (r"\.", "."), (".", "[a-z]"), ("dog", "Dog"), ("", "()"), (" ", ".*"),
    ("^dog$", "(a)&(b)"), ("dog|^", "dog"), ("^", "$"),  # letters like any other, as in dk.brics
])
def test_different_languages(one, other):
    assert not regexes.same_regex(one, other) and not regexes.same_regex(other, one)


@pytest.mark.parametrize("broken", [
    "(a", "a)", "*a", "a|", "|a", "a&&a", "[a", "[]", "[z-a]", "a{,2}", "a{", "a{x}", "~", "a\\", "()*)", "a]",
    "#", '"a"', "@", "<1-9>",  # dk.brics gives these a meaning, NL-RX does not use them
])
def test_what_is_no_regex_equals_only_its_own_text(broken):
    assert not regexes.same_regex(broken, "a") and not regexes.same_regex("a", broken)
    assert not regexes.same_regex(broken, "".join("\\" + letter for letter in broken)), "its signs are no letters"
    assert regexes.same_regex(broken, broken + " ")


@pytest.mark.parametrize("one", ["[[a]", "[a--b]", "[a||b]", "[a&&b]", "[a~~b]"])
def test_odd_classes_say_nothing(one, recwarn):
    """Python may give these another meaning one day, and says so on the terminal: here they have none but their own."""
    regexes.character_class.cache_clear()
    regexes.same_regex(one, f"({one})")
    assert not recwarn.list


@pytest.mark.parametrize(("bound", "value", "answer"), [("MAX_REGEX", 15, False), ("MAX_STEPS", 60, None)])
def test_equality_beyond_a_bound_is_not_decided(monkeypatch, bound, value, answer):
    assert regexes.same_regex("(dog.*){3,}", "(dog.*){2}(dog.*)+")
    monkeypatch.setattr(regexes, bound, value)
    assert regexes.same_regex("(dog.*){3,}", "(dog.*){2}(dog.*)+") is answer


@pytest.mark.parametrize(("one", "other"), [
    (".*a" + "." * 18, "(.*(a|a)" + "." * 18 + ")|(.*ba" + "." * 18 + ")"),
    ("(.*a" + "." * 40 + ".*)&(.*b)", "~(b.*)&(.*a" + "." * 40 + ".*)&(.*b)"),
])
def test_too_large_to_decide_is_neither_yes_nor_no(one, other):
    """Deterministic automata of these have 2 ** 18 states and more."""
    started = time.monotonic()
    assert regexes.same_regex(one, other) is None
    assert time.monotonic() - started < 20


def test_the_alphabet_has_a_character_of_each_kind():
    """a, b to d, e, f to z, and all others are what these letters tell apart."""
    languages = regexes.Languages()
    regexes.parse("a|[a-e]|[e-z]|.", languages)
    kinds = [[regexes.stands_for(letter, c) for letter in ("a", "[a-e]", "[e-z]")] for c in languages.alphabet()]
    assert sorted(kinds) == [[False] * 3, [False, False, True], [False, True, False], [False, True, True],
                             [True, True, False]]


def test_a_step_is_paid_for_every_part_of_a_union():
    languages = regexes.Languages()
    parts = [languages.number(False, "letter", name) for name in range(100)]
    before = languages.steps
    languages.union(*parts)
    assert languages.steps >= before + 100


def random_regex(depth, draw):
    """(text, its strings of at most five letters) where the letters are a, b, and c for any other character."""
    kind = draw.choice(["letter", "or", "and", "not", "then", "repeat"]) if depth else "letter"
    if kind == "letter":
        return draw.choice([("a", {"a"}), ("b", {"b"}), (".", {"a", "b", "c"}), ("[ab]", {"a", "b"}), ("()", {""})])
    (one, left), (other, right) = (random_regex(depth - 1, draw) for _ in "12")
    if kind == "or":
        return f"({one})|({other})", left | right
    if kind == "and":
        return f"({one})&({other})", left & right
    if kind == "not":
        return f"~({one})", {"".join(word) for n in range(6) for word in itertools.product("abc", repeat=n)} - left

    def then(first, second):
        return {x + y for x in first for y in second if len(x) + len(y) <= 5}

    if kind == "then":
        return f"({one})({other})", then(left, right)
    low, high = draw.choice([(0, None), (1, None), (2, None), (0, 1), (2, 2), (1, 3)])
    power, strings = {""}, set() if low else {""}
    for times in range(1, 1 + (high or low + 5)):
        power = then(power, left)
        strings |= power if times >= low else set()
    return f"({one}){{{low},{high or ''}}}", strings


def test_against_all_short_strings():
    """Random regexes are equal exactly if the sets of their short strings are (five letters tell these apart)."""
    draw = random.Random(0)
    drawn = [random_regex(2, draw) for _ in range(60)]
    pairs = list(itertools.combinations(drawn, 2))
    equal = [left == right for (_, left), (_, right) in pairs]
    assert sum(equal) > 30
    assert [regexes.same_regex(one, other) for (one, _), (other, _) in pairs] == equal


HOSTILE = [
    "a{1000000,}", "((((a{1000}){1000}){1000}){1000}){1000}", "~(.*a" + "." * 18 + ".*)",
    "(" * 190 + "a" + ")" * 190, "(" * 9999, "~" * 9999, "(a*" * 130 + ")*" * 130,
    "a" * 10**6, "[" * 10**6, "&".join(f"(.*{letter}.*)" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "*".join(map(chr, range(0x4E00, 0x4E00 + 199))), "((a|b){1,50}){1,50}(.*c){1,9}", "[\0-\U0010ffff]*", "[\ud800]",
]
RUN_HOSTILE = """
import json, resource, sys
from evaluation import regexes
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
found = [regexes.same_regex(regex, "~((dog.*truck.*){7,})") for regex in json.load(sys.stdin)]
status = open("/proc/self/status").read()  # not ru_maxrss, which begins with the memory of the process that forked
print(json.dumps([found, int(status.split("VmHWM:")[1].split()[0])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_hostile_regexes_end(tmp_path):
    """Run in a process of its own, so that one that never ends is a failure rather than a test that never ends."""
    done = subprocess.run([sys.executable, "-c", RUN_HOSTILE], input=json.dumps(HOSTILE), capture_output=True,
                          text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found, peak = json.loads(done.stdout)
    assert not any(found)
    assert peak < 500_000, "kilobytes"
