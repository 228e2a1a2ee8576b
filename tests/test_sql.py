"""Spider's measure: results compared as they should be, and SQL that was written to do harm."""

import doctest
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evaluation import sql

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    """Spider's layout with one small database, two rows of which are not UTF-8."""
    path = tmp_path / "databases" / "shop" / "shop.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE item (id INTEGER, name TEXT, price REAL, stock INTEGER)")
    rows = [(1, "cup", 2.5, 3), (2, "pen", 1.0, None), (3, "ink", 4.0, 0), (4, "pen", 1.0, 7)]
    connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", rows)
    connection.execute("CREATE TABLE odd AS SELECT 1 AS id, CAST(x'C9' AS TEXT) AS name")
    connection.execute("INSERT INTO odd VALUES (2, CAST(x'CA' AS TEXT))")
    connection.commit()
    connection.close()
    return tmp_path / "databases"


@pytest.fixture
def shop(folder):
    return sql.spider_database("For db_id:[shop]\n\nHow many?", folder)


def test_docstring_examples(shop):
    found = doctest.testmod(sql, extraglobs={"database": shop})
    assert found.failed == 0 and found.attempted == 3


def test_empty_output_is_never_right_spider(shop):
    for output in ("", " ", ";", "-- a comment"):
        assert not sql.spider(output, "SELECT id FROM item WHERE id > 99", shop)


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("select name from item;", "SELECT name FROM item", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item", True),  # gold leaves the order open
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER BY id", False),
    ("SELECT name FROM item", "SELECT name FROM (SELECT name FROM item ORDER BY price)", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item WHERE name != ' order by '", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item order/**/by id", False),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER -- first\n\tBY id", False),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item /* order by id", True),
    ("SELECT DISTINCT name FROM item", "SELECT name FROM item", False),  # a multiset: pen is there twice
    ("SELECT name FROM item UNION ALL SELECT name FROM item", "SELECT name FROM item", False),
    ("SELECT name, id FROM item", "SELECT id, name FROM item", False),
    ("SELECT id AS x FROM item", "SELECT id FROM item", True),
    ("SELECT 1", "SELECT price FROM item WHERE id = 2", True),  # 1 = 1.0
    ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
    ("SELECT 0.3001", "SELECT 0.3", False),
    ("SELECT 1234567.890125", "SELECT 1234567.8901250001", True),  # rounded to 12 digits they would differ
    ("SELECT 1234567.89013", "SELECT 1234567.89012", False),
    ("SELECT 2.9999999999999996", "SELECT 3", True),
    ("SELECT 9e999", "SELECT 1e308", False),
    ("SELECT -9e999", "SELECT -9e999", True),
    ("SELECT 0.5, 'a' UNION ALL SELECT 0.50000000000000011, 'b'",
     "SELECT 0.5, 'b' UNION ALL SELECT 0.50000000000000011, 'a'", True),  # in any order, and either digit
    ("SELECT 1234567890123", "SELECT 1234567890123.0", True),
    ("SELECT 12345678901", "SELECT 12345678902", False),
    ("SELECT 9007199254740993", "SELECT 9007199254740992", False),
    ("SELECT '1'", "SELECT 1", False),
    ("SELECT 0", "SELECT stock FROM item WHERE id = 2", False),  # NULL is not 0
    ("SELECT ''", "SELECT NULL", False),
    ("SELECT NULL", "SELECT stock FROM item WHERE id = 2", True),
    ("SELECT name FROM odd WHERE id = 1", "SELECT name FROM odd WHERE id = 2", False),  # undecodable, yet different
    ("SELECT name FROM odd WHERE id < 2", "SELECT name FROM odd WHERE id = 1", True),
    ("SELECT id FROM item WHERE id > 99", "SELECT id FROM item WHERE id < 0", True),
    ("SELECT id, name FROM item WHERE id > 99", "SELECT id FROM item WHERE id > 99", False),
    ("WITH c AS (SELECT id FROM item) SELECT count(*) FROM c", "SELECT 4", True),
    ("SELECT id FROM item; SELECT 1", "SELECT id FROM item", False),
    ("SELECT nothing FROM item", "SELECT id FROM item", False),
    ("SELECT id FROM item\0", "SELECT id FROM item", False),
    ("SELECT '\ud800'", "SELECT 1", False),
])
def test_spider_compares_results(shop, output, gold, right):
    assert sql.spider(output, gold, shop) is right


