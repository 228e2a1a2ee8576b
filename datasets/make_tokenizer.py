"""Train the default data's tokenizer: 508 byte-level BPE tokens, to which data.py adds four special ones.

    python datasets/make_tokenizer.py             # reads synth_train.jsonl, writes synth.tiktoken beside it

tiktoken's own educational trainer does the work. It counts every pair of tokens anew for each merge, so it gets the
first 2,000 rows (15 seconds); the language has so few words that more rows change nothing of note.
"""

import base64
import sys
from pathlib import Path

from tiktoken._educational import bpe_train

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from support import cli  # noqa: E402


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "synth_train.jsonl", help="chat JSONL to learn from")
    parser.add_argument("--out", type=Path, default=HERE / "synth.tiktoken", help="rank file to write")
    parser.add_argument("--rows", type=cli.whole(1), default=2000, help="how many rows to learn from")
    parser.add_argument("--force", action="store_true", help="replace a rank file that has other content")
    args = parser.parse_args()
    if args.out.exists() and args.data.exists() and args.out.samefile(args.data):
        raise cli.UserError(f"--out {args.out}: is --data as well, which would be lost; choose another name")
    rows = [conversation.messages for conversation in data.read(args.data)[: args.rows]]
    text = "\n".join(message["content"] for messages in rows for message in messages)
    size = 512 - len(data.SYNTH_SPECIALS)
    try:
        ranks = bpe_train(text, size, data.SYNTH_PATTERN, visualise=None)
    except ValueError:  # no pair of tokens is left to merge
        raise cli.UserError(f"{args.data}: {len(rows)} rows are too little text for {size} tokens; give more") from None
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    cli.write_files({args.out: lines}, args.force)
    print(f"{args.out}: {len(ranks)} tokens from {len(rows)} rows")


if __name__ == "__main__":
    cli.run(main)
