"""The tokenizer and the chat template of a Hugging Face folder, with the face of tokenizer.py.

`tokenizer.json` runs in the `tokenizers` library; the template, a program that came with the model, in Jinja's sandbox.
To learn which part of a rendered conversation is whose content, the template is rendered a first time with marks in
place of the contents. What stands between the marks is the template's own text. Then the real rendering must be that
text and the contents (which templates may trim), or the row is refused: nothing is ever searched for among the ids.

The rendering is tokenized in one go, as `transformers` does it, by a copy of the tokenizer whose control tokens have
secret names. The template's text is given those names; in a message, "<|im_end|>" is text like any other.
"""

import json
import re
import secrets
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import Piece, Tokenizer, plain_chat
from hf import weights
from support.cli import UserError, read_json

TODAY = datetime(2025, 1, 1)  # for templates that print the date: a run must not change from day to day
MARK = "\ufdd0{}\ufdd1"  # two code points that Unicode reserves never to be text
TRIMS = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))
BYTE = "<0x[0-9A-F]{2}>"  # the model's own names for bytes, which some folders list as added tokens too
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # what templates may print


def load(folder):
    """The `Tokenizer` of a folder. Raises UserError naming the file at fault."""
    folder = Path(folder)
    settings, special = _settings(folder)
    public, private, names = _tokenizers(folder / "tokenizer.json")
    template = _template(folder, settings)
    if template is None:
        stop, bos = special.get("eos_token"), public.token_to_id(special.get("bos_token", ""))
        if stop is None:  # as in GPT-2's own folder
            number = _json(folder / "config.json").get("eos_token_id")
            stop = public.id_to_token(number) if isinstance(number, int) and number >= 0 else None
        first = public.encode("").ids[:1]  # what the tokenizer itself puts before a text
        bos = [bos] if bos is not None and settings.get("add_bos_token", first == [bos]) else []
        if stop in names:
            chat = partial(_plain, bos, _plain_chat(private, public.token_to_id(stop)))
    else:
        render = partial(_render, folder, _compile(template, folder, special), special.get("bos_token", ""))
        parts = partial(_parts, folder, render, cache(partial(_skeleton, folder, render)))
        control = _any_of(names)
        hide = partial(control.sub, lambda found: names[found[0]])
        chat = partial(_cut, private, hide, {public.token_to_id(token) for token in names}, parts)
        behind = parts([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])[-1][0]
        stop = next(iter(control.findall(behind)), None)
    if stop not in names:
        raise UserError(f"{folder}: nothing ends an answer: " + (
            "neither tokenizer_config.json nor config.json names an eos_token that tokenizer.json has"
            if template is None else "the chat template puts no special token behind it"))
    return Tokenizer(
        name=str(folder),
        vocab_size=max(public.get_vocab(with_added_tokens=True).values()) + 1,
        stop=public.token_to_id(stop),
        encode=lambda text: private.encode(text, add_special_tokens=False).ids,
        decode=partial(public.decode, skip_special_tokens=False),
        chat=chat,
    )


# ---- tokenizer.json


def _tokenizers(path):
    """The tokenizer, its copy with secret names for control tokens, and {control token: secret name}."""
    try:
        source = path.read_text(encoding="utf-8")
        public = tokenizers.Tokenizer.from_str(source)
        public.no_truncation(), public.no_padding()  # some files ask for these, and a row must not be cut in silence
        spec = json.loads(source) | {"truncation": None, "padding": None}
        names = _secret_names(public, spec)
        private = tokenizers.Tokenizer.from_str(json.dumps(_renamed(spec, names)))
        if any(private.token_to_id(secret) != public.token_to_id(token) for token, secret in names.items()):
            raise ValueError("its added tokens contradict its vocabulary")
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}; a model needs its tokenizer.json beside its weights (from a "
                        "tokenizer.model, transformers makes one: AutoTokenizer, save_pretrained)") from None
    except Exception as failure:  # the library raises plain Exception for whatever it cannot read
        raise UserError(f"{path}: not a tokenizer that the tokenizers library reads ({failure})") from None
    return public, private, names


def _secret_names(public, spec):
    """{control token: a name that no text has in it}. Control tokens are the added tokens, except for blanks.

    Blanks ("\\n\\n", runs of spaces: Gemma and Phi have them for the sake of code) are text like any other, and so are
    tokens that the library overlooks in running text, which happens where the normalizer alters them.
    """
    key, names = secrets.token_hex(8), {}
    for token in spec.get("added_tokens") or []:
        text, number = token["content"], token["id"]
        blank = not token["special"] and not text.replace("▁", " ").strip()
        found = number in public.encode(f".{text}.", add_special_tokens=False).ids
        if found and not blank and not re.fullmatch(BYTE, text):
            names[text] = f"{key}x{number}x"
    return names


def _renamed(spec, names):
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


def _any_of(names):
    """A pattern that finds control tokens; of two that begin alike the longer one, as the library does."""
    return re.compile("|".join(re.escape(token) for token in sorted(names, key=len, reverse=True)) or "(?!)")


