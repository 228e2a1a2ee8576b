"""Make the data that this project ships: English sentences and their regexes, in the language of NL-RX-SYNTH.

    python datasets/make_synth.py            # synth_train.jsonl, synth_val.jsonl, synth_test.jsonl beside this file
    python datasets/make_synth.py --check    # their figures beside those of the published NL-RX-SYNTH

In: a seed. Out: chat JSONL, one row per sentence, no sentence twice in a file or in two files.
NL-RX-SYNTH is by Locascio et al. 2016 (arXiv 1608.03000), split 8,000 / 2,000 by LLM-JEPA (arXiv 2509.14252).
We had its rows, not its program: the grammar (grammar.json) was inferred from the rows, and it rebuilds all 10,000.

1. A random tree is drawn (`draw`) from the table NODES, in three passes (PASSES). A literal is a leaf.
2. Trees that the published data never has are dropped (`dropped`, NEVER).
3. The tree is written as English and as a regex; REPAIRS make the English less clumsy (`sentence`).
4. The first regex of a sentence is kept, so where the English is ambiguous, one reading is the right answer.
"""

import json
import random
import re
import statistics
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support import cli, rows  # noqa: E402

SYSTEM = "Convert natural language to regular expression."
WORDS = ("dog", "truck", "ring", "lake")  # the W of a sentence, in order of appearance

GRAMMAR = cli.read_json(HERE / "grammar.json")
MENUS = GRAMMAR["menus"]  # name: the nodes that are drawn from uniformly; "nested" is the menu of the root
LITERALS, QUANTIFIERS = MENUS["literals"], MENUS["quantifiers"]
NODES = GRAMMAR["nodes"]  # name: (English, regex, each child's menu); the number of a NOrMore is kept after its child
UNDER_NOT = GRAMMAR["under_not"]  # English anywhere below a Not; the regex stays
REPAIRS = GRAMMAR["repairs"]  # (pattern, what takes its place), in this order
NEVER = GRAMMAR["never"]  # no published sentence contains these
PHRASES = GRAMMAR["phrases"]  # node: what shows it in the English (Not: in the regex); no repair adds or removes one
PUBLISHED = cli.read_json(HERE / "published_figures.json")  # of the 10,000 published rows, train and test together

PASSES = ((1, 4, 10_000), (2, 5, 600_000), (3, 7, 70_000))  # (maximum depth, maximum size, draws)
POOL = 10_500  # sentences after which the last pass ends
SPLITS = {"train": 8_000, "val": 500, "test": 2_000}


def choose(rng, menu):
    # .random() alone is promised to give the same numbers in every version of Python
    return menu[int(rng.random() * len(menu))]


def draw(rng, max_depth, max_size):
    """A random tree [name, child, ...] (NOrMore: [name, child, number]), or None for one that has to be dropped.

    The tree grows level by level. A literal adds 1 to its size, any other node 1 + the number of its children; children
    at the last level, and all children drawn once the size is reached, are literals. Dropped here, to save time:
    a name other than Word comes twice; a Words is left with a literal.
    """
    tree = [choose(rng, MENUS["nested"])]
    used = {tree[0]}
    size = 1 + len(NODES[tree[0]][2])
    level = [tree]
    for depth in range(1, max_depth + 1):
        below = []
        for node in level:
            for menu in NODES[node[0]][2]:
                name = choose(rng, LITERALS if depth == max_depth or size >= max_size else MENUS[menu])
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
            # of And3 and Or3 the published data has half as many
            if (("And3" in key or "Or3" in key) and rng.random() < 0.5) or key in seen:
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
    wanted = sum(sizes.values())
    if wanted > len(pool):
        raise cli.UserError(f"{wanted:,} rows wanted, but there are {len(pool):,} sentences; ask for fewer")
    rng = random.Random(seed)
    pool.sort(key=lambda _: rng.random())
    left = iter(pool)
    return {name: [next(left) for _ in range(size)] for name, size in sizes.items()}


