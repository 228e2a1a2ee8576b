"""Scoring: is one answer right, and how sure are we of a percentage?

In go two strings (what the model wrote, what the data set says), out comes True or False; in go rows of 0 and 1, out
come intervals. Nothing here knows models or tokens. In this order: plain comparisons, Spider (SQL is executed),
`correct(task, output, gold, ...)` for every task, statistics. An empty output is wrong in every task. Regexes are
compared as languages in `regular.py`. Next: `eval.py`, which calls both.
"""

import contextlib
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
    """The number right after the first #### that one follows, or None; commas and $ do not count.

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
    is left after normalising counts for nothing; where that is so of all, no output can be judged.

    >>> nq_open("It was the Guy Henry.", "Alec; Guy Henry"), nq_open("Guy", "Guy Henry"), nq_open("1980", "8")
    (True, False, False)
    """
    alternatives = list(filter(None, map(normalise, gold.split(";"))))
    if not alternatives:
        raise CannotScore("no gold alternative has letters or digits")
    return any(f" {words} " in f" {normalise(output)} " for words in alternatives)


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
