"""Make the data that this project ships: English sentences and their regexes, in the language of NL-RX-SYNTH.

    python datasets/make_synth.py            # synth_train.jsonl, synth_val.jsonl, synth_test.jsonl beside this file
    python datasets/make_synth.py --check    # their figures beside those of the published NL-RX-SYNTH

In: a seed. Out: chat JSONL, one row per sentence, no sentence twice in a file or in two files.
NL-RX-SYNTH is by Locascio et al. 2016 (arXiv 1608.03000), split 8,000 / 2,000 by LLM-JEPA (arXiv 2509.14252).
We had its rows, not its program: the grammar below was read off the rows, and it rebuilds all 10,000 of them.

1. A random tree is drawn (`draw`) from the table NODES, thrice as PASSES says. A literal is a leaf.
2. Trees that the published data never has are dropped (`dropped`, NEVER).
3. The tree is written as English and as a regex; REPAIRS make the English less clumsy (`sentence`).
4. The first regex of a sentence is kept, so where the English is ambiguous, one reading is the right answer.

Which sample? There are few small trees, and the published rows hold nearly all of them: 173 of the 175 sentences of
one node over literals, 97 % of those of two. So they are not a thin sample but nearly a whole pool, of about 10,280.
Those of three nodes occur as often as about 61,000 draws of the last pass give. Hence we draw the last pass until
POOL sentences are there (66,000 draws for seed 0), use all of them, and shuffle them before they are split.
As small trees are few, 57 % of the sentences stand in the published files too: never train on one set and test on the
other.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
SYSTEM = "Convert natural language to regular expression."
WORDS = ("dog", "truck", "ring", "lake")  # the W of a sentence, in order of appearance

# ---- the grammar

FUNCTIONS = ("Contains", "Words", "Starts", "Ends", "Followed")
COMPOSITIONS = ("Or", "Not", "And", "Before", "And3", "Or3")
QUANTIFIERS = ("OneOrMore", "NOrMore", "ZeroOrMore", "Only")
LITERALS = ("Num", "Cap", "Low", "Let", "Vow", "Chr") + 4 * ("Word",)  # a menu is drawn from uniformly

NESTED = FUNCTIONS + COMPOSITIONS + QUANTIFIERS  # also the menu of the root
ANY = NESTED + LITERALS
SIMPLE = FUNCTIONS + QUANTIFIERS + LITERALS + ("Or",)

NODES = {  # name: (English, regex, the menu of each child)
    "Num": ("a number", "[0-9]", ()),
    "Cap": ("a capital letter", "[A-Z]", ()),
    "Low": ("a lower-case letter", "[a-z]", ()),
    "Let": ("a letter", "[A-Za-z]", ()),
    "Vow": ("a vowel", "[AEIOUaeiou]", ()),
    "Chr": ("a character", ".", ()),
    "Word": ("the string 'W'", "W", ()),
    "Before": ("%s before %s", "(%s).*(%s).*", (ANY, ANY)),
    "Or": ("%s or %s", "(%s)|(%s)", (ANY, ANY)),
    "And": ("%s and %s", "(%s)&(%s)", (ANY, ANY)),
    "Or3": ("either %s, %s, or %s", "(%s)|(%s)|(%s)", (LITERALS, LITERALS, LITERALS)),
    "And3": ("%s, %s, and %s", "(%s)&(%s)&(%s)", (LITERALS, LITERALS, LITERALS)),
    "Followed": ("%s followed by %s", "%s.*%s.*", (LITERALS, LITERALS)),
    "Not": ("not %s", "~(%s)", (ANY,)),
    "Contains": ("containing %s", ".*%s.*", (ANY,)),
    "Only": ("containing only %s", "%s", (LITERALS,)),
    "Starts": ("starting with %s", "(%s)(.*)", (SIMPLE,)),
    "Ends": ("ending with %s", "(.*)(%s)", (SIMPLE,)),
    "Words": ("words with %s", r"\b%s\b", (NESTED,)),
    "NOrMore": ("%s, %d or more times", "(%s){%d,}", (SIMPLE,)),  # the number is kept after the child
    "ZeroOrMore": ("%s, zero or more times", "(%s)*", (SIMPLE,)),
    "OneOrMore": ("%s at least once", "(%s)+", (SIMPLE,)),
}
UNDER_NOT = {  # English anywhere below a Not; the regex stays
    "And": "%s and not %s",
    "Or3": "%s, %s, or %s",
    "And3": "%s, not %s, and not %s",
}
LITERAL = "(?:an? [a-z-]+(?: letter)?|the string 'W')"
REPAIRS = [  # (pattern, what takes its place), in this order
    ("having containing", "containing"),
    ("having before", "before"),
    ("lines a", "lines with a"),
    ("lines not the", "lines not having the"),
    ("lines the", "lines with the"),
    ("lines not a", "lines not having a"),
    ("lines words", "lines with words"),
    ("having (starting|ending)", r"\1"),
    ("having not", "not having"),
    ("containing not", "not containing"),
    ("containing having", "containing"),
    ("having having", "having"),
    ("with having", "with"),
    ("lines with words with not a", "lines with words that don't have a"),
    ("lines with words with not", "lines with words that don't"),
    ("not not", "not"),
    ("lines either", "lines having either"),
    (f"^lines with ({LITERAL}, {LITERAL}, and )", r"lines having \1"),
    ("words with containing", "words that contain"),
]
NEVER = (  # no published sentence contains these
    "letter before a letter",
    "starting with ending",
    "ending with starting",
    "containing starting",
    "before starting",
    "starting with containing",
)

# ---- the sample

PASSES = ((1, 4, 10_000), (2, 5, 600_000), (3, 7, 70_000))  # (maximum depth, maximum size, draws)
POOL = 10_500  # sentences after which the last pass ends
SPLITS = {"train": 8_000, "val": 500, "test": 2_000}


def fail(message):
    """End with one line on stderr and exit code 2."""
    print(f"make_synth.py: {message}", file=sys.stderr)
    sys.exit(2)


def choose(rng, menu):
    # .random() alone is promised to give the same numbers in every version of Python
    return menu[int(rng.random() * len(menu))]


def draw(rng, max_depth, max_size):
    """A random tree [name, child, ...] (NOrMore: [name, child, number]), or None for one that has to be dropped.

    The tree grows level by level. A literal adds 1 to its size, any other node 1 + the number of its children; children
    at the last level, and all children drawn once the size is reached, are literals. Dropped here, to save time:
    a name other than Word comes twice; a Words is left with a literal.
    """
    tree = [choose(rng, NESTED)]
    used = {tree[0]}
    size = 1 + len(NODES[tree[0]][2])
    level = [tree]
    for depth in range(1, max_depth + 1):
        below = []
        for node in level:
            for menu in NODES[node[0]][2]:
                name = choose(rng, LITERALS if depth == max_depth or size >= max_size else menu)
                if (name in used and name != "Word") or (node[0] == "Words" and name in LITERALS):
                    return None
                used.add(name)
                size += 1 + len(NODES[name][2])
                node.append([name])
            below.extend(node[1:])
            if node[0] == "NOrMore":
                node.append(choose(rng, range(2, 8)))
        level = below
    return tree


def children(tree):
    return [part for part in tree[1:] if isinstance(part, list)]


def names(tree):
    """The names of all nodes of a tree."""
    return [tree[0]] + [name for child in children(tree) for name in names(child)]


def dropped(tree):
    """Whether the published data has no such tree."""
    all_names = names(tree)
    root, *first_level = tree[0], *(child[0] for child in children(tree))
    return (
        all_names.count("Word") > len(WORDS)
        or sum(name in QUANTIFIERS and name != "Only" for name in all_names) > 1
        or (root in ("Or", "And", "Or3", "And3") and any(name in LITERALS for name in first_level))
        or (root in ("Or", "And") and first_level[0] in ("Or", "And"))
        or (root != "Not" and "Only" in first_level)
    )


def english(tree, negated=False):
    """The English of a tree before repairs, each word still a W."""
    name, *parts = tree
    template = UNDER_NOT[name] if negated and name in UNDER_NOT else NODES[name][0]
    negated = negated or name == "Not"
    return template % tuple(english(part, negated) if isinstance(part, list) else part for part in parts)


def regex(tree):
    """The regex of a tree, each word still a W."""
    name, *parts = tree
    return NODES[name][1] % tuple(regex(part) if isinstance(part, list) else part for part in parts)


def repair(text):
    for pattern, replacement in REPAIRS:
        text = re.sub(pattern, replacement, text)
    return text


def name_words(text):
    """Put dog, truck, ring, lake for the first, second, third, fourth W."""
    for word in WORDS:
        text = text.replace("W", word, 1)
    return text


def sentence(tree):
    return name_words(repair("lines " + english(tree)))


def make_pool(seed, passes=PASSES, limit=POOL):
    """{sentence: regex}, at most `limit` of them, in the order in which they were drawn."""
    rng = random.Random(seed)
    pool, seen = {}, set()
    for max_depth, max_size, draws in passes:
        for _ in range(draws):
            if len(pool) == limit:
                return pool
            tree = draw(rng, max_depth, max_size)
            if tree is None:
                continue
            key = str(tree)
            if ("And3" in key or "Or3" in key) and rng.random() < 0.5:  # the published data has half as many
                continue
            if key in seen:
                continue
            seen.add(key)
            text = sentence(tree)
            if not dropped(tree) and not any(phrase in text for phrase in NEVER):
                pool.setdefault(text, name_words(regex(tree)))
    return pool


# ---- files


def make_splits(seed, sizes):
    """{"train": rows, "val": rows, "test": rows} of (sentence, regex), drawn without replacement from one pool."""
    pool = list(make_pool(seed).items())
    if sum(sizes.values()) > len(pool):
        fail(f"{sum(sizes.values()):,} rows wanted, but there are {len(pool):,} sentences; ask for fewer")
    rng = random.Random(seed)
    pool.sort(key=lambda _: rng.random())
    rows = iter(pool)
    return {name: [next(rows) for _ in range(size)] for name, size in sizes.items()}


def to_line(question, answer):
    """One row of chat JSONL."""
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def write(files, force):
    """Write {path: bytes}, each file whole or not at all; other content that is already there needs `force`."""
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content and not force:
            fail(f"{path}: exists with other content; move it away, or give --force to replace it")
    partial = {path: path.with_name(f"{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path in files:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def read_rows(path):
    """The (sentence, regex) pairs of a chat JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8 text; give a file of chat JSONL")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = {turn["role"]: turn["content"] for turn in json.loads(line)["messages"]}
            question, answer = content["user"] + "", content["assistant"] + ""  # a TypeError where they are not text
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{path}:{number}: not a row of chat JSONL with a user and an assistant turn; correct or remove it")
        rows.append((question, answer))
    if not rows:
        fail(f"{path}: holds no rows; give a file of chat JSONL")
    return rows


