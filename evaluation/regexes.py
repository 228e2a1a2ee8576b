"""NL-RX's own metric: two regexes are right when they describe the same lines, whatever they look like.

In: two regexes in the syntax of NL-RX (`&` intersection, `~` complement, `\\b` the plain letter b). Out: True, False,
or None if it takes more than MAX_STEPS steps to decide. Steps are counted, so the answer is the same on any machine.

The derivative of a language by a character is what may follow that character in its strings (Brzozowski 1964). From
the pair of both regexes, all pairs of derivatives are visited: the languages are equal if there is none of which just
one has the empty string. Derivatives take & and ~ in their stride, and only those that are reached are made.
"""

import ast
import functools
import math
import re
import warnings

TOKEN = re.compile(r"\(\) | \[\^?(?:\\.|[^]\\])+] | \{[0-9]+(?:,[0-9]*)?} | \\. | [.*+?~&|()] | [^][{}\\\"#@<>]",
                   re.VERBOSE | re.DOTALL)
REPEAT = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}
MAX_REGEX = 400  # characters; the longest of NL-RX-SYNTH has 54
MAX_STEPS = 1_000_000  # some seconds; the hardest pair of real rows met took a seventh
EMPTY, EPSILON, EVERYTHING = 0, 1, 2  # the numbers of {}, {""} and all strings


class TooLarge(Exception):
    """The question takes more than MAX_STEPS steps."""