@pytest.mark.parametrize("gold", ["SELECT no FROM item", "", "SELECT id FROM item; SELECT 1", "SELECT id FROM gone"])
def test_spider_reports_a_failing_gold_query(shop, gold):
    """The official code compares error texts: two queries that fail alike count as equal."""
    with pytest.raises(sql.CannotScore, match="gold query"):
        sql.spider(gold, gold, shop)


def test_spider_reports_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "text.sqlite"
    path.write_text("no database " * 100)
    for broken in (path, tmp_path / "missing.sqlite"):
        with pytest.raises(sql.CannotScore, match="gold query"):
            sql.spider("SELECT count(*) FROM sqlite_master", "SELECT count(*) FROM sqlite_master", broken)


@pytest.mark.parametrize("name", ["../secret", "..", "", "a/b", "/etc", "shop/../shop", "shop\\x", "nobody", "shop\n"])
def test_database_stays_inside_its_folder(folder, name):
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret.sqlite").touch()  # what FOLDER/../secret/../secret.sqlite means
    (folder.parent / "...sqlite").touch()
    with pytest.raises(sql.CannotScore):
        sql.spider_database(f"For db_id:[{name}]\n\nHow many?", folder)


def test_database_is_named_at_the_beginning_only(folder):
    with pytest.raises(sql.CannotScore):
        sql.spider_database("How many? For db_id:[shop]", folder)


def test_comments_without_end_are_searched_in_time():
    started = time.monotonic()
    assert not sql.ordered("SELECT 1 order" + " --a" * 3000 + " x") and not sql.ordered("order /*" * 1200)
    assert time.monotonic() - started < 2


def test_a_database_whose_path_has_odd_characters(shop, tmp_path):
    odd = tmp_path / "100% a?mode=rw#b.sqlite"
    odd.write_bytes(shop.read_bytes())
    assert sql.spider("SELECT count(*) FROM item", "SELECT 4", odd)


LONG = """(WITH RECURSIVE r(s) AS (SELECT 'aaaaaaaaaa' UNION ALL SELECT s||s FROM r WHERE length(s) < 50000)
SELECT max(s) FROM r)"""  # 81,920 letters
NESTED = "WITH c0 AS (SELECT 1 x)" + "".join(f", c{i} AS (SELECT 1 x FROM c{i - 1}, c{i - 1})" for i in range(1, 40))
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
HOSTILE_SQL = [
    "DROP TABLE item", "DELETE FROM item", "INSERT INTO item VALUES (9, 'x', 1, 1)", "UPDATE item SET id = 0",
    "CREATE TABLE made AS SELECT 1", "CREATE TEMP TABLE made AS SELECT 1", "ALTER TABLE item RENAME TO gone",
    "ATTACH '{evil}' AS evil", "VACUUM INTO '{evil}'", "VACUUM", "REINDEX", "ANALYZE", "BEGIN EXCLUSIVE",
    "PRAGMA journal_mode = WAL", "PRAGMA user_version = 9", "PRAGMA writable_schema = 1",
    "PRAGMA hard_heap_limit = 0", "SELECT * FROM pragma_database_list", ".shell touch {evil}", ".output {evil}",
    "SELECT load_extension('{evil}')", "SELECT writefile('{evil}', 'x')", "SELECT readfile('/etc/hostname')",
    "SELECT 1; DROP TABLE item", "SELECT id FROM item; DELETE FROM item",
    f"{NUMBERS} SELECT count(*) FROM n", f"{NUMBERS} SELECT * FROM n ORDER BY i",  # endless
    f"SELECT count(*) FROM {', '.join(['item'] * 60)}",  # 4 ** 60 rows
    f"{NUMBERS}, m(i) AS (SELECT i FROM n LIMIT 30000) SELECT a.i FROM m a, m b ORDER BY b.i, a.i",  # sorts 9e8 rows
    "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)", "SELECT hex(zeroblob(500000000))",
    "SELECT printf('" + "%.2147483647c" * 500 + "', 'x')", "SELECT format('%.2147483647c', 'x')",
    f"SELECT group_concat({LONG}) FROM item a, item b, item c", f"SELECT replace({LONG}, 'a', {LONG})",
    f"SELECT {', '.join([LONG] * 60)} FROM item a, item b, item c",
    f"WITH l AS (SELECT {LONG} AS s) SELECT " + "length(trim(s, replace(s, 'a', 'b') || 'a')) + " * 50 + "0 FROM l",
    f"SELECT {LONG} LIKE '%{'a' * 5000}b%'",
    f"{NESTED} SELECT count(*) FROM c39",  # 2 ** 39 copies when prepared, before any progress handler runs
    "SELECT " + "(" * 3000 + "1" + ")" * 3000, "SELECT " + "1+" * 4000 + "1",
]
RUN_HOSTILE = """
import json, resource, sys
from evaluation import sql
path, evil, queries = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
right = [q for q in queries if sql.spider(q.replace("{evil}", evil), "SELECT id FROM item", path, seconds=0.1)]
status = open("/proc/self/status").read()  # not ru_maxrss, which begins with the memory of the process that forked
print(json.dumps([right, int(status.split("VmHWM:")[1].split()[0])]))
"""


