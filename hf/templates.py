"""Text of Hugging Face folders: tokenizer.json and the chat template, as the `data.Tokenizer` that training uses.

A chat template is a program that prints a conversation. Training must know which of the ids are a message's content,
so that the answer can be the target. The template is therefore rendered twice: once with marks in the place of the
contents, which shows the template's own texts, and once as it is; the two must agree. Nothing is ever searched for
among the ids.

The rendering is tokenized in one go, as `transformers` does it, by a copy of the tokenizer whose control tokens have
secret names. The template's text is given those names; in a message, "<|im_end|>" is text like any other.

Templates and tokenizers are written by strangers. So all of this happens in a process with limits (see `sandbox.py`):
`open_tokenizer` belongs to the process that trains, `functions` and everything below it to the other one.
"""

import contextlib
import json
import re
import secrets
from collections import Counter
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from reprlib import repr as shown  # shortened

from hf import sandbox
from support.cli import UserError, read_json

TODAY = datetime(2025, 1, 1)  # for templates that print the date: a run must not change from day to day
MARK = "\ufdd0{}\ufdd1"  # two code points that Unicode reserves never to be text
TRIMS = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))
BYTE = "<0x[0-9A-F]{2}>"  # the model's own names for bytes, which some folders list as added tokens too
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # what templates may print
LARGEST = 2**26  # bytes of a tokenizer.json; real ones have up to 2**25


def open_tokenizer(folder):
    """The `Tokenizer` of a folder. Raises UserError naming the file at fault."""
    from data import Piece, Tokenizer, plain_chat  # here, because the other process has no use for torch

    path = Path(folder, "tokenizer.json")
    size = path.stat().st_size if path.is_file() else 0
    if not 0 < size < LARGEST:
        raise UserError(f"{path}: No such file, or no tokenizer; a model needs its tokenizer.json beside its weights "
                        "(from a tokenizer.model, transformers makes one: AutoTokenizer, save_pretrained)")
    ask = sandbox.start("hf.templates", folder, size)
    vocab_size, stop, plain = ask("describe")

    def chat(messages):
        if plain is None:
            return [Piece(*piece) for piece in ask("chat", messages)]
        bos, tags, between = plain
        return [Piece(bos, None), *plain_chat(partial(ask, "encode_inside"), tags, between, stop, messages)]

    return Tokenizer(str(folder), vocab_size, stop, partial(ask, "encode"), partial(ask, "decode"), chat)


def functions(folder):
    """{name: function}: what the process that trains may ask for."""
    folder, plain = Path(folder), None
    settings, special = read_settings(folder)
    template = read_template(folder, settings)
    printed = "".join([template or "", special.get("bos_token", ""), special.get("eos_token", "")])
    public, private, names = read_tokenizer(folder / "tokenizer.json", printed)
    encode, inside = partial(private.encode, add_special_tokens=False), partial(encode_inside, private)
    if template is None:
        chat, stop = None, special.get("eos_token")
        if stop is None:  # as in GPT-2's own folder
            number = optional_json(folder / "config.json").get("eos_token_id")
            stop = public.id_to_token(number) if isinstance(number, int) and 0 <= number < 2**31 else None
        bos, first = public.token_to_id(special.get("bos_token", "")), public.encode("").ids[:1]
        has_bos = bos is not None and settings.get("add_bos_token", first == [bos])  # what the tokenizer itself does
        tags = {role: inside(f"{role.capitalize()}:\n") for role in ("system", "user", "assistant")}
        plain = [bos] if has_bos else [], tags, inside("\n\n")
    else:
        render = partial(rendering, folder, compiled(template, folder, special), special.get("bos_token", ""))
        parts = partial(parts_of, folder, render, lru_cache(100)(partial(skeleton, folder, render)))
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)  # as the library does
        control = re.compile("|".join(longest_first) or "(?!)")
        hide = partial(control.sub, lambda found: names[found[0]])
        chat = partial(cut, encode, hide, {public.token_to_id(token) for token in names}, parts)
        frame = [text for text, _ in parts([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])]
        stop = next(iter(control.findall(frame[-1])), None)
        if any(token not in printed for token in control.findall("".join(frame))):
            printed = "".join(names)  # it puts names together: "<|" + role + "|>"
        bos = special.get("bos_token")
        if bos and bos in frame[0] and bos not in names:
            raise UserError(f"{folder}/tokenizer.json: the chat template's bos_token {bos} is none of its added tokens")
    if stop not in names:
        raise UserError(f"{folder}: nothing ends an answer: " + (
            "neither tokenizer_config.json nor config.json names an eos_token that tokenizer.json has"
            if template is None else "the chat template puts no special token behind it"))
    # Some folders have control tokens that the model does not (Gemma-3's <image_soft_token>), and no text makes them.
    vocab_size = 1 + max(number for token, number in public.get_vocab(with_added_tokens=True).items()
                         if token not in names or token in printed or token == stop)
    return {
        "describe": lambda: (vocab_size, public.token_to_id(stop), plain),
        "encode": lambda text: encode(text).ids,
        "encode_inside": inside,
        "decode": partial(public.decode, skip_special_tokens=False),
        "chat": chat,
    }