class Languages:
    """Regular languages as numbered terms. Equal terms get one number, a union is a set: so few are made.

    ("letter", token), ("union", parts), ("not", part), ("sequence", first, second), ("repeat", part, low, high)
    """

    def __init__(self):
        self.terms, self.nullable, self.numbers, self.derivatives, self.steps = [], [], {}, {}, 0
        self.number(False, "union", frozenset())  # EMPTY
        self.number(True, "repeat", EMPTY, 0, 0)  # EPSILON
        self.number(True, "not", EMPTY)  # EVERYTHING

    def pay(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TooLarge

    def number(self, nullable, *term):
        """The number of a term; nullable: does it contain the empty string?"""
        self.pay(1)
        if term not in self.numbers:
            self.numbers[term] = len(self.terms)
            self.terms.append(term)
            self.nullable.append(nullable)
        return self.numbers[term]

    def union(self, *parts):
        flat = set()
        for part in parts:
            kind, *inner = self.terms[part]
            flat |= inner[0] if kind == "union" else {part}
        self.pay(len(flat))
        if EVERYTHING in flat:
            return EVERYTHING
        if len(flat) == 1:
            return flat.pop()
        return self.number(any(self.nullable[part] for part in flat), "union", frozenset(flat))

    def complement(self, part):
        kind, *inner = self.terms[part]
        return inner[0] if kind == "not" else self.number(not self.nullable[part], "not", part)

    def intersection(self, one, other):
        return self.complement(self.union(self.complement(one), self.complement(other)))

    def sequence(self, first, second):
        if EMPTY in (first, second):
            return EMPTY
        if EPSILON in (first, second):
            return second if first == EPSILON else first
        kind, *inner = self.terms[first]
        if kind == "sequence":  # a(bc) rather than (ab)c, so that equal ones are one term
            return self.sequence(inner[0], self.sequence(inner[1], second))
        return self.number(self.nullable[first] and self.nullable[second], "sequence", first, second)

    def repetition(self, part, low, high):
        """low to high times `part`, the empty language if low > high. Never unrolled: {1000000,} is one term."""
        if low > high or (part == EMPTY and low > 0):
            return EMPTY
        if high == 0 or part in (EMPTY, EPSILON):
            return EPSILON
        low = 0 if self.nullable[part] else low
        return self.number(low == 0, "repeat", part, low, high)

    def derivative(self, number, character):
        """What follows a character in the strings of a language."""
        self.pay(1)
        if (number, character) in self.derivatives:
            return self.derivatives[number, character]
        kind, *inner = self.terms[number]
        if kind == "letter":
            result = EPSILON if stands_for(inner[0], character) else EMPTY
        elif kind == "union":
            result = self.union(*(self.derivative(part, character) for part in inner[0]))
        elif kind == "not":
            result = self.complement(self.derivative(inner[0], character))
        elif kind == "sequence":
            result = self.sequence(self.derivative(inner[0], character), inner[1])
            if self.nullable[inner[0]]:
                result = self.union(result, self.derivative(inner[1], character))
        else:
            part, low, high = inner
            rest = self.repetition(part, max(low - 1, 0), high - 1)
            result = self.sequence(self.derivative(part, character), rest)
        self.derivatives[number, character] = result
        return result

    def alphabet(self):
        """One character of each kind, where two are of a kind if no letter of the regexes tells them apart."""
        letters = [term[1] for term in self.terms if term[0] == "letter"]
        named = {ord(character) for letter in letters for character in letter}
        edges = [chr(i) for i in sorted({0} | named | {i + 1 for i in named}) if i <= 0x10FFFF]  # of all ranges
        self.pay(len(letters) * len(edges))
        return list({tuple(stands_for(letter, edge) for letter in letters): edge for edge in edges}.values())

    def equal(self, one, other):
        alphabet, pairs = self.alphabet(), {(one, other): None}
        todo = list(pairs)
        for first, second in todo:  # which grows as it is walked
            if self.nullable[first] != self.nullable[second]:
                return False
            found = [(self.derivative(first, c), self.derivative(second, c)) for c in alphabet]
            todo += [pair for pair in dict.fromkeys(found) if pair not in pairs]
            pairs |= dict.fromkeys(found)
        return True


@functools.lru_cache(1000)
def character_class(token):
    """The token as `re` understands it: there \\d would be a digit, ^ a place; here they are the letters d and ^."""
    if token in ("^", "$"):
        return re.compile(re.escape(token))
    with warnings.catch_warnings(action="ignore"):  # that "--", "[" and such in a class may get another meaning
        return re.compile(re.sub(r"\\(.)", lambda found: re.escape(found[1]), token, flags=re.DOTALL), re.DOTALL)


def stands_for(token, character):
    return character_class(token).fullmatch(character) is not None


def parse(text, languages):
    """The number of a regex in `languages`; SyntaxError where it is none. Python's operators bind as NL-RX's do: ~
    first, then * (here: repetition), + (here: sequence), & and last |. So the regex is written as a Python expression,
    in which t7 is its token number 7, for Python's parser to make a tree of."""
    tokens = TOKEN.findall(text[:MAX_REGEX])
    if "".join(tokens) != text:
        raise SyntaxError("not a regex of NL-RX")
    expression, after_operand = "", False
    for i, token in enumerate(tokens):
        if token[0] in "*+?{":
            expression += f"*t{i}"
        elif token in ("|", "&", ")"):
            expression += token
        else:
            expression += "+" * after_operand + (token if token in ("(", "~") else f"t{i}")
        after_operand = token not in ("|", "&", "(", "~")

    def number(tree):
        match tree:
            case ast.Name(name):
                token = tokens[int(name[1:])]
                return EPSILON if token == "()" else languages.number(False, "letter", token)
            case ast.UnaryOp(ast.Invert(), part):
                return languages.complement(number(part))
            case ast.BinOp(part, ast.Mult(), ast.Name(name)):
                token = tokens[int(name[1:])]
                low, comma, high = REPEAT.get(token, token)[1:-1].partition(",")
                return languages.repetition(number(part), int(low), int(high or low) if high or not comma else math.inf)
            case ast.BinOp(one, operator, other):
                combine = {ast.Add: languages.sequence, ast.BitAnd: languages.intersection, ast.BitOr: languages.union}
                return combine[type(operator)](number(one), number(other))

    return number(ast.parse(expression, mode="eval").body)


def same_regex(output, gold):
    """Do two regexes describe the same lines? The measure of the NL-RX paper (DFA equality, Java's dk.brics.automaton).

    None: too large to decide. What is no regex equals its own text alone. Mind the measure's weakness: 16 % of the
    published SYNTH test answers match no line at all, and so does (a)&(b).

    >>> same_regex("(truck)|(dog)", "(dog)|(truck)"), same_regex("~((a)&(b))", ".*"), same_regex("(a", "a")
    (True, True, False)
    """
    output, gold = output.strip(), gold.strip()
    if output == gold or not output:
        return bool(output)
    languages = Languages()
    try:
        return languages.equal(parse(output, languages), parse(gold, languages))
    except (SyntaxError, re.error):
        return False
    except (TooLarge, RecursionError, MemoryError):  # the latter two: nested too deep
        return None
