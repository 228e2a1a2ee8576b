"""Train the default data's tokenizer: 508 byte-level BPE tokens, to which tokenizer.py adds four special ones.

    python datasets/make_tokenizer.py             # reads synth_train.jsonl, writes synth.tiktoken beside it

tiktoken's own educational trainer does the work. It counts every pair of tokens anew for each merge, so it gets the
first 2,000 rows (15 seconds); the language has so few words that more rows change nothing of note.
"""

import base64
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from hf.tokenizer import SYNTH_PATTERN, SYNTH_SPECIALS  # noqa: E402

import data  # noqa: E402
from support import cli  # noqa: E402


def main():
    flags = cli.parser(__doc__)
    flags.add_argument("--data", type=Path, default=HERE / "synth_train.jsonl", help="chat JSONL to learn from")
    flags.add_argument("--out", type=Path, default=HERE / "synth.tiktoken", help="rank file to write")
    flags.add_argument("--rows", type=int, default=2000, help="how many rows to read")
    args = flags.parse_args()

    from tiktoken._educational import bpe_train

    rows = [conversation.messages for conversation in data.read(args.data)[: args.rows]]
    text = "\n".join(message["content"] for messages in rows for message in messages)
    ranks = bpe_train(text, 512 - len(SYNTH_SPECIALS), SYNTH_PATTERN, visualise=None)
    with cli.writing(args.out) as unfinished:
        unfinished.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    print(f"{args.out}: {len(ranks)} tokens from {len(rows)} rows")


if __name__ == "__main__":
    cli.run(main)