# ---- tokenizer.json


def read_tokenizer(path, printed):
    """The tokenizer, its copy with secret names for control tokens, and {control token: secret name}."""
    import tokenizers

    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        spec |= {"truncation": None, "padding": None}  # some files ask for these, and a row must not be cut in silence
        spec["model"]["dropout"] = None  # BPE dropout draws at random: the same text would get other ids each time
        public = tokenizers.Tokenizer.from_str(json.dumps(spec))
        names = secret_names(public, spec, printed)
        private = tokenizers.Tokenizer.from_str(json.dumps(renamed(spec, names)))
        if any(private.token_to_id(secret) != public.token_to_id(token) for token, secret in names.items()):
            raise ValueError("its added tokens contradict its vocabulary")
    except Exception as failure:  # the library raises plain Exception for whatever it cannot read
        raise UserError(f"{path}: not a tokenizer that the tokenizers library reads ({failure})") from None
    return public, private, names


def secret_names(public, spec, printed):
    """{control token: a name that no text has in it}. Control tokens are the added tokens that are special, or that
    stand in `printed`, the template's source (Qwen-3's <think>) with BOS and EOS, except for blanks.

    All others (Gemma's <b> and runs of spaces) are text like any other, and so are tokens that the library overlooks in
    running text, which happens where the normalizer alters them.
    """
    key, names = secrets.token_hex(8), {}
    for token in spec.get("added_tokens") or []:
        text, number = token["content"], token["id"]
        control = token["special"] or text in printed and text.replace("▁", " ").strip()
        found = number in public.encode(f".{text}.", add_special_tokens=False).ids
        if found and control and not re.fullmatch(BYTE, text):
            names[text] = f"{key}x{number}x"
    return names


def renamed(spec, names):
    """tokenizer.json with those names, and without what it puts around a text."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:  # a Unigram model has (token, score), numbered by their order
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:  # pairs, or in older files strings: none may spell a control token
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [token | {"content": names.get(token["content"], token["content"])}
             for token in spec.get("added_tokens") or [] if not re.fullmatch(BYTE, token["content"])]
    return spec | {"model": model, "added_tokens": added, "post_processor": None}


def cut(encode, hide, control, parts, messages):
    """`Tokenizer.chat`, its pieces as (ids, turn): the ids of the whole rendering, cut at the contents.

    A token that reaches from the template into a content ("[/INST] yes": "▁yes" takes the template's blank along)
    belongs to the content, and so does such a blank alone ("▁", "6"): what stands in front of an answer must not tell
    how it begins. But a control token that swallows the blanks beside it does not. A blank content is the template's
    and has no piece.
    """
    texts, contents, end = [], [], 0
    for text, turn in parts(messages):
        texts.append(hide(text) if turn is None else text)
        start, end = end, end + len(texts[-1])
        if turn is not None:
            contents.append((start - len(texts[-2]) + len(texts[-2].rstrip(" ")), end, turn))
    whole = encode("".join(texts))
    ids, at, pieces, i = whole.ids, whole.offsets, [], 0
    for start, end, turn in contents:
        first = i
        while i < len(ids) and (at[i][1] <= start or (at[i][0] < start and ids[i] in control)):
            i += 1
        pieces.append((ids[first:i], None))
        first = i
        while i < len(ids) and at[i][0] < end and ids[i] not in control:
            i += 1
        pieces.append((ids[first:i], turn))
    return [*pieces, (ids[i:], None)]


def encode_inside(private, text):
    """ids of a text inside another one: SentencePiece-like tokenizers put a "▁" before whatever they are given."""
    line, ids = (private.encode(each, add_special_tokens=False).ids for each in ("\n", "\n" + text))
    return ids[len(line) :] if ids[: len(line)] == line else private.encode(text, add_special_tokens=False).ids


# ---- chat template


def read_settings(folder):
    """tokenizer_config.json, and the special tokens that it names, or special_tokens_map.json in older folders."""
    settings, older = optional_json(folder / "tokenizer_config.json"), {}
    if "added_tokens_decoder" not in settings:
        older = optional_json(folder / "special_tokens_map.json")
    named = {name: (settings | older).get(name) for name in SPECIAL}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return settings, {name: token for name, token in named.items() if isinstance(token, str)}


def optional_json(path):
    return read_json(path) if path.is_file() else {}


def read_template(folder, settings):
    """The template's source, from chat_template.jinja or tokenizer_config.json; None if there is none."""
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    except (OSError, ValueError) as failure:
        raise UserError(f"{path}: cannot be read ({failure})") from None
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", named)
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: the chat template must be a string, or strings by name, one of them default")
    return template


def compiled(template, folder, special):
    """A function messages -> text: the template in Jinja's sandbox, where it can compute strings and nothing else."""
    import jinja2
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    # {% generation %} ... {% endgeneration %} is an extension of transformers that prints what is inside it
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    template = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)
    try:
        compiled = environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as failure:
        raise UserError(f"{folder}: the chat template is not valid Jinja ({failure})") from None
    return partial(compiled.render, tools=None, documents=None, add_generation_prompt=False, **special)


