"""Scoring: is one answer right, and how sure are we of a percentage?

In go two strings (what the model wrote, what the data set says), out comes True or False; in go rows of 0 and 1, out
come intervals. Nothing here knows models or tokens. In this order: plain comparisons, Spider (SQL is executed), NL-RX
(regexes are compared as languages), `correct(task, output, gold, ...)` for every task, statistics.
An empty output is wrong in every task. Next: eval.py, which calls this (and finds hellaswag's letter by likelihood).
"""

import contextlib
import functools
import math
import re
import sqlite3
import string
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from statistics import NormalDist

import numpy as np


class CannotScore(Exception):
    """The row itself is at fault (its query fails, its database is missing): no output can be judged by it."""


# --- plain comparisons ---------------------------------------------------------------------------------------------


def exact(output, gold):
    """Equal text, white space at both ends aside.

    >>> exact(" (dog)|(truck)\\n", "(dog)|(truck)"), exact("(truck)|(dog)", "(dog)|(truck)"), exact("", "")
    (True, False, False)
    """
    return bool(output.strip()) and output.strip() == gold.strip()


def starts_with_gold(output, gold):
    """The output begins with the whole gold text, whatever follows.

    >>> starts_with_gold("dog.* and more", "dog.*"), starts_with_gold("dog", "dog.*"), starts_with_gold("dog", "")
    (True, False, False)
    """
    return bool(gold.strip()) and output.strip().startswith(gold.strip())


def label(output, gold):
    """The output begins with the label as whole words; anything may follow.

    >>> label("Good. I liked it", "Good"), label("Goodness, no", "Good"), label("Very Bad", "Bad"), label("", "Bad")
    (True, False, False, False)
    """
    rest = output.strip()[len(gold.strip()):]
    return starts_with_gold(output, gold) and not re.match(r"\w", rest)


def final_number(text):
    """The number right after the first ####, or None; commas and $ do not count.

    >>> final_number("so #### $1,250.50 a week"), final_number("1250")
    (Decimal('1250.50'), None)
    """
    found = re.search(r"####\s*(-?[0-9]*\.?[0-9]+)", text.replace(",", "").replace("$", ""))
    return Decimal(found[1]) if found else None


def gsm8k(output, gold):
    """The numbers after #### are equal as numbers. The working before them is not looked at.

    >>> gsm8k("2 + 2 = 5 #### 4.0 dollars", "2 + 2 = 4\\n#### 4"), gsm8k("4", "#### 4"), gsm8k("#### 14", "#### 4")
    (True, False, False)
    """
    answer = final_number(gold)
    if answer is None:
        raise CannotScore("the gold answer has no number after ####")
    return final_number(output) == answer


def normalise(text):
    """Lower case, no ASCII punctuation, no articles, single spaces: the rule of SQuAD and of open NQ.

    >>> normalise("The  Guy-Henry's!")
    'guyhenrys'
    """
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def nq_open(output, gold):
    """One of the gold alternatives (separated by ;) occurs in the output as whole words, both normalised.

    Never the reverse: an output inside the gold text would make the empty output right. An alternative of which nothing
    is left after normalising counts for nothing.

    >>> nq_open("It was the Guy Henry.", "Alec; Guy Henry"), nq_open("Guy", "Guy Henry"), nq_open("1980", "8")
    (True, False, False)
    """
    alternatives = [normalise(alternative) for alternative in gold.split(";")]
    return any(words and f" {words} " in f" {normalise(output)} " for words in alternatives)


# --- Spider: both queries are executed -----------------------------------------------------------------------------

# What a query may do, and how much of it. The time limit is not looked at inside a function, so only those functions
# are allowed that are quick within the limits below (one trim of 100 kB takes 24 s, one printf can take an hour).
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FUNCTIONS = set("""abs avg coalesce count date datetime dense_rank first_value glob group_concat ifnull iif instr
    julianday lag last_value lead length like lower max min nullif rank replace round row_number strftime substr
    substring sum time total typeof upper""".split())
LIMITS = {"LENGTH": 100_000, "SQL_LENGTH": 10_000, "COLUMN": 200, "EXPR_DEPTH": 100, "LIKE_PATTERN_LENGTH": 100,
          "ATTACHED": 0}  # LENGTH: bytes of one text, blob or row
