"""Scorers against examples worked by hand, the mistakes of published evaluation code, and outputs meant to do harm."""

import doctest
import itertools
import json
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import regexes as regular
from evaluation import tasks as score

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
    return score.spider_database("For db_id:[shop]\n\nHow many?", folder)


def test_docstring_examples(shop):
    found = doctest.testmod(score, extraglobs={"database": shop})
    assert doctest.testmod(regular) == (0, 1)
    assert found.failed == 0 and found.attempted >= 15


# --- plain comparisons ---


@pytest.mark.parametrize("task", sorted(set(score.TASKS) - {"spider"}))
@pytest.mark.parametrize("output", ["", " ", "\n"])
def test_empty_output_is_never_right(task, output):
    """The official nq_open asks whether the output occurs in the gold text: an empty output scores 100 %."""
    gold = {"gsm8k": "#### 4", "nq_open": "four; 4; /", "label": "Good"}.get(task, "A")
    assert not score.correct(task, output, gold)
    if task in ("gsm8k", "nq_open"):
        with pytest.raises(score.CannotScore):
            score.correct(task, output, output)
    else:
        assert not score.correct(task, output, output), "not even if the gold text is empty too"


def test_empty_output_is_never_right_spider(shop):
    for output in ("", " ", ";", "-- a comment"):
        assert not score.spider(output, "SELECT id FROM item WHERE id > 99", shop)


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("#### 18", "9 * 2 = 18\n#### 18", True),
    ("x #### 18 dollars. #### 19", "#### 18", True),  # text may follow; the first answer is the answer
    ("#### $2,125.00", "#### 2,125", True),
    ("#### -3", "#### 3", False),
    ("#### -$3", "#### -3", True),
    ("####18.", "#### 18", True),
    ("#### 0.1", "#### .1", True),
    ("#### 180", "#### 18", False),
    ("the answer is 18", "#### 18", False),
    ("#### eighteen", "#### 18", False),
])
def test_gsm8k(output, gold, right):
    assert score.gsm8k(output, gold) is right


def test_gsm8k_reports_a_gold_answer_without_a_number():
    with pytest.raises(score.CannotScore, match="####"):
        score.gsm8k("#### 4", "four")


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("in November 16, 2018, I think", "November 15, 2018; November 16, 2018", True),
    ("the cap", "the mortarboard; bonnet; Mortarboard; academic cap; tam", False),  # part of an alternative
    ("Mortarboard.", "bonnet;the  mortarboard", True),
    ("bonnet; tam", "x; bonnet; tam", True),
    ("six geese alaying", "6 geese a-laying; six geese a-laying", True),
    ("1980", "8", False),
    ("The", "The; /; four", False),  # nothing is left of the first two
])
def test_nq_open(output, gold, right):
    assert score.nq_open(output, gold) is right


@pytest.mark.parametrize("gold", ["The; /", ";", ""])
def test_nq_open_reports_a_gold_answer_of_which_nothing_is_left(gold):
    with pytest.raises(score.CannotScore, match="letters or digits"):
        score.nq_open("The", gold)


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("Good", "Good", True), ("Good\nand more", "Good ", True), (" Bad!", "Bad", True), ("good", "Good", False),
    ("Goodness", "Good", False), ("Not Good", "Good", False), ("Very Good", "Very Good", True),
    ("Very", "Very Good", False),
])
def test_label(output, gold, right):
    assert score.label(output, gold) is right


def test_correct_dispatches(folder):
    user = "For db_id:[shop]\n\nHow many?"
    assert score.correct("spider", "SELECT COUNT(id) FROM item", "SELECT count(*) FROM item", user, folder)
    assert not score.correct("spider", "SELECT 3", "SELECT count(*) FROM item", user, folder)
    assert score.correct("gsm8k", "#### 4.0", "#### 4") and not score.correct("exact", "#### 4.0", "#### 4")
    assert score.correct("hellaswag", "C", "C") and not score.correct("hellaswag", "C) because", "C")