def rendering(folder, template, bos, messages):
    """The rendering of a conversation; where a template cannot begin with the assistant, BOS and what the template
    adds to a user's turn when the assistant's turns come after it."""
    try:
        return template(messages=messages)
    except Exception as failure:  # a template is a program: it may fail in any way
        roles, reason = shown([message["role"] for message in messages]), f"{type(failure).__name__}: {failure}"
        refused = UserError(f"{folder}: the chat template refuses the roles {roles} ({reason})")
    if messages[0]["role"] == "assistant":
        question = [{"role": "user", "content": "?"}]
        with contextlib.suppress(Exception):
            before, both = template(messages=question), template(messages=question + messages)
            if both.startswith(before):
                return (bos if before.startswith(bos) else "") + both[len(before) :]
    raise refused


def joined_system(messages):
    """The same without a system turn: its text goes in front of the user's, a blank line between them."""
    system, user = messages[0]["content"], messages[1]["content"]
    return [{"role": "user", "content": f"{system}\n\n{user}" if system.strip() else user}, *messages[2:]]


def skeleton(folder, render, turns):
    """The template's texts around the contents, the turns of these in reading order, whether to use `joined_system`: a
    template without a system role refuses one, or leaves it out. turns: (role, content if that is blank) for each;
    blank contents are left to the template as they are, since some ask whether there is any."""
    marked = [{"role": role, "content": MARK.format(turn) if blank is None else blank}
              for turn, (role, blank) in enumerate(turns)]
    joinable = [role for role, _ in turns[:2]] == ["system", "user"]
    try:
        rendered = render(marked)
    except UserError:
        if not joinable:
            raise
        rendered = None
    joined = joinable and (rendered is None or turns[0][1] is None and marked[0]["content"] not in rendered)
    if joined:
        rendered = render(joined_system(marked))
    texts = re.split(MARK.format(r"(\d+)"), rendered)  # text, turn, text, turn, ..., text
    printed = Counter(texts[1::2])
    for turn, (role, blank) in enumerate(turns):
        if printed.pop(str(turn), 0) != (blank is None):
            raise UserError(f"{folder}: the chat template does not print the {role}'s content exactly once")
    if printed:
        raise UserError(f"{folder}: the chat template prints U+FDD0, which is no character of a text")
    return texts[::2], [int(turn) for turn in texts[1::2]], joined


def parts_of(folder, render, skeleton, messages):
    """The rendering as [(text, None for the template's or the turn whose content it is)]."""
    blank = tuple((m["role"], None if m["content"].strip() else m["content"]) for m in messages)
    texts, order, joined = skeleton(blank)
    rendered, parts, at = render(joined_system(messages) if joined else messages), [(texts[0], None)], len(texts[0])
    for turn, after in zip(order, texts[1:], strict=True):
        content = messages[turn]["content"]
        form = next((form for form in (trim(content) for trim in TRIMS) if rendered.startswith(form + after, at)), None)
        if form is None:
            break
        parts += [(form, turn), (after, None)]
        at += len(form) + len(after)
    if "".join(text for text, _ in parts) != rendered:
        role, content = messages[turn]["role"], messages[turn]["content"]
        raise UserError(f"{folder}: the chat template changes the {role}'s content {content[:40]!r}, or what it prints "
                        "behind it depends on the next content (as with <think>)")
    return parts


if __name__ == "__main__":
    sandbox.serve(functions)