# ---- figures

# name: what is counted in the English, as a regular expression; repairs never add or remove one of these
PHRASES = {name: NODES[name][0] for name in ("Num", "Cap", "Low", "Let", "Vow", "Chr")} | {
    "Word": "the string",
    "Before": "before",
    "Or": "(?<!,) or (?!more)",
    "And": "(?<!,) and ",
    "Or3": ", or ",
    "And3": ", and ",
    "Followed": "followed by",
    "Contains": r"contain(?:ing)?\b(?! only)",
    "Only": "only",
    "Starts": "starting",
    "Ends": "ending",
    "Words": "words",
    "NOrMore": "[2-7] or more times",
    "ZeroOrMore": "zero or more times",
    "OneOrMore": "at least once",
}
PUBLISHED = {  # measured on the 10,000 published rows, train and test together
    "rows": 10_000,
    "rows whose sentence came before": 137,
    "characters of a sentence: min": 24,
    "characters of a sentence: median": 66,
    "characters of a sentence: mean": 66.7,
    "characters of a sentence: p99": 101,
    "characters of a sentence: max": 125,
    "characters of a regex: min": 1,
    "characters of a regex: median": 25,
    "characters of a regex: mean": 26.0,
    "characters of a regex: p99": 44,
    "characters of a regex: max": 54,
    "different symbols in regexes": 44,
    **dict(Num=2871, Cap=2809, Low=2845, Let=2813, Vow=2863, Chr=2880, Word=7716, Before=4325, Or=2432, And=1513),
    **dict(Or3=1201, And3=1238, Followed=1649, Not=1716, Contains=1797, Only=311, Starts=899, Ends=1226, Words=1896),
    **dict(NOrMore=2053, ZeroOrMore=876, OneOrMore=875),
    "parentheses nested 0 deep": 171,
    "parentheses nested 1 deep": 2710,
    "parentheses nested 2 deep": 6425,
    "parentheses nested 3 deep": 694,
    "regex ends with .*.*": 127,
    "regex ends with .* only": 4451,
    "regex ends otherwise": 5422,
    "sentence begins: lines with": 5424,
    "sentence begins: lines not": 1336,
    "sentence begins: lines containing": 1245,
    "sentence begins: lines ending": 720,
    "sentence begins: lines having": 662,
    "sentence begins: lines starting": 613,
}