HEAP = 128_000_000  # bytes for sorting and for nested WITH; SQLite has one heap, so this binds the whole process
MAX_ROWS = 100_000
MAX_BYTES = 64_000_000  # of text in one result


class QueryFailed(Exception):
    """The query is no SELECT, is wrong, forbidden, too slow or too large."""


def permit(action, first, second, *_):
    """SQLite's authorizer: reading, and the listed functions (whose name is the second argument)."""
    harmless = action in ALLOWED and (action != sqlite3.SQLITE_FUNCTION or second.lower() in FUNCTIONS)
    return sqlite3.SQLITE_OK if harmless else sqlite3.SQLITE_DENY


def restrict(connection, seconds):
    """From here on CONNECTION only reads, within the limits, until SECONDS are over."""
    assert hasattr(connection, "setlimit"), "SQL that a model wrote can be bounded from Python 3.11 on"
    connection.execute(f"PRAGMA hard_heap_limit={HEAP}")
    connection.execute("PRAGMA temp_store=MEMORY")  # large sorts fail instead of filling the disk
    for name, value in LIMITS.items():
        connection.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), value)
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")  # Spider has stray Latin-1 bytes
    connection.set_authorizer(permit)
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 20)  # every 20 steps of SQLite's machine


def run_query(query, database, seconds, max_rows=MAX_ROWS):
    """(number of columns, rows) of one SELECT on the read-only file DATABASE; QueryFailed if it has no result."""
    address = f"{Path(database).resolve().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
            restrict(connection, seconds)
            cursor = connection.execute(query)
            if cursor.description is None:
                raise QueryFailed("no query")
            rows, size = [], 0
            for row in cursor:
                rows.append(row)
                size += sum(len(value) for value in row if isinstance(value, (str, bytes)))
                if len(rows) > max_rows or size > MAX_BYTES:
                    raise QueryFailed("the result is too large")
            return len(cursor.description), rows
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:  # ValueError: NUL, lone surrogates
        raise QueryFailed(str(error) or type(error).__name__) from error


def comparable(row):
    """A row whose numbers compare by value: 1 = 1.0, and floats are equal when 12 digits are. NULL equals NULL alone.

    >>> comparable((1.0, 0.1 + 0.2, "1", None)) == (1, 0.3, "1", None)
    True
    """
    def number(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.12g}")
    return tuple(number(value) if isinstance(value, float) else value for value in row)


def ordered(query):
    """Does ORDER BY stand at the top level, outside parentheses, texts, quoted names and comments?

    >>> ordered("SELECT a FROM t ORDER  BY a"), ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)")
    (True, False)
    """
    depth = 0
    for token in re.findall(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*]|--[^\n]*|/\*.*?\*/|[()]|\border\s+by\b""", query,
                            re.IGNORECASE | re.DOTALL):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0 and token[0] in "oO":
            return True
    return False


def spider(output, gold, database, seconds=5.0):
    """Both queries give the same rows: as a list if the gold query orders them, else in any order (as a multiset).

    Columns count in their order, their names do not. Text is never equal to a number.

    >>> spider("SELECT 1.0", "SELECT 1", database), spider("SELECT 2", "SELECT 1", database)
    (True, False)
    """
    try:
        columns, expected = run_query(gold, database, seconds)
    except QueryFailed as error:
        raise CannotScore(f"the gold query failed: {error}: {gold}") from error
    try:
        found_columns, found = run_query(output, database, seconds, max_rows=len(expected))
    except QueryFailed:
        return False
    collect = list if ordered(gold) else Counter
    return found_columns == columns and collect(map(comparable, found)) == collect(map(comparable, expected))


def spider_database(user, folder):
    """The database that a user's text names: FOLDER/<db_id>/<db_id>.sqlite, never outside FOLDER."""
    found = re.match(r"For db_id:\[(\w+)]", user)  # \w+ has neither dots nor slashes
    if not found:
        raise CannotScore("the user text does not begin with For db_id:[name]")
    path = Path(folder) / found[1] / f"{found[1]}.sqlite"
    if not path.is_file():
        raise CannotScore(f"no database {path}; it comes with Spider (spider_data/database)")
    return path


# --- NL-RX: two regexes are right when their languages are equal ---------------------------------------------------

