"""NL-RX's own metric: two regexes are right when their languages are equal, whatever they look like.

In: two regexes in the syntax of NL-RX (`&` intersection, `~` complement, `\\b` the plain letter b). Out: True or False,
always in bounded time: what is no regex, or too large to decide, is not equal. Characters are partitioned, and the
product of two languages is walked, by the library greenery. Called by eval.py, beside exact match.
"""

import functools
import math
import re

TOKEN = re.compile(r"""\[\^?(?:\\.|[^]\\])+] | \{[0-9]+(?:,[0-9]*)?} | \\. | [.*+?~&|()] | [^][{}.*+?~&|()\\"#@<>]""",
                   re.VERBOSE | re.DOTALL)
REPEAT = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}
MAX_REGEX = 400  # characters; the longest of NL-RX-SYNTH has 54
MAX_STEPS = 1_000_000  # a second or two; the hardest pair of real rows met took a seventh
MAX_STATES = 3_000  # pairs of terms; greenery searches its list of states from the start each time
EMPTY, EPSILON, EVERYTHING = 0, 1, 2  # the numbers of {}, {""} and all strings


class Languages:
    """Regular languages as numbered terms, with Brzozowski's (1964) derivatives: what may follow a first character.

    Derivatives take & and ~ in their stride and are made only when asked for, so counting steps bounds time and memory,
    on every machine alike. (Combining finished automata bounds neither: a complement may be exponentially large.)
    Equal terms get one number and a union is a set, which keeps the derivatives of a term few.
    """

    def __init__(self):
        self.terms, self.nullable, self.numbers, self.derivatives, self.steps = [], [], {}, {}, 0
        self.number(False, "union", frozenset())  # EMPTY
        self.number(True, "repeat", EMPTY, 0, 0)  # EPSILON
        self.number(True, "not", EMPTY)  # EVERYTHING

    def pay(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError("too large to decide")

    def number(self, nullable, *term):
        """The number of a term (kind, ...); NULLABLE says whether it contains the empty string."""
        self.pay(1)
        if term not in self.numbers:
            self.numbers[term] = len(self.terms)
            self.terms.append(term)
            self.nullable.append(nullable)
        return self.numbers[term]

    def union(self, parts):
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

    def intersection(self, parts):
        return self.complement(self.union([self.complement(part) for part in parts]))

    def sequence(self, first, second):
        if EMPTY in (first, second):
            return EMPTY
        if EPSILON in (first, second):
            return second if first == EPSILON else first
        return self.number(self.nullable[first] and self.nullable[second], "sequence", first, second)

    def repetition(self, part, low, high):
        """LOW to HIGH times PART, the empty language if LOW > HIGH. Never unrolled: {1000000,} is one term."""
        if low > high or (part == EMPTY and low > 0):
            return EMPTY
        if high == 0 or part in (EMPTY, EPSILON):
            return EPSILON
        low = 0 if self.nullable[part] else low
        return self.number(low == 0, "repeat", part, low, high)

    def derivative(self, number, symbol):
        """What follows SYMBOL, a set of characters that are alike to all letters, in the strings of NUMBER."""
        self.pay(1)
        known = self.derivatives.get((number, symbol))
        if known is not None:
            return known
        kind, *inner = self.terms[number]
        if kind == "letter":
            result = EPSILON if symbol in self.symbols[inner[0]] else EMPTY
        elif kind == "union":
            result = self.union([self.derivative(part, symbol) for part in inner[0]])
        elif kind == "not":
            result = self.complement(self.derivative(inner[0], symbol))
        elif kind == "sequence":
            result = self.sequence(self.derivative(inner[0], symbol), inner[1])
            if self.nullable[inner[0]]:
                result = self.union([result, self.derivative(inner[1], symbol)])
        else:
            part, low, high = inner
            result = self.sequence(self.derivative(part, symbol), self.repetition(part, max(low - 1, 0), high - 1))
        self.derivatives[number, symbol] = result
        return result

    def equal(self, one, other):
        """Walk both languages at once: equal, if no pair of terms reached has the empty string in just one of them."""
        from greenery.charclass import DOT, repartition
        from greenery.fsm import crawl
        pieces = repartition({DOT, *(term[1] for term in self.terms if term[0] == "letter")})
        index = {piece: i for i, piece in enumerate(pieces[DOT])}
        self.symbols = {letter: {index[piece] for piece in its_pieces} for letter, its_pieces in pieces.items()}
        seen = set()

        def follow(pair, piece):
            following = tuple(self.derivative(number, index[piece]) for number in pair)
            seen.add(following)
            self.pay(1 if len(seen) <= MAX_STATES else MAX_STEPS)
            return following

        def differs(pair):
            return self.nullable[pair[0]] != self.nullable[pair[1]]

        return crawl(index, (one, other), differs, follow).empty()


def charclass(token):
    """The characters that one token stands for: . or a class in brackets or a letter; \\b is b."""
    from greenery.charclass import DOT, Charclass
    if token == ".":
        return DOT
    if token[0] != "[":
        return Charclass(token[-1])
    items = re.findall(r"(\\.|[^\\])(?:-(\\.|[^\\]))?", token[1:-1].removeprefix("^"), re.DOTALL)
    return Charclass(tuple((low[-1], (high or low)[-1]) for low, high in items), negated=token.startswith("[^"))


def parse(text, languages):
    """The number of a regex in LANGUAGES, or ValueError. | binds loosest, then &, sequence, repetition and ~."""
    tokens = TOKEN.findall(text)[::-1]  # the next token is the last
    if "".join(tokens[::-1]) != text or len(text) > MAX_REGEX:
        raise ValueError("not a regex of NL-RX")

    def at(*wanted):
        return bool(tokens) and (tokens[-1] in wanted or tokens[-1][0] in wanted)

    def separated(separator, operand):
        parts = [operand()]
        while at(separator):
            tokens.pop()
            parts.append(operand())
        return parts

    def union():
        return languages.union(separated("|", intersection))

    def intersection():
        return languages.intersection(separated("&", sequence))

    def sequence():
        parts = [repeated()]
        while tokens and not at("|", "&", ")"):
            parts.append(repeated())
        return functools.reduce(lambda rest, part: languages.sequence(part, rest), reversed(parts))

    def repeated():
        part = operand()
        while at("*", "+", "?", "{"):
            token = tokens.pop()
            low, comma, high = REPEAT.get(token, token)[1:-1].partition(",")
            part = languages.repetition(part, int(low), int(high) if high else math.inf if comma else int(low))
        return part

    def operand():
        if not tokens or at("|", "&", ")", "*", "+", "?", "{"):
            raise ValueError("an operand is missing")
        token = tokens.pop()
        if token == "~":
            return languages.complement(operand())
        if token != "(":
            return languages.number(False, "letter", charclass(token))
        inside = EPSILON if at(")") else union()
        if not tokens:
            raise ValueError("a parenthesis is not closed")
        tokens.pop()
        return inside

    number = union()
    if tokens:
        raise ValueError("a parenthesis too many")
    return number


def same_regex(output, gold):
    """Do two regexes describe the same lines? The measure of the NL-RX paper (DFA equality, Java's dk.brics.automaton).

    & is intersection, ~ complement, \\b the plain letter b. False also for what is no regex or too large to decide.
    Mind the measure's weakness: 16 % of the published SYNTH test answers match no line at all, and so does (a)&(b).

    >>> same_regex("(truck)|(dog)", "(dog)|(truck)"), same_regex("~((a)&(b))", ".*"), same_regex("(a", "a")
    (True, True, False)
    """
    output, gold = output.strip(), gold.strip()
    if output == gold or not output:
        return bool(output)
    languages = Languages()
    try:
        return languages.equal(parse(output, languages), parse(gold, languages))
    except (ValueError, RecursionError):  # the latter: nested hundreds deep
        return False