def lengths(label, texts):
    """Five figures of the lengths of texts; p99 is the length that 99 % of them fall below."""
    sizes = sorted(len(text) for text in texts)
    return {
        f"{label}: min": sizes[0],
        f"{label}: median": round(statistics.median(sizes)),
        f"{label}: mean": round(statistics.mean(sizes), 1),
        f"{label}: p99": sizes[len(sizes) * 99 // 100],
        f"{label}: max": sizes[-1],
    }


def nesting(text):
    """How deep the parentheses of a regex are nested."""
    depth = deepest = 0
    for symbol in text:
        depth += (symbol == "(") - (symbol == ")")
        deepest = max(deepest, depth)
    return deepest


def ending(text):
    return "with .*.*" if text.endswith(".*.*") else "with .* only" if text.endswith(".*") else "otherwise"


def figures(rows):
    """The figures of (sentence, regex) rows under the names of PUBLISHED; counts are per 10,000 rows."""
    sentences, regexes = zip(*rows, strict=True)
    counts = Counter({name: sum(len(re.findall(PHRASES[name], text)) for text in sentences) for name in PHRASES})
    counts["Not"] = sum(text.count("~") for text in regexes)
    counts.update(f"parentheses nested {nesting(text)} deep" for text in regexes)
    counts.update(f"regex ends {ending(text)}" for text in regexes)
    counts.update("sentence begins: " + " ".join(text.split()[:2]) for text in sentences)
    return {
        "rows": len(rows),
        "rows whose sentence came before": len(rows) - len(set(sentences)),
        **lengths("characters of a sentence", sentences),
        **lengths("characters of a regex", regexes),
        "different symbols in regexes": len(set("".join(regexes))),
        **{name: round(count * 10_000 / len(rows)) for name, count in counts.items()},
    }


def show_figures(rows):
    """Print the figures of rows beside the published ones; those that the published data lacks come last."""
    found = figures(rows)
    print(f"{'figure (counts per 10,000 rows)':58}{'here':>8}{'published':>11}")
    for name in [*PUBLISHED, *sorted(found.keys() - PUBLISHED.keys())]:
        if name == "Not":
            label = "Not          ~ in the regex"
        elif name in PHRASES:
            label = f"{name:<12} {PHRASES[name]!r} in the sentence"
        else:
            label = name
        print(f"{label:58}{found.get(name, 0):>8,}{PUBLISHED.get(name, 0):>11,}")


# ---- command line


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = fail
    parser.add_argument("--seed", type=int, default=0, help="another seed, other sentences (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: this script's folder)")
    for name, size in SPLITS.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"rows of synth_{name}.jsonl (default: {size:,})")
    parser.add_argument("--force", action="store_true", help="replace files that have other content (default: refuse)")
    check_help = "print figures of files, of all together, and write nothing (default: the three files in --out)"
    parser.add_argument("--check", type=Path, nargs="*", metavar="FILE", help=check_help)
    args = parser.parse_args()
    for name in SPLITS:
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: a file needs at least one row")
    return args


def main():
    args = parse_args()
    paths = {name: args.out / f"synth_{name}.jsonl" for name in SPLITS}
    try:
        if args.check is not None:
            show_figures([row for path in args.check or paths.values() for row in read_rows(path)])
            return
        args.out.mkdir(parents=True, exist_ok=True)
        splits = make_splits(args.seed, {name: getattr(args, name) for name in SPLITS})
        lines = {name: "".join(to_line(*row) for row in rows) for name, rows in splits.items()}
        write({paths[name]: text.encode() for name, text in lines.items()}, args.force)
    except OSError as failure:
        fail(f"{failure.filename or args.out}: {failure.strerror}; give another path")
    for name, path in paths.items():
        print(f"{path}: {len(splits[name]):,} rows")


if __name__ == "__main__":
    main()