TOKEN = re.compile(r"""\[\^?(?:\\.|[^]\\])+] | \{[0-9]+(?:,[0-9]*)?} | \\. | [.*+?~&|()] | [^][{}.*+?~&|()\\"#@<>]""",
                   re.VERBOSE | re.DOTALL)
REPEAT = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}
MAX_REGEX = 400  # characters; the longest of NL-RX-SYNTH has 54
MAX_STEPS = 1_000_000  # a second or two; the hardest real pair met took a sixth of them
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
        kind, *inner = self.terms[first]
        if kind == "sequence":  # (ab)c is written a(bc)
            return self.sequence(inner[0], self.sequence(inner[1], second))
        return self.number(self.nullable[first] and self.nullable[second], "sequence", first, second)

    def repetition(self, part, low, high):
        """LOW to HIGH times PART, the empty language if LOW > HIGH. Never unrolled: {1000000,} is one term."""
        if low > high or (part == EMPTY and low > 0):
            return EMPTY
        if high == 0 or part in (EMPTY, EPSILON):
            return EPSILON
        low = 0 if self.nullable[part] else low
        return part if (low, high) == (1, 1) else self.number(low == 0, "repeat", part, low, high)

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
    if exact(output, gold) or not output.strip():
        return exact(output, gold)
    languages = Languages()
    try:
        return languages.equal(parse(output.strip(), languages), parse(gold.strip(), languages))
    except (ValueError, RecursionError):  # the latter: nested hundreds deep
        return False


# --- one face for all tasks ----------------------------------------------------------------------------------------

TASKS = {"exact": exact, "gsm8k": gsm8k, "spider": spider, "nq_open": nq_open, "hellaswag": exact, "label": label}
FILES = {"synth": "exact", "turk": "exact", "rotten_tomatoes": "label", "yelp": "label"}


def guess_task(file_name):
    """The task that a data file's name announces; exact match for any other.

    >>> guess_task("data/yelp_test.jsonl"), guess_task("gsm8k_train.jsonl"), guess_task("mine.jsonl")
    ('label', 'gsm8k', 'exact')
    """
    name = Path(file_name).name.lower()
    starts = {**{task: task for task in TASKS}, **FILES}
    return next((task for start, task in starts.items() if name.startswith(start)), "exact")


def correct(task, output, gold, user="", databases=None):
    """Is OUTPUT right in TASK (a key of TASKS)? Spider alone needs the user's text and the folder of databases.

    >>> correct("label", "Good", "Good"), correct("hellaswag", "A", "B")
    (True, False)
    """
    if task == "spider":
        return spider(output, gold, spider_database(user, databases))
    return TASKS[task](output, gold)


# --- how sure are we? ----------------------------------------------------------------------------------------------

Z95 = NormalDist().inv_cdf(0.975)


def wilson(successes, n):
    """(low, high): the 95 % interval of a proportion after Wilson (1927); it stays inside 0..1 even at 0 % and 100 %.

    >>> "%.3f %.3f" % wilson(0, 10)
    '0.000 0.278'
    """
    assert 0 <= successes <= n, "between 0 and n successes"
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre, half = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def paired_bootstrap(a, b, seed=0, draws=10_000):
    """(difference, low, high) of the success rates a - b, two systems on the same rows; 95 % percentile bootstrap.

    A row's difference is -1, 0 or 1, so drawing n rows with replacement is one multinomial draw of three counts.

    >>> paired_bootstrap([1, 1, 1, 1], [1, 1, 1, 1])
    (0.0, 0.0, 0.0)
    """
    difference = paired(a, b)
    n = len(difference)
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(n, shares, size=draws)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def mcnemar(a, b):
    """Two-sided p of the exact McNemar test: are the rows that only one system gets right split like fair coin flips?

    >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    0.0625
    """
    difference = paired(a, b)
    wins, losses = int((difference == 1).sum()), int((difference == -1).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def paired(a, b):
    """a - b, row by row, of two equally long lists of 0 and 1."""
    a, b = np.asarray(a, dtype=int), np.asarray(b, dtype=int)
    assert a.shape == b.shape and a.ndim == 1 and a.size, "the same rows, at least one"
    assert np.isin([a, b], (0, 1)).all(), "only 0 and 1"
    return a - b