@pytest.mark.parametrize(("query", "reason"), [
    ("DROP TABLE item", "not authorized"), ("PRAGMA user_version", "not authorized"), ("ANALYZE", "not authorized"),
    ("ATTACH ':memory:' AS other", "not authorized"), ("SELECT * FROM pragma_table_info('item')", "not authorized"),
    ("SELECT load_extension('x')", "not authorized"), ("SELECT trim(name) FROM item", "not authorized"),
    ("SELECT PRINTF('%d', id) FROM item", "not authorized"),
    (f"SELECT length({LONG} || {LONG})", "too big"), (f"SELECT '{'x' * 10_000}'", "too large"),
    ("SELECT 1" + ", 1" * 200, "too many columns"), ("SELECT 1" + " + 1" * 100, "too large"),
    (f"SELECT name LIKE '{'a' * 101}' FROM item", "too complex"), (f"{NUMBERS} SELECT count(*) FROM n", "interrupted"),
    (f"{NESTED} SELECT count(*) FROM c39", "MemoryError"), (" -- nothing", "no query"),
])
def test_each_bound_stops_what_it_is_there_for(shop, query, reason):
    with pytest.raises(sql.QueryFailed, match=reason):
        sql.run_query(query, shop, seconds=0.1)


def test_ctrl_c_ends_the_command_and_not_the_query_alone(shop):
    """sqlite3 takes what is raised in its progress handler, by the signal too, for a limit."""
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sql.run_query(f"{NUMBERS} SELECT count(*) FROM n", shop, seconds=30)
    timer.join()


def test_large_sorts_stay_out_of_the_temporary_folder(shop):
    """They run out of memory, long before the time is over; SQLite would go on to sort in files."""
    with pytest.raises(sql.QueryFailed, match="MemoryError"):
        sql.run_query(f"{NUMBERS} SELECT i, {LONG} FROM n ORDER BY 2, 1 DESC", shop, seconds=60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_hostile_outputs_end_and_change_nothing(shop, tmp_path):
    """Run in a process of its own, so that one that never ends is a failure rather than a test that never ends."""
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    work = [str(shop), str(tmp_path / "evil.db"), HOSTILE_SQL]
    places = {name: str(tmp_path) for name in ("TMPDIR", "SQLITE_TMPDIR")}
    done = subprocess.run([sys.executable, "-c", RUN_HOSTILE], input=json.dumps(work), capture_output=True, text=True,
                          timeout=120, cwd=tmp_path, env={**os.environ, **places, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    right, peak = json.loads(done.stdout)
    assert right == []
    assert peak < 500_000, "kilobytes"
    assert files() == before


def test_results_that_are_too_large_are_refused(shop, monkeypatch):
    monkeypatch.setattr(sql, "MAX_ROWS", 3)
    monkeypatch.setattr(sql.run_query, "__defaults__", (3,))
    with pytest.raises(sql.CannotScore, match="too large"):
        sql.spider("SELECT id FROM item", "SELECT id FROM item", shop)
    monkeypatch.setattr(sql, "MAX_BYTES", 8)
    with pytest.raises(sql.CannotScore, match="too large"):
        sql.spider("SELECT name FROM item LIMIT 3", "SELECT name FROM item LIMIT 3", shop)
    assert sql.spider("SELECT id FROM item LIMIT 3", "SELECT id FROM item LIMIT 3", shop)
