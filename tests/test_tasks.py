"""Scorers against examples worked by hand, and the mistakes of published evaluation code."""

import doctest
from pathlib import Path

import pytest
from test_sql import folder  # noqa: F401

from evaluation import sql, tasks


def test_docstring_examples():
    found = doctest.testmod(tasks)
    assert found.failed == 0 and found.attempted == 9


@pytest.mark.parametrize("task", sorted(set(tasks.TASKS) - {"spider"}))
@pytest.mark.parametrize("output", ["", " ", "\n"])
def test_empty_output_is_never_right(task, output):
    """The official nq_open asks whether the output occurs in the gold text: an empty output scores 100 %."""
    gold = {"gsm8k": "#### 4", "nq_open": "four; 4; /", "label": "Good"}.get(task, "A")
    assert not tasks.correct(task, output, gold)
    if task in ("gsm8k", "nq_open"):
        with pytest.raises(tasks.CannotScore):
            tasks.correct(task, output, output)
    else:
        assert not tasks.correct(task, output, output), "not even if the gold text is empty too"


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
    assert tasks.gsm8k(output, gold) is right


def test_gsm8k_reports_a_gold_answer_without_a_number():
    with pytest.raises(tasks.CannotScore, match="####"):
        tasks.gsm8k("#### 4", "four")


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
    assert tasks.nq_open(output, gold) is right


@pytest.mark.parametrize("gold", ["The; /", ";", ""])
def test_nq_open_reports_a_gold_answer_of_which_nothing_is_left(gold):
    with pytest.raises(tasks.CannotScore, match="letters or digits"):
        tasks.nq_open("The", gold)


@pytest.mark.parametrize(("output", "gold", "right"), [
    ("Good", "Good", True), ("Good\nand more", "Good ", True), (" Bad!", "Bad", True), ("good", "Good", False),
    ("Goodness", "Good", False), ("Not Good", "Good", False), ("Very Good", "Very Good", True),
    ("Very", "Very Good", False),
])
def test_label(output, gold, right):
    assert tasks.label(output, gold) is right


def test_correct_dispatches(folder):  # noqa: F811
    user = "For db_id:[shop]\n\nHow many?"
    assert tasks.correct("spider", "SELECT COUNT(id) FROM item", "SELECT count(*) FROM item", user, folder)
    assert not tasks.correct("spider", "SELECT 3", "SELECT count(*) FROM item", user, folder)
    assert tasks.correct("gsm8k", "#### 4.0", "#### 4") and not tasks.correct("exact", "#### 4.0", "#### 4")
    assert tasks.correct("hellaswag", "C", "C") and not tasks.correct("hellaswag", "C) because", "C")


@pytest.mark.parametrize(("name", "task"), [
    ("x/synth_test.jsonl", "exact"), ("turk_test.jsonl", "exact"), ("gsm8k_test.jsonl", "gsm8k"),
    ("spider_train.jsonl", "spider"), ("nq_open_test.jsonl", "nq_open"), ("hellaswag_test.jsonl", "hellaswag"),
    ("rotten_tomatoes_test.jsonl", "label"), ("yelp_test.jsonl", "label"), (Path("yelp/other.jsonl"), "exact"),
    ("spiders_of_europe.jsonl", "exact"), ("labels.jsonl", "exact"), ("label.jsonl", "label"),
])
def test_guess_task(name, task):
    assert tasks.guess_task(name) == task


def test_every_query_has_a_time_limit(folder, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(sql, "run_query", lambda query, database, seconds, **more: seen.append(seconds) or (1, []))
    tasks.correct("spider", "SELECT 1", "SELECT 1", "For db_id:[shop]\n", folder)
    assert seen == [5.0, 5.0]
