"""Spider's measure: both queries are executed, and their results compared. SQL that a model wrote is a stranger's.

In: a query, the gold query, a SQLite file. Out: True or False. A query runs in this process, on a database opened
read-only, may call only listed functions, and ends at a limit of time, memory or rows.
"""

import contextlib
import math
import re
import sqlite3
import time
from collections import Counter
from pathlib import Path


class CannotScore(Exception):
    """The row itself is at fault (its query fails, its database is missing): no output can be judged by it."""


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
    address, began = f"{Path(database).resolve().as_uri()}?mode=ro&immutable=1", time.monotonic()
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
        if str(error) == "interrupted" and time.monotonic() < began + seconds:  # by Ctrl-C, which sqlite3 hides
            raise KeyboardInterrupt from None
        raise QueryFailed(str(error) or type(error).__name__) from error


def comparable(*results):
    """The results (lists of rows) with numbers that agree in 12 digits made the same one, whatever their type.

    >>> comparable([(1.0, 0.1 + 0.2, "1", None)], [(1, 0.3, "1", None)])
    [[(1, 0.3, '1', None)], [(1, 0.3, '1', None)]]
    """
    floats = sorted({value for rows in results for row in rows for value in row if isinstance(value, float)})
    known, last = {}, math.nan
    for value in floats:
        if not math.isclose(value, last, rel_tol=5e-12):
            whole = abs(value) < 2**53 and math.isclose(value, round(value), rel_tol=5e-12)
            first = round(value) if whole else value
        known[value], last = first, value
    same = lambda value: known[value] if isinstance(value, float) else value  # noqa: E731
    return [[tuple(map(same, row)) for row in rows] for rows in results]


COMMENT = r"--[^\n]*|/\*.*?(?:\*/|\Z)"
TOKENS = re.compile(rf"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*]|{COMMENT}|[()]|\border(?>(?:\s|{COMMENT})+)by\b""",
                    re.IGNORECASE | re.DOTALL)


def ordered(query):
    """Does ORDER BY stand at the top level, outside parentheses, texts, quoted names and comments?

    >>> ordered("SELECT a FROM t ORDER  BY a"), ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)")
    (True, False)
    """
    depth = 0
    for token in TOKENS.findall(query):
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
    found, expected = map(collect, comparable(found, expected))
    return found_columns == columns and found == expected


def spider_database(user, folder):
    """The database that a user's text names: FOLDER/<db_id>/<db_id>.sqlite, never outside FOLDER."""
    found = re.match(r"For db_id:\[(\w+)]", user)  # \w+ has neither dots nor slashes
    if not found:
        raise CannotScore("the user text does not begin with For db_id:[name]")
    path = Path(folder) / found[1] / f"{found[1]}.sqlite"
    if not path.is_file():
        raise CannotScore(f"no database {path}; it comes with Spider (spider_data/database)")
    return path
