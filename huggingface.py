"""The tokenizer and the chat template of a Hugging Face folder, with the face of tokenizer.py.

`tokenizer.json` runs in the `tokenizers` library; the template, a program that came with the model, in Jinja's sandbox.
To learn which part of a rendered conversation is whose content, the template is rendered a first time with marks in
place of the contents. What stands between the marks is the template's own text. Then the real rendering must be that
text and the contents (which templates may trim), or the row is refused: nothing is ever searched for among the ids.
"""

import json
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

import weights
from cli import UserError
from tokenizer import Piece, Tokenizer, plain_chat

TODAY = datetime(2025, 1, 1)  # for templates that print the date: a run must not change from day to day
MARK = "\ufdd0{}\ufdd1"  # two code points that Unicode reserves never to be text
TRIMS = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))


def load(folder):
    """The `Tokenizer` of a folder. Raises UserError naming the file at fault."""
    folder = Path(folder)
    path, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = weights.read_json(about) if about.exists() else {}
    try:
        source = path.read_text(encoding="utf-8")
        bpe, content_bpe = tokenizers.Tokenizer.from_str(source), tokenizers.Tokenizer.from_str(_plain(source))
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}; a model needs its tokenizer.json beside its weights") from None
    except Exception as failure:  # the library raises plain Exception for whatever it cannot read
        raise UserError(f"{path}: not a tokenizer that the tokenizers library reads ({failure})") from None
    special = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token")}
    encode = lambda text: content_bpe.encode(text, add_special_tokens=False).ids  # noqa: E731
    decode = partial(bpe.decode, skip_special_tokens=False)
    size = max(bpe.get_vocab(with_added_tokens=True).values()) + 1
    template = _template(folder, settings)
    eos = None if special["eos_token"] is None else bpe.token_to_id(special["eos_token"])
    if template is None:
        if eos is None:
            raise UserError(f"{folder}: has neither a chat template nor an eos_token to end an answer with")
        return Tokenizer(str(folder), size, eos, encode, decode, _plain_chat(bpe, encode, eos))
    render = partial(_render, folder, _compile(template, folder), special)
    parts = cache(partial(_parts, folder, render, special))
    stop = _stop(bpe, parts(("user", "assistant"))[-1][0], eos, folder)
    return Tokenizer(str(folder), size, stop, encode, decode, partial(_chat, folder, bpe, encode, render, parts))


def _plain(source):
    """The same tokenizer without its added tokens, so that "<|im_end|>" in a message is text like any other."""
    return json.dumps(json.loads(source) | {"added_tokens": [], "post_processor": None})


def _plain_chat(bpe, encode, eos):
    """For base models: tokenizer.py's plain template, behind the BOS that the tokenizer itself puts before a text."""
    headers = {role: encode(f"{role.capitalize()}:\n") for role in ("system", "user", "assistant")}
    chat, text = plain_chat(encode, headers, encode("\n\n"), eos), bpe.encode("x", add_special_tokens=False).ids
    whole = bpe.encode("x").ids  # with what the tokenizer's post-processor adds: BOS, in some models EOS
    bos = [] if whole[: len(text)] == text else whole[:1]
    return lambda messages: [Piece(bos, None), *chat(messages)]


def _token(value):
    """A special token's text; tokenizer_config.json has it as a string, or as {"content": string}."""
    return value.get("content") if isinstance(value, dict) else value


def _template(folder, settings):
    """The template's source, from chat_template.jinja or tokenizer_config.json; None if there is none."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _compile(template, folder):
    """The template in a sandbox that lets it compute strings and nothing else, with the functions it may expect."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as failure:
        raise UserError(f"{folder}: the chat template is not valid Jinja ({failure})") from None