def _cut(private, hide, control, parts, messages):
    """`Tokenizer.chat`: the ids of the whole rendering, cut at the contents.

    A token that reaches from the template into a content ("[/INST] yes": "▁yes" takes the template's blank along)
    belongs to the content, but a control token that swallows the blanks beside it does not. A blank content is the
    template's and has no piece.
    """
    rendered, contents = "", []
    for text, turn in parts(messages):
        if turn is not None:
            contents.append((len(rendered), len(rendered) + len(text), turn))
        rendered += hide(text) if turn is None else text
    whole = private.encode(rendered, add_special_tokens=False)
    ids, at, pieces, i = whole.ids, whole.offsets, [], 0
    for start, end, turn in contents:
        first = i
        while i < len(ids) and (at[i][1] <= start or (at[i][0] < start and ids[i] in control)):
            i += 1
        pieces.append(Piece(ids[first:i], None))
        first = i
        while i < len(ids) and at[i][0] < end and ids[i] not in control:
            i += 1
        pieces.append(Piece(ids[first:i], turn))
    return [*pieces, Piece(ids[i:], None)]


def _plain_chat(private, stop):
    """For base models: tokenizer.py's plain template."""

    def encode(text):
        """ids of a text inside another one: SentencePiece-like tokenizers put a "▁" before whatever they are given."""
        line, ids = (private.encode(each, add_special_tokens=False).ids for each in ("\n", "\n" + text))
        return ids[len(line) :] if ids[: len(line)] == line else private.encode(text, add_special_tokens=False).ids

    headers = {role: encode(f"{role.capitalize()}:\n") for role in ("system", "user", "assistant")}
    return partial(plain_chat, encode, headers, encode("\n\n"), stop)


def _plain(bos, chat, messages):
    return [Piece(bos, None), *chat(messages)]


# ---- chat template


def _settings(folder):
    """tokenizer_config.json, and the special tokens that it names, or special_tokens_map.json in older folders."""
    settings, older = _json(folder / "tokenizer_config.json"), {}
    if "added_tokens_decoder" not in settings:
        older = _json(folder / "special_tokens_map.json")
    named = {name: (settings | older).get(name) for name in SPECIAL}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return settings, {name: token for name, token in named.items() if isinstance(token, str)}


def _json(path):
    return read_json(path) if path.exists() else {}


def _template(folder, settings):
    """The template's source, from chat_template.jinja or tokenizer_config.json; None if there is none."""
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    except (OSError, ValueError) as failure:
        raise UserError(f"{path}: cannot be read ({failure})") from None
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", named)
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: the chat template must be a string, or strings by name, one of them default")
    return template


def _compile(template, folder, special):
    """A function messages -> text: the template in a sandbox that lets it compute strings and nothing else."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
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


def _render(folder, template, bos, messages):
    """The rendering of a conversation; where a template cannot begin with the assistant, BOS and what the template
    adds to a user's turn when the assistant's turns come after it."""

    def refused(failure):
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        return UserError(f"{folder}: the chat template refuses the roles {roles} ({reason})")

    try:
        return template(messages=messages)
    except Exception as failure:  # a template is a program: it may fail in any way
        if messages[0]["role"] != "assistant":
            raise refused(failure) from None
        question = [{"role": "user", "content": "?"}]
        try:
            before, both = template(messages=question), template(messages=question + messages)
        except Exception:
            raise refused(failure) from None
        if not both.startswith(before):
            raise refused(failure) from None
        return (bos if before.startswith(bos) else "") + both[len(before) :]


def _joined(messages):
    """The same without a system turn: its text goes in front of the user's, a blank line between them."""
    system, user = messages[0]["content"], messages[1]["content"]
    return [{"role": "user", "content": f"{system}\n\n{user}" if system.strip() else user}, *messages[2:]]


def _skeleton(folder, render, turns):
    """The template's texts around the contents, the turns of these in reading order, and whether to use `_joined`.

    turns: (role, content if that is blank) for each turn. Blank contents are left to the template as they are: some ask
    whether there is any. A template without a system role refuses one, or leaves it out: then the system text goes in
    front of the user's.
    """
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
        rendered = render(_joined(marked))
    texts = re.split(MARK.format(r"(\d+)"), rendered)  # text, turn, text, turn, ..., text
    order = [int(turn) for turn in texts[1::2]]
    for turn, (role, blank) in enumerate(turns):
        if blank is None and order.count(turn) != 1:
            raise UserError(f"{folder}: the chat template does not print the {role}'s content exactly once")
    return texts[::2], order, joined


def _parts(folder, render, skeleton, messages):
    """The rendering as [(text, None for the template's or the turn whose content it is)]."""
    blank = tuple((m["role"], None if m["content"].strip() else m["content"]) for m in messages)
    texts, order, joined = skeleton(blank)
    rendered, parts, at = render(_joined(messages) if joined else messages), [(texts[0], None)], len(texts[0])
    for turn, after in zip(order, texts[1:], strict=True):
        content = messages[turn]["content"]
        form = next((form for form in (trim(content) for trim in TRIMS) if rendered.startswith(form + after, at)), None)
        if form is None:
            break
        parts += [(form, turn), (after, None)]
        at += len(form) + len(after)
    if "".join(text for text, _ in parts) != rendered:
        role, content = messages[turn]["role"], messages[turn]["content"]
        raise UserError(f"{folder}: the chat template changes the {role}'s content {content[:40]!r}")
    return parts