@pytest.mark.parametrize(("name", "task"), [
    ("x/synth_test.jsonl", "exact"), ("turk_test.jsonl", "exact"), ("gsm8k_test.jsonl", "gsm8k"),
    ("spider_train.jsonl", "spider"), ("nq_open_test.jsonl", "nq_open"), ("hellaswag_test.jsonl", "hellaswag"),
    ("rotten_tomatoes_test.jsonl", "label"), ("yelp_test.jsonl", "label"), (Path("yelp/other.jsonl"), "exact"),
])
def test_guess_task(name, task):
    assert score.guess_task(name) == task


# --- Spider ---


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("select name from item;", "SELECT name FROM item", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item", True),  # gold leaves the order open
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER BY id", False),
    ("SELECT name FROM item", "SELECT name FROM (SELECT name FROM item ORDER BY price)", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item WHERE name != ' order by '", True),
    ("SELECT DISTINCT name FROM item", "SELECT name FROM item", False),  # a multiset: pen is there twice
    ("SELECT name FROM item UNION ALL SELECT name FROM item", "SELECT name FROM item", False),
    ("SELECT name, id FROM item", "SELECT id, name FROM item", False),
    ("SELECT id AS x FROM item", "SELECT id FROM item", True),
    ("SELECT 1", "SELECT price FROM item WHERE id = 2", True),  # 1 = 1.0
    ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
    ("SELECT 0.3001", "SELECT 0.3", False),
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
    assert score.spider(output, gold, shop) is right


@pytest.mark.parametrize("gold", ["SELECT no FROM item", "", "SELECT id FROM item; SELECT 1", "SELECT id FROM gone"])
def test_spider_reports_a_failing_gold_query(shop, gold):
    """The official code compares error texts: two queries that fail alike count as equal."""
    with pytest.raises(score.CannotScore, match="gold query"):
        score.spider(gold, gold, shop)


def test_spider_reports_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "text.sqlite"
    path.write_text("no database " * 100)
    for broken in (path, tmp_path / "missing.sqlite"):
        with pytest.raises(score.CannotScore, match="gold query"):
            score.spider("SELECT count(*) FROM sqlite_master", "SELECT count(*) FROM sqlite_master", broken)


@pytest.mark.parametrize("name", ["../secret", "..", "", "a/b", "/etc", "shop/../shop", "shop\\x", "nobody", "shop\n"])
def test_database_stays_inside_its_folder(folder, name):
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret.sqlite").touch()  # what FOLDER/../secret/../secret.sqlite means
    (folder.parent / "...sqlite").touch()
    with pytest.raises(score.CannotScore):
        score.spider_database(f"For db_id:[{name}]\n\nHow many?", folder)


def test_database_is_named_at_the_beginning_only(folder):
    with pytest.raises(score.CannotScore):
        score.spider_database("How many? For db_id:[shop]", folder)


def test_a_database_whose_path_has_odd_characters(shop, tmp_path):
    odd = tmp_path / "100% a?mode=rw#b.sqlite"
    odd.write_bytes(shop.read_bytes())
    assert score.spider("SELECT count(*) FROM item", "SELECT 4", odd)


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
HOSTILE_REGEX = [
    "a{1000000,}", "((((a{1000}){1000}){1000}){1000}){1000}", "~(.*a" + "." * 18 + ".*)",
    "(" * 190 + "a" + ")" * 190, "(" * 9999, "~" * 9999, "(a*" * 130 + ")*" * 130,
    "a" * 10**6, "&".join(f"(.*{letter}.*)" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "*".join(map(chr, range(0x4E00, 0x4E00 + 199))), "((a|b){1,50}){1,50}(.*c){1,9}", "[\0-\U0010ffff]*", "[\ud800]",
]
RUN_HOSTILE = """
import json, resource, sys
from evaluation import regexes as regular
from evaluation import tasks as score
path, evil, queries, regexes = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
right = [q for q in queries if score.spider(q.replace("{evil}", evil), "SELECT id FROM item", path, seconds=0.1)]
right += [regex for regex in regexes if regular.same_regex(regex, "~((dog.*truck.*){7,})")]
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
    with pytest.raises(score.QueryFailed, match=reason):
        score.run_query(query, shop, seconds=0.1)


def test_large_sorts_stay_out_of_the_temporary_folder(shop):
    """They run out of memory, long before the time is over; SQLite would go on to sort in files."""
    with pytest.raises(score.QueryFailed, match="MemoryError"):
        score.run_query(f"{NUMBERS} SELECT i, {LONG} FROM n ORDER BY 2, 1 DESC", shop, seconds=60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_hostile_outputs_end_and_change_nothing(shop, tmp_path):
    """Run in a process of its own, so that one that never ends is a failure rather than a test that never ends."""
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    work = [str(shop), str(tmp_path / "evil.db"), HOSTILE_SQL, HOSTILE_REGEX]
    places = {name: str(tmp_path) for name in ("TMPDIR", "SQLITE_TMPDIR")}
    done = subprocess.run([sys.executable, "-c", RUN_HOSTILE], input=json.dumps(work), capture_output=True, text=True,
                          timeout=120, cwd=tmp_path, env={**os.environ, **places, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    right, peak = json.loads(done.stdout)
    assert right == []
    assert peak < 500_000, "kilobytes"
    assert files() == before


def test_results_that_are_too_large_are_refused(shop, monkeypatch):
    monkeypatch.setattr(score, "MAX_ROWS", 3)
    monkeypatch.setattr(score.run_query, "__defaults__", (3,))
    with pytest.raises(score.CannotScore, match="too large"):
        score.spider("SELECT id FROM item", "SELECT id FROM item", shop)
    monkeypatch.setattr(score, "MAX_BYTES", 8)
    with pytest.raises(score.CannotScore, match="too large"):
        score.spider("SELECT name FROM item LIMIT 3", "SELECT name FROM item LIMIT 3", shop)
    assert score.spider("SELECT id FROM item LIMIT 3", "SELECT id FROM item LIMIT 3", shop)


# --- NL-RX ---


@pytest.mark.parametrize(("one", "other"), [
    ("(a)&(b)", "~(.*)"),  # no string is both: the empty language
    ("~((a)|(b))", "~(a)&~(b)"), ("~((a)&(b))", "~(a)|~(b)"), ("~(~(a.*))", "a.*"),  # De Morgan
    ("a|b&c", "a|(b&c)"), ("a&b|c", "(a&b)|c"), ("ab&a.", "ab"), ("ab*", "a(b*)"), ("~a*", "(~a)*"), ("~ab", "(~a)b"),
    ("ab|cd", "(ab)|(cd)"), ("~~a", "a"), ("a**", "a*"), ("(a|b)*", "(a*b*)*"), ("a+", "aa*"), ("a?", "a|()"),
    ("a{2,}", "aaa*"), ("a{2}", "aa"), ("a{1,3}", "a|aa|aaa"), ("a{0}", "()"), ("a{3,2}", "~(.*)"),
    ("(a{3,2}){2}", "~(.*)"), ("(a{3,2})*", "()"), ("(a?){3}", "a{0,3}"), ("(a*){3,}", "a*"), ("(~(.*)){0,}", "()"),
    ("[ab]", "a|b"), ("[a-c]", "[abc]"), ("[^a]", "~(a)&."), ("[A-Za-z]", "[a-zA-Z]"), ("a\nb", "a[\n]b"),
    (r"\bdog\b", "bdogb"), (r"[\]a]", r"\]|a"), (r"\.", "[.]"), (".*.*", ".*"), ("dog.*.*", "dog.*"),
    ("((dog.*..*)|(truck)){6,}", "(((dog.*..*)|(truck)){6,})&((.)*)"),
    ("~((dog.*[0-9].*){3,})", ".*&~((dog.*[0-9].*){3}(dog.*[0-9].*)*)"),
])
def test_equal_languages(one, other):
    assert regular.same_regex(one, other) and regular.same_regex(other, one)


@pytest.mark.parametrize(("one", "other"), [
    ("(.*)(([0-9]){2,})", "((.*)([0-9])){2,}"),  # the two readings of "lines ending with a number, 2 or more times"
    ("(a)&(b)", "a"), ("(a)&(b)", "()"), ("(a|b)&c", "a|(b&c)"), ("~(ab)", "(~a)b"), ("~(a*)", "~a*"), ("(ab)*", "ab*"),
    ("a{2,}", "a{3,}"), ("a{2}", "a{2,}"), ("a{1,3}", "a{1,4}"), ("a*", "a+"), ("[a-c]", "[ac]"), ("[^a]", "~(a)"),
    (r"\bdog\b", "dog"), (r"\.", "."), (".", "[a-z]"), ("dog", "Dog"), ("", "()"), (" ", ".*"),
])
def test_different_languages(one, other):
    assert not regular.same_regex(one, other) and not regular.same_regex(other, one)


@pytest.mark.parametrize("broken", [
    "(a", "a)", "*a", "a|", "|a", "a&&a", "[a", "[]", "[z-a]", "a{,2}", "a{", "a{x}", "~", "a\\", "()*)", "a]",
    "#", '"a"', "@", "<1-9>",  # dk.brics gives these a meaning, NL-RX does not use them
])
def test_what_is_no_regex_equals_only_its_own_text(broken):
    assert not regular.same_regex(broken, "a") and not regular.same_regex("a", broken)
    assert not regular.same_regex(broken, "".join("\\" + letter for letter in broken)), "its signs are no letters"
    assert regular.same_regex(broken, broken + " ")


@pytest.mark.parametrize(("bound", "value"), [("MAX_REGEX", 15), ("MAX_STATES", 3), ("MAX_STEPS", 60)])
def test_equality_beyond_a_bound_is_not_decided(monkeypatch, bound, value):
    assert regular.same_regex("(dog.*){3,}", "(dog.*){2}(dog.*)+")
    monkeypatch.setattr(regular, bound, value)
    assert not regular.same_regex("(dog.*){3,}", "(dog.*){2}(dog.*)+")


def test_a_step_is_paid_for_every_part_of_a_union():
    languages = regular.Languages()
    parts = [languages.number(False, "letter", name) for name in range(100)]
    before = languages.steps
    languages.union(parts)
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
    assert [regular.same_regex(one, other) for (one, _), (other, _) in pairs] == equal


# --- statistics ---


@pytest.mark.parametrize(("successes", "n", "low", "high"), [  # from scipy.stats.binomtest(...).proportion_ci("wilson")
    (0, 10, 0.0, 0.2775327998628892), (10, 10, 0.7224672001371107, 1.0), (5, 10, 0.236593090512564, 0.763406909487436),
    (1780, 2000, 0.8755323695259197, 0.9029723335947032), (0, 0, 0.0, 1.0),
])
def test_wilson(successes, n, low, high):
    assert score.wilson(successes, n) == pytest.approx((low, high), abs=1e-12)


def outcomes(wins, losses, rest=0):
    return [1] * wins + [0] * losses + [1] * rest, [0] * wins + [1] * losses + [1] * rest


@pytest.mark.parametrize(("wins", "losses", "p"), [  # from scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue
    (5, 0, 0.0625), (30, 10, 0.0022214337732293643), (8, 3, 0.2265625), (600, 500, 0.0028195449914364284),
    (0, 0, 1.0), (7, 7, 1.0),
])
def test_mcnemar(wins, losses, p):
    one, other = outcomes(wins, losses, rest=9)
    assert score.mcnemar(one, other) == pytest.approx(p, rel=1e-9)
    assert score.mcnemar(other, one) == pytest.approx(p, rel=1e-9)


def test_paired_bootstrap():
    one, other = outcomes(30, 10, rest=60)
    found = score.paired_bootstrap(one, other)
    assert found == score.paired_bootstrap(np.array(one, bool), np.array(other, bool)), "one seed, one answer"
    assert found != score.paired_bootstrap(one, other, seed=1)
    assert found == pytest.approx((0.2, 0.08, 0.32), abs=0.011)  # scipy.stats.bootstrap, 200,000 resamples: 0.08, 0.32
    assert score.paired_bootstrap(other, one)[0] == pytest.approx(-0.2)


def test_statistics_refuse_other_rows():
    for wrong in ([1, 0], [1, 0, 2], []):
        with pytest.raises(AssertionError):
            score.mcnemar([1, 0, 1] if wrong else [], wrong)
    with pytest.raises(AssertionError):
        score.wilson(3, 2)