def _render(folder, template, special, roles, contents):
    """The rendering of a conversation.

    Where a template has no system role, the system text goes in front of the user's. Where it cannot begin with the
    assistant, an empty user turn goes in front, of which only the BOS is kept.
    """

    def turns(roles, contents):
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return template.render(messages=messages, add_generation_prompt=False, tools=None, documents=None,
                               **{name: token or "" for name, token in special.items()})

    try:
        return turns(roles, contents)
    except jinja2.TemplateError as failure:
        first = failure
    except Exception as failure:  # a template is a program: it may fail in any way
        raise UserError(f"{folder}: the chat template failed ({type(failure).__name__}: {failure})") from None
    try:
        if roles[:2] == ("system", "user"):
            return turns(roles[1:], [f"{contents[0]}\n\n{contents[1]}", *contents[2:]])
        if roles == ("assistant",):
            before, after = turns(("user", "assistant"), [MARK.format("-"), *contents]).split(MARK.format("-"))
            bos = special["bos_token"] or ""
            return (bos if bos and before.startswith(bos) else "") + after
    except (jinja2.TemplateError, ValueError):
        pass
    raise UserError(f"{folder}: the chat template refuses the roles {', '.join(roles)} ({first})") from None


def _parts(folder, render, special, roles):
    """[(the template's text before it, turn)] for each content in reading order; last, (the text after it, None)."""
    marks = [MARK.format(turn) for turn in range(len(roles))]
    rendered, parts = render(roles, marks), []
    if not all(rendered.count(mark) == 1 for mark in marks):
        role = next(role for role, mark in zip(roles, marks, strict=True) if rendered.count(mark) != 1)
        raise UserError(f"{folder}: the chat template does not print the {role}'s content exactly once")
    for turn in sorted(range(len(roles)), key=lambda turn: rendered.index(marks[turn])):
        before, rendered = rendered.split(marks[turn])
        parts.append((before, turn))
    return [*parts, (rendered, None)]


def _chat(folder, bpe, encode, render, parts, messages):
    """`Tokenizer.chat`: the rendering's ids, cut at the contents.

    The rendering is tokenized as a whole, as `transformers` does it, and a token that reaches from the template into a
    content belongs to the content. Only where a content has the text of an added token in it is each piece tokenized by
    itself, the content as plain text.
    """
    roles, contents = zip(*((message["role"], message["content"]) for message in messages), strict=True)
    pieces, rendered = _spans(folder, parts(roles), render(roles, contents), roles, contents)
    added = {token.content for token in bpe.get_added_tokens_decoder().values()}
    if any(token in content for content in contents for token in added):
        texts = [(rendered[start:end], turn) for start, end, turn in pieces]
        own = lambda text: bpe.encode(text, add_special_tokens=False).ids  # noqa: E731
        return [Piece(own(text) if turn is None else encode(text), turn) for text, turn in texts]
    whole = bpe.encode(rendered, add_special_tokens=False)
    made = [Piece([], turn) for _, _, turn in pieces]
    at = 0
    for token, (start, end) in zip(whole.ids, whole.offsets, strict=True):
        while at + 1 < len(pieces) and (start >= pieces[at][1] or end > pieces[at][1] and pieces[at][2] is None):
            at += 1
        made[at].ids.append(token)
    return made


def _spans(folder, parts, rendered, roles, contents):
    """[(start, end, turn or None)] of the rendering's pieces, and the rendering."""
    pieces, at = [], 0
    for (before, turn), (after, _) in zip(parts, parts[1:], strict=False):
        pieces.append((at, at + len(before), None))
        at += len(before)
        forms = (trim(contents[turn]) for trim in TRIMS)
        form = next((form for form in forms if rendered.startswith(form + after, at)), None)
        if form is None or not rendered.startswith(before, at - len(before)):
            raise UserError(f"{folder}: the chat template changes the {roles[turn]}'s content {contents[turn][:40]!r}")
        pieces.append((at, at + len(form), turn))
        at += len(form)
    return [*pieces, (at, len(rendered), None)], rendered


def _stop(bpe, after, eos, folder):
    """The id that the template puts behind an answer: the first special token there, or eos where it has none."""
    added = bpe.get_added_tokens_decoder()
    ids = bpe.encode(after, add_special_tokens=False).ids
    stop = next((i for i in ids if i in added), eos)
    if stop is None:
        raise UserError(f"{folder}: the chat template ends an answer with no special token, and there is no eos_token")
    return stop