def to_line(question, answer):
    """One row of chat JSONL."""
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def read_pairs(path):
    """The (question, answer) pairs of a chat JSONL file."""
    pairs = []
    for row in rows.read(path):
        *_, question, answer = [{"role": None}, *row["messages"]]
        if (question["role"], answer["role"]) != ("user", "assistant"):
            raise cli.UserError(f"{row['where']}: has no answer to a question; give rows with user and assistant turns")
        pairs.append((question["content"], answer["content"]))
    return pairs


# ---- figures


def lengths(label, texts):
    """Five figures of the lengths of texts; p99 is the length that 99 % of them fall below."""
    sizes = sorted(len(text) for text in texts)
    found = {"min": sizes[0], "median": round(statistics.median(sizes)), "mean": round(statistics.mean(sizes), 1),
             "p99": sizes[len(sizes) * 99 // 100], "max": sizes[-1]}
    return {f"{label}: {name}": figure for name, figure in found.items()}


def nesting(text):
    """How deep the parentheses of a regex are nested."""
    return max(accumulate(((symbol == "(") - (symbol == ")") for symbol in text), initial=0))


def figures(pairs):
    """The figures of (sentence, regex) pairs under the names of PUBLISHED; counts are per 10,000 pairs."""
    sentences, regexes = zip(*pairs, strict=True)
    counts = Counter()
    for name, phrase in PHRASES.items():
        counts[name] = sum(len(re.findall(phrase, text)) for text in (regexes if name == "Not" else sentences))
    for text in regexes:
        end = "with .*.*" if text.endswith(".*.*") else "with .* only" if text.endswith(".*") else "otherwise"
        counts.update([f"parentheses nested {nesting(text)} deep", f"regex ends {end}"])
    counts.update("sentence begins: " + " ".join(text.split()[:2]) for text in sentences)
    return {
        "rows": len(pairs),
        "rows whose sentence came before": len(pairs) - len(set(sentences)),
        **lengths("characters of a sentence", sentences),
        **lengths("characters of a regex", regexes),
        "different symbols in regexes": len(set("".join(regexes))),
        **{name: round(count * 10_000 / len(pairs)) for name, count in counts.items()},
    }


def show_figures(pairs):
    """Print the figures of pairs beside the published ones; those that the published data lacks come last."""
    found = figures(pairs)
    print(f"{'figure (counts per 10,000 rows)':58}{'here':>8}{'published':>11}")
    for name in [*PUBLISHED, *sorted(found.keys() - PUBLISHED.keys())]:
        where = "regex" if name == "Not" else "sentence"
        label = f"{name:<12} {PHRASES[name]!r} in the {where}" if name in PHRASES else name
        print(f"{label:58}{found.get(name, 0):>8,}{PUBLISHED.get(name, 0):>11,}")


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="another seed, other sentences")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    for name, size in SPLITS.items():
        parser.add_argument(f"--{name}", type=cli.whole(1), default=size, help=f"rows of synth_{name}.jsonl")
    parser.add_argument("--force", action="store_true", help="replace files that have other content")
    parser.add_argument("--check", type=Path, nargs="*", metavar="FILE",
                        help="print figures of files, of all together, and write nothing; no FILE: those in --out")
    args = parser.parse_args()
    paths = {name: args.out / f"synth_{name}.jsonl" for name in SPLITS}
    if args.check is not None:
        return show_figures([pair for path in args.check or paths.values() for pair in read_pairs(path)])
    splits = make_splits(args.seed, {name: getattr(args, name) for name in SPLITS})
    files = {paths[name]: "".join(to_line(*pair) for pair in splits[name]).encode() for name in SPLITS}
    cli.write_files(files, args.force)
    for name, path in paths.items():
        print(f"{path}: {len(splits[name]):,} rows")


if __name__ == "__main__":
    cli.run(main)
