"""Text <-> token ids, and conversations -> pieces of ids. In: a name or a folder. Out: one `Tokenizer`.

    tokenizer.load("synth")   the 512-token byte-level BPE that the repository ships (see datasets/make_tokenizer.py)
    tokenizer.load("gpt2")    tiktoken's GPT-2 encoding (downloaded once by tiktoken)
    tokenizer.load(FOLDER)    the tokenizer.json and chat template of a Hugging Face folder or repo id (huggingface.py)

`chat` is the part that matters for training. It renders a conversation as *pieces*: the template's own ids (role
headers, end-of-turn tokens) and, apart from them, the ids of each message's content. So `data.py` is told which ids are
the answer and never has to search for them; and content is encoded as plain text, so that a message which contains
"<|end|>" cannot end a turn. Read next: `data.py`.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cli import UserError

SYNTH_RANKS = Path(__file__).parent / "datasets" / "synth.tiktoken"
SYNTH_SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Words with their leading space, single digits, runs of other characters: GPT-2's idea without English contractions.
SYNTH_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


class Piece(NamedTuple):
    ids: list[int]
    turn: int | None  # index of the message whose content this is; None: the template's own tokens


@dataclass
class Tokenizer:
    name: str
    vocab_size: int
    stop: int  # the id that ends an answer
    encode: Callable[[str], list[int]]  # special tokens are never recognised: text stays text
    decode: Callable[[list[int]], str]
    chat: Callable[[list[dict]], list[Piece]]  # [{"role": ..., "content": ...}, ...] -> pieces, in reading order


def load(name_or_folder):
    """The tokenizer of that name or folder. Raises UserError where there is none."""
    if name_or_folder == "synth":
        return _synth()
    if name_or_folder == "gpt2":
        return _gpt2()
    import huggingface  # these two know more than most readers need, and import more than most runs
    import weights

    return huggingface.load(weights.fetch(name_or_folder))


def plain_chat(encode, headers, between, stop):
    """A template for models that have none: header, content, and `stop` after each of the assistant's turns.

    headers: ids in front of each role's content; between: ids after a system or user turn.
    """

    def chat(messages):
        pieces = []
        for turn, message in enumerate(messages):
            role = message["role"]
            after = [stop] if role == "assistant" else between
            pieces += [Piece(headers[role], None), Piece(encode(message["content"]), turn), Piece(after, None)]
        return pieces

    return chat


def read_ranks(path):
    """{token bytes: id} from tiktoken's own file format: one base64 token and its id a line."""
    lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _synth():
    import tiktoken

    if not SYNTH_RANKS.exists():
        raise UserError(f"{SYNTH_RANKS} is missing; make it with python datasets/make_tokenizer.py")
    ranks = read_ranks(SYNTH_RANKS)
    specials = {token: len(ranks) + i for i, token in enumerate(SYNTH_SPECIALS)}
    bpe = tiktoken.Encoding("synth", pat_str=SYNTH_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    headers = {role: [specials[f"<|{role}|>"]] for role in ("system", "user", "assistant")}
    stop = specials["<|end|>"]
    chat = plain_chat(bpe.encode_ordinary, headers, [], stop)
    return Tokenizer("synth", bpe.n_vocab, stop, bpe.encode_ordinary, partial(_decode, bpe), chat)


def _decode(bpe, ids):
    """Text of ids. An embedding may have more rows than there are tokens: such an id is a replacement character."""
    tokens = (bpe.decode_single_token_bytes(i) if i < bpe.n_vocab else b"\xef\xbf\xbd" for i in ids)
    return b"".join(tokens).decode("utf-8", errors="replace")


def _gpt2():
    import requests
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, requests.RequestException) as failure:
        raise UserError(
            f"tiktoken cannot fetch gpt2 ({type(failure).__name__}); go online once, or set TIKTOKEN_CACHE_DIR"
        ) from None
    encode = bpe.encode_ordinary
    headers = {role: encode(f"{role.capitalize()}:\n") for role in ("system", "user", "assistant")}
    chat = plain_chat(encode, headers, encode("\n\n"), bpe.eot_token)
    return Tokenizer("gpt2", bpe.n_vocab, bpe.eot_token, encode, partial(_decode, bpe), chat)
