"""Is one answer right? In: what the model wrote, what the data set says. Out: True or False.

`correct(task, output, gold, ...)` is the one face of all tasks; `judge` says all else that is known about an answer.
Nothing here knows models or tokens. An empty output is wrong in every task. SQL is executed in `sql.py`, regexes are
compared as languages in `regexes.py`.
"""

import re
import string
from decimal import Decimal
from pathlib import Path

from evaluation.regexes import same_regex
from evaluation.sql import CannotScore, spider, spider_database


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


TASKS = {"exact": exact, "gsm8k": gsm8k, "spider": spider, "nq_open": nq_open, "hellaswag": exact, "label": label}
FILES = {t: t for t in TASKS} | {"synth": "exact", "turk": "exact", "rotten_tomatoes": "label", "yelp": "label"}


def guess_task(file_name):
    """The task that a data file's name announces; exact match for any other.

    >>> guess_task("data/yelp_test.jsonl"), guess_task("gsm8k_train.jsonl"), guess_task("mine.jsonl")
    ('label', 'gsm8k', 'exact')
    """
    return next((task for start, task in FILES.items() if begins(file_name, start)), "exact")


def begins(file_name, words):
    """Does the name of a file begin with one of these words (a pattern), and not just with its letters?"""
    return re.match(f"({words})(?![a-z])", Path(file_name).name.lower()) is not None


def correct(task, output, gold, user="", databases=None):
    """Is OUTPUT right in TASK (a key of TASKS)? Spider alone needs the user's text and the folder of databases.

    >>> correct("label", "Good", "Good"), correct("hellaswag", "A", "B")
    (True, False)
    """
    if task == "spider":
        return spider(output, gold, spider_database(user, databases))
    return TASKS[task](output, gold)


REASONS = ("stopped too early", "cut off by the budget", "ran on", "other")


def judge(row, task, databases=None, is_regex=False):
    """The scores of a row {"output", "text", "gold", "exact", ...} besides "exact", and why it is wrong.

    A score is True or False, or None where the row "cannot_score". Regexes too hard to compare count as different.
    """
    output, gold = row["output"], row["gold"]
    found = {"prefix": starts_with_gold(output, gold), "contains": gold.strip() in output}
    if is_regex:
        same = same_regex(output, gold)
        found |= {"same_language": bool(same)} | ({"undecided": True} if same is None else {})
    if "ending_letter" in row:
        found["ending"] = row["ending_letter"] == gold.strip()
    if task != "exact":
        try:
            found[task] = correct(task, output, gold, row["text"], databases)
        except CannotScore as reason:
            found |= {task: None, "cannot_score": str(reason)}
    wrong = (row | found)[task] is False
    found["wrong_because"] = why(output.strip(), gold.strip(), row.get("stopped")) if wrong else None
    return found


def why(output, gold, stopped):
    """How a wrong output differs from the gold answer: one of REASONS. stopped: did the model end it? None: unknown."""
    if gold.startswith(output):
        return "cut off by the budget" if stopped is False else "stopped too early"
    return "ran on" if output.startswith(gold) else "other"
