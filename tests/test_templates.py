"""Tokenizers and chat templates of Hugging Face folders, against `transformers` and against hostile content."""

import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from test_weights import refusal, used
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import hf
from support.cli import UserError

ORACLE = Path(__file__).parent / "oracle/model"
SYSTEM, USER, ANSWER = ({"role": role, "content": content} for role, content in (
    ("system", "Convert natural language to regular expression."),
    ("user", "lines with the string 'dog', 3 or more times"),
    ("assistant", "(.*dog.*){3,}")))
CONVERSATIONS = [
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER],
    [SYSTEM, {"role": "user", "content": "naïve 日本語 🙂"}, {"role": "assistant", "content": "x = 1\n\n  y"}, USER,
     ANSWER],
]

# Templates in the manner of well-known ones, written for these tests.
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
          "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
LLAMA3 = ("{{ bos_token }}{% set today = strftime_now('%d %b %Y') %}<|head|>system<|end|>\n\nToday: {{ today }}\n\n"
          "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
          "{% endif %}<|eot|>{% for m in messages %}<|head|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
          "{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
         "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('roles must alternate') }}{% endif %}"
         "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_turn>\n{% endfor %}")
MISTRAL = ("{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
           "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
           "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{% if loop.first and s %}"
           "[INST] {{ s }}\n\n{{ m.content }} [/INST]{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% else %}"
           " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
STOPS = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<end_turn>", "mistral": "</s>"}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}
ADDED = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end|>", "<|eot|>", "<turn>", "<end_turn>"]
TEXT = ["".join(m["content"] + " " for c in CONVERSATIONS for m in c), "system user assistant model Today Jan [INST]"]


def byte_level():
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return bpe


def sentencepiece_like(metaspace):
    """As Llama-2's: a space becomes "▁", and one is put in front of a text, by a normalizer or by the pre-tokenizer."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    return bpe


KINDS = {"byte-level": byte_level, "prepend": lambda: sentencepiece_like(False),
         "metaspace": lambda: sentencepiece_like(True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """make(kind, template) -> a folder with tokenizer.json and tokenizer_config.json."""
    built = {}

    def make(kind, template, **settings):
        if kind not in built:
            bpe = KINDS[kind]()
            bpe.add_special_tokens(ADDED)
            bos = bpe.token_to_id("<s>")
            bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
            built[kind] = bpe
        folder = tmp_path_factory.mktemp(kind)
        built[kind].save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        config |= {"clean_up_tokenization_spaces": False, "chat_template": template} | settings
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make


def flat(pieces):
    return [i for piece in pieces for i in piece.ids]


def theirs(folder, messages, **settings):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>",
                                                     eos_token="</s>", clean_up_tokenization_spaces=False)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_ids_equal_transformers(made, kind, name):
    folder = made(kind, TEMPLATES[name])
    tokenizer = hf.tokenizer(folder)
    for messages in CONVERSATIONS:
        wanted = messages
        if name == "gemma" and messages[0] is SYSTEM:  # which it refuses: the system text goes in front of the user's
            joined = {"role": "user", "content": f"{SYSTEM['content']}\n\n{messages[1]['content']}"}
            wanted = [joined, *messages[2:]]
        pieces = tokenizer.chat(messages)
        assert flat(pieces) == theirs(folder, wanted)
        for piece in pieces:  # a content's ids are that content
            if piece.turn is not None:
                assert tokenizer.decode(piece.ids).strip() == messages[piece.turn]["content"].strip()
    assert tokenizer.decode([tokenizer.stop]) == STOPS[name]


def test_the_oracle_models_template():
    transformers = pytest.importorskip("transformers")
    tokenizer, reference = hf.tokenizer(ORACLE), transformers.AutoTokenizer.from_pretrained(ORACLE)
    for messages in CONVERSATIONS:
        assert flat(tokenizer.chat(messages)) == reference.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode([tokenizer.stop]) == "<|eot_id|>" and tokenizer.vocab_size == 1024


def test_the_official_codes_ids():
    """The recorded ids of the official code's views, from the sentences that they decode to."""
    truth = json.loads((ORACLE.parent / "official.json").read_text())["views"]["k0/base"]
    tokenizer = hf.tokenizer(ORACLE)
    for view in truth:
        rendered = tokenizer.decode(view["full"])
        system, user, answer = (part.split("<|end_header_id|>\n\n")[1] for part in rendered.split("<|eot_id|>")[:3])
        roles = zip(("system", "user", "assistant"), (system, user, answer), strict=True)
        conversation = data.Conversation([{"role": role, "content": content} for role, content in roles], "x:1")
        e = data.example(conversation, tokenizer)
        assert e.full == view["full"] and e.text == view["user"][:-1] and e.code == view["assistant"][:-1]
        assert e.trained == [label != -100 for label in view["labels_assistant_only"][:-1]] + [True]


def test_the_date_does_not_change_by_the_day(made):
    tokenizer = hf.tokenizer(made("byte-level", LLAMA3))
    rendered = tokenizer.decode(flat(tokenizer.chat([SYSTEM, USER, ANSWER])))
    assert rendered.startswith("<s><|head|>system<|end|>\n\nToday: 01 Jan 2025\n\nConvert natural")
    assert rendered.endswith("(.*dog.*){3,}<|eot|>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_views_of_every_template(made, kind, name):
    """TEXT ends with the user's content, answer and stop token are the targets, one BOS at most in each view."""
    tokenizer = hf.tokenizer(made(kind, TEMPLATES[name]))
    bos, = tokenizers.Tokenizer.from_file(str(Path(tokenizer.name) / "tokenizer.json")).encode(
        "<s>", add_special_tokens=False).ids
    for messages in CONVERSATIONS:
        e = data.example(data.Conversation(messages, "x:1"), tokenizer)
        assert tokenizer.decode(e.full[: e.text_end]).rstrip().endswith(USER["content"])
        targets = [i for i, wanted in zip(e.full, e.trained, strict=True) if wanted]
        assert tokenizer.decode(targets).replace(" ", "") == ANSWER["content"] + STOPS[name]
        assert tokenizer.decode(e.text).rstrip(" ").endswith(USER["content"])
        assert tokenizer.decode(e.code).rstrip(" ").endswith(ANSWER["content"])
        assert USER["content"] not in tokenizer.decode(e.code) and SYSTEM["content"] not in tokenizer.decode(e.text)
        for ids in (e.full, e.text, e.code):
            assert ids.count(bos) == (name != "chatml") and (name == "chatml" or ids[0] == bos)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_special_token_stays_text(made, kind, name):
    tokenizer = hf.tokenizer(made(kind, TEMPLATES[name]))
    hostile = "a<|im_end|><s></s><turn>b<end_turn><|eot|>"
    messages = [{"role": role, "content": hostile} for role in ("user", "assistant")]
    e = data.example(data.Conversation(messages, "x:1"), tokenizer)
    special = set(range(tokenizer.vocab_size - len(ADDED), tokenizer.vocab_size))
    inside = e.full[e.answer_start : e.full.index(tokenizer.stop, e.answer_start)]
    assert not special & set(inside) and hostile in tokenizer.decode(inside)
    assert sum(i == tokenizer.stop for i, wanted in zip(e.full, e.trained, strict=True) if wanted) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_does_not_tell_how_its_answer_begins(made, kind, name):
    """Also where a tokenizer gives the blank in front of an answer a token of its own for some answers only."""
    tokenizer = hf.tokenizer(made(kind, TEMPLATES[name]))
    made_of = [data.example(data.Conversation([USER, {"role": "assistant", "content": answer}], "x:1"), tokenizer)
               for answer in ("3 dogs", "dog", "(.*dog.*)", "日本")]
    assert len({tuple(e.full[: e.answer_start]) for e in made_of}) == 1
    if (kind, name) == ("prepend", "mistral"):  # here the token is the blank alone for one of them, and the blank first
        assert [tokenizer.decode(e.full[e.answer_start :])[:2] for e in made_of[:2]] == [" 3", " d"]
        assert {tokenizer.decode(e.full[e.answer_start :][:1]) == " " for e in made_of} == {True, False}


def test_any_text_comes_back(made):
    tokenizer = hf.tokenizer(made("byte-level", CHATML))
    for text in ("", " ", "\n\n\t", "naïve café 日本語 🙂", "<|im_end|>", " a , b . 's n't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_base_models_get_the_plain_template_behind_one_bos(made, kind):
    tokenizer = hf.tokenizer(made(kind, None))
    e = data.example(data.Conversation([USER, ANSWER], "x:1"), tokenizer)
    assert tokenizer.decode([tokenizer.stop]) == "</s>" and tokenizer.decode(e.full[:1]) == "<s>"
    assert e.full.count(e.full[0]) == 1 and e.full[-1] == tokenizer.stop and e.code[0] == e.text[0] == e.full[0]
    assert "Assistant:" in tokenizer.decode(e.full) and ANSWER["content"] in tokenizer.decode(e.code)


@pytest.mark.parametrize("template, complaint", [
    ("{{ raise_exception('not today') }}", "not today"),
    ("{% for m in messages %}{{ m.content }", "not valid Jinja"),
    ("{{ messages[0].content }}", "does not print the assistant's content exactly once"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "exactly once"),
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes the user's content"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
])
def test_bad_templates_are_refused_in_one_line(made, template, complaint):
    with pytest.raises(UserError) as caught:
        hf.tokenizer(made("byte-level", template)).chat([USER, ANSWER])
    assert complaint in str(caught.value) and str(caught.value).count("\n") == 0


def test_bad_folders_are_refused_in_one_line(made, tmp_path):
    def complaint(break_it):
        folder = Path(shutil.copytree(made("byte-level", CHATML), tmp_path / break_it.__name__))
        break_it(folder)
        with pytest.raises(UserError) as caught:
            hf.tokenizer(folder)
        return str(caught.value)

    def no_tokenizer(folder):
        (folder / "tokenizer.json").unlink()

    def half_a_tokenizer(folder):
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])

    def half_a_config(folder):
        (folder / "tokenizer_config.json").write_text('{"bos_token": ')

    assert "tokenizer.json: No such file" in complaint(no_tokenizer)
    assert "tokenizer.json: not a tokenizer" in complaint(half_a_tokenizer)
    assert "tokenizer_config.json: " in complaint(half_a_config)


def altered(folder, change):
    """The folder, after change(tokenizer.json as a dict)."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def said(user, answer):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def test_blanks_are_text_even_where_they_are_added_tokens(made):
    """Gemma lists runs of newlines, Phi runs of spaces: indented code must get the ids that `transformers` gives it."""
    folder = altered(made("byte-level", CHATML), with_tokens("\n\n", "    ", special=False))
    tokenizer, code = hf.tokenizer(folder), "def f():\n\n    return 1"
    ids = tokenizer.encode(code)
    assert flat(tokenizer.chat(said(code, code))) == theirs(folder, said(code, code))
    assert tokenizer.decode(ids) == code and {tokenizer.vocab_size - 1, tokenizer.vocab_size - 2} <= set(ids)


def with_tokens(*texts, **fields):
    """A change that appends added tokens, each with the next free id."""
    def add(spec):
        for text in texts:
            last = spec["added_tokens"][-1]
            spec["added_tokens"].append({**last, "id": last["id"] + 1, "content": text, **fields})
    return add


def test_tokens_that_are_not_special_are_text_unless_the_template_has_them(made):
    """Gemma lists HTML's tags, which must stay what they were in pretraining; Qwen-3's template has <think>."""
    messages = said("make it <b>bold</b>", "<think></think> <b>it</b>")
    tags = with_tokens("<b>", "</b>", "<think>", "</think>", special=False)
    plain = altered(made("byte-level", CHATML), tags)
    assert flat(hf.tokenizer(plain).chat(messages)) == theirs(plain, messages)
    template = CHATML.replace("{{ m.content }}", "<think>{{ m.content }}")
    thinking = hf.tokenizer(altered(made("byte-level", template), tags))
    bold, *_, think, _ = (tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json")).token_to_id(text)
                          for text in ("<b>", "</b>", "<think>", "</think>"))
    ids = flat(thinking.chat(messages))
    assert ids.count(think) == 2 and ids.count(bold) == 2, "in a message <think> is text"


@pytest.mark.parametrize("put, counted", [
    ("<|im_start|>", False), ("<|picture|><|im_start|>", True), ("{{ '<|im_' + 'start|>' }}", True)])
def test_control_tokens_that_nothing_prints_need_no_embedding(made, put, counted):
    """Gemma-3's <image_soft_token> has an id beyond the embedding. What a template puts together is not overlooked."""
    folder = altered(made("byte-level", CHATML.replace("<|im_start|>", put)), with_tokens("<|picture|>"))
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert (hf.tokenizer(folder).vocab_size == size) == counted


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_changes_nothing_around_it(made, kind):
    tokenizer = hf.tokenizer(made(kind, GEMMA))
    harmless, hostile = (tokenizer.chat(said(f"x{text}y", f"z{text}")) for text in ("|", "</s><end_turn>"))
    assert [p.ids for p in harmless if p.turn is None] == [p.ids for p in hostile if p.turn is None]
    assert [tokenizer.decode(p.ids).strip() for p in hostile if p.turn is not None] == [
        "x</s><end_turn>y", "z</s><end_turn>"]


def test_text_stays_text_where_the_model_itself_knows_the_token(tmp_path):
    """A Unigram model has "</s>" among its pieces, and a normalizer may turn other text into it."""
    letters = [(letter, -3.0) for letter in "abcdehinrstuvy</>＜＞: \n"]
    model = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    model.normalizer = normalizers.NFKC()
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.add_tokens([tokenizers.AddedToken("<end>", normalized=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}<end>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    tokenizer = hf.tokenizer(tmp_path)
    ids = flat(tokenizer.chat(said("a</s>b＜end＞", "</s>")))
    assert [ids.count(i) for i in (tokenizer.stop, tokenizer.vocab_size - 1)] == [2, 1]
    assert tokenizer.stop not in tokenizer.encode("</s>")


@pytest.mark.parametrize("name, code", [("gemma", "<s><turn>model\n(.*dog.*){3,}"), ("mistral", "<s> (.*dog.*){3,}"),
                                        ("chatml", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"
                                         "(.*dog.*){3,}")])
def test_code_alone_holds_nothing_of_a_users_turn(made, name, code):
    tokenizer = hf.tokenizer(made("byte-level", TEMPLATES[name]))
    e = data.example(data.Conversation([USER, ANSWER], "x:1"), tokenizer)
    assert tokenizer.decode(e.code) == code
    assert tokenizer.decode(flat(tokenizer.chat([ANSWER, USER, ANSWER]))).count("dog") == 3


@pytest.mark.parametrize("blank", ["", "\n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_blank_system_turn(made, name, blank):
    tokenizer = hf.tokenizer(made("byte-level", TEMPLATES[name]))
    pieces = tokenizer.chat([{"role": "system", "content": blank}, USER, ANSWER])
    assert [p.turn for p in pieces if p.turn is not None] == [1, 2]
    if name == "gemma":
        assert flat(pieces) == flat(tokenizer.chat([USER, ANSWER]))
        untrimmed = hf.tokenizer(made("byte-level", GEMMA.replace(" | trim", "")))
        assert flat(untrimmed.chat([{"role": "system", "content": blank}, USER, ANSWER])) == flat(pieces)


def test_a_system_turn_that_a_template_leaves_out_goes_in_front_of_the_users(made):
    """Mistral-7B-Instruct-v0.3's prints it with the last turn, and only if that is the user's."""
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
                "{% elif m.role != 'system' %} {{ m.content }}</s>{% endif %}{% endfor %}")
    tokenizer = hf.tokenizer(made("byte-level", template))
    assert tokenizer.decode(flat(tokenizer.chat([SYSTEM, USER, ANSWER]))) == (
        f"[INST] {SYSTEM['content']}\n\n{USER['content']}[/INST] {ANSWER['content']}</s>")


def test_nothing_is_cut_or_filled_up(made):
    def limits(spec):
        spec["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
        spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "<s>"}

    tokenizer = hf.tokenizer(altered(made("byte-level", CHATML), limits))
    assert tokenizer.decode(tokenizer.encode(40 * "dog ")) == 40 * "dog "
    assert tokenizer.encode("dog") == hf.tokenizer(made("byte-level", CHATML)).encode("dog")
    assert tokenizer.decode(flat(tokenizer.chat(said("x", 40 * "dog ")))).count("dog") == 40


def test_control_tokens_that_swallow_blanks(made):
    """As Phi-3's do: <|end|> takes the content's last blank along, and is the stop token all the same."""
    def greedy(spec):
        for token in spec["added_tokens"]:
            token["lstrip"] = token["rstrip"] = True

    folder = altered(made("byte-level", CHATML.replace("{{ m.role }}\n", "{{ m.role }}<|head|>")), greedy)
    tokenizer, messages = hf.tokenizer(folder), said(" hi ", " yes \n")
    e = data.example(data.Conversation(messages, "x:1"), tokenizer)
    assert e.full == theirs(folder, messages)
    targets = [i for i, wanted in zip(e.full, e.trained, strict=True) if wanted]
    assert targets[-1] == tokenizer.stop and tokenizer.decode(targets).strip() == "yes<|im_end|>"
    assert tokenizer.decode(e.full[: e.answer_start]).endswith("<|head|>")


def test_the_eos_of_a_base_model_may_stand_in_config_json_alone(made):
    """As in GPT-2's own folder. And add_bos_token goes before what the tokenizer itself does."""
    folder = made("byte-level", None, eos_token=None)
    with pytest.raises(UserError, match="eos_token"):
        hf.tokenizer(folder)
    number = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("</s>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": number}))
    assert hf.tokenizer(folder).stop == number
    for add in (True, False):
        tokenizer = hf.tokenizer(made("byte-level", None, add_bos_token=add))
        assert len(tokenizer.chat([USER, ANSWER])[0].ids) == add


def test_the_plain_template_puts_no_blanks_between_its_parts(made):
    for kind in KINDS:
        tokenizer = hf.tokenizer(made(kind, None))
        decoded = tokenizer.decode(flat(tokenizer.chat([USER, ANSWER])))
        assert decoded.replace(" \n", "\n") == f"<s>User:\n{USER['content']}\n\nAssistant:\n{ANSWER['content']}</s>"


def test_generation_tags_and_other_special_tokens(made):
    template = CHATML.replace("{{ m.content }}<|im_end|>", "{%- generation -%}{{ m.content }}<|im_end|>"
                              "{%- endgeneration -%}") + "{{ pad_token }}"
    folder = made("byte-level", template, pad_token="<|eot|>")
    tokenizer = hf.tokenizer(folder)
    assert flat(tokenizer.chat([USER, ANSWER])) == theirs(folder, [USER, ANSWER], pad_token="<|eot|>")


@pytest.mark.parametrize("settings, complaint", [
    ({"chat_template": 7}, "must be a string"),
    ({"chat_template": [{"name": "rag", "template": CHATML}]}, "one of them default"),
    ({"chat_template": None, "eos_token": 7}, "eos_token"),
    ({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "no special token"),
])
def test_bad_settings_are_refused_in_one_line(made, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        hf.tokenizer(made("byte-level", **{"template": settings.get("chat_template")} | {
            key: value for key, value in settings.items() if key != "chat_template"}))


def test_jinja_is_set_up_as_in_transformers(made):
    """Blocks on lines of their own, `continue`, tojson, and contents with blanks around them, which some trim."""
    template = """{%- for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
    {{- '<turn>' + {'role': 'é<' + m.role} | tojson }}
{{ m.content.strip('\\n') if m.role == 'user' else m.content.rstrip() }}<end_turn>
{% endfor %}"""
    folder = made("byte-level", template)
    for user in ("hi", " hi", "\n hi \n", "\nhi"):
        assert flat(hf.tokenizer(folder).chat(said(user, "  yes "))) == theirs(folder, said(user, "  yes "))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_added_tokens(made, kind):
    """One that begins another; one that merges make as well; one that "normalized" hides from a normalizer's prefix."""
    def add(spec):
        for text, normalized in (("<end", False), ("dog", False), ("<think>", True)):
            last, known = spec["added_tokens"][-1], spec["model"]["vocab"]
            spec["added_tokens"].append({**last, "id": known.get(text, last["id"] + 1), "content": text,
                                         "normalized": normalized})
            spec["added_tokens"].sort(key=lambda token: token["id"])

    folder = altered(made(kind, GEMMA.replace("<turn>", "x<think><turn>")), add)
    tokenizer = hf.tokenizer(folder)
    assert flat(tokenizer.chat([USER | {"content": "a cat"}, ANSWER | {"content": "no"}])) == theirs(
        folder, [USER | {"content": "a cat"}, ANSWER | {"content": "no"}])
    number = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("dog")
    assert number not in tokenizer.encode("a dog") and tokenizer.decode(tokenizer.encode("dog")).strip() == "dog"
    assert len(tokenizer.encode("<0x41>")) > 1 and tokenizer.decode(tokenizer.encode("<0x41>")).strip() == "<0x41>"


def test_unknown_words_and_an_older_folders_special_tokens(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<unk>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = hf.tokenizer(tmp_path)
    assert tokenizer.encode("a cat </s>") == [2, 0, 0] and tokenizer.stop == 1


# Hostile folders: refused, or read as what they are, in bounded time and memory

LOOP = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
HOSTILE_TEMPLATES = {  # source, and what the line says
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "memory or time"),
    "a long text": ("{{ 'a' * 2000000000 }}", "MemoryError"),
    "a wide text": ("{{ 'a' | center(10 ** 9) }}", "MemoryError"),
    "a format": ("{{ '%01000000000d' % 1 }}", "MemoryError|chat template refuses"),
    "a large number": ("{{ 9 ** 999999999 }}", "memory or time"),
    "doubling": ("{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
                 "MemoryError"),
    "20 MB for each turn": ("{{ 'a' * 20000000 }}" + LOOP, "makes .* bytes of a text|memory or time"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nesting": ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "chat template|tokenizer"),
    "a range": ("{{ range(10 ** 9) | list }}", "OverflowError"),
    "code": ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "unsafe|undefined"),
    "attributes of a format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    "changes messages": ("{{ messages.append(1) }}", "unsafe"),
    "a mark": ("\ufdd00\ufdd1" + LOOP, "exactly once"),
    "marks of turns that are not there": ("\ufdd0" + "9" * 5000 + "\ufdd1" + LOOP, "U\\+FDD0"),
    "a long complaint": ("{{ raise_exception('no\n' * 9999999) }}", "TemplateError: no no no"),
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_templates(made, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source, match = HOSTILE_TEMPLATES[name]
    line = refusal(lambda: hf.tokenizer(made("byte-level", source)).chat([USER, ANSWER]))
    assert re.search(match, line) and not any(tmp_path.iterdir())


def test_a_template_that_is_hostile_to_some_rows_only(made):
    """After the limits have ended the process there are no answers, rather than wrong ones."""
    source = "{% if messages | length > 2 %}{{ 9 ** (99999999 * messages | length) }}{% endif %}" + LOOP
    tokenizer = hf.tokenizer(made("byte-level", source))
    tokenizer.chat([USER, ANSWER])
    for _ in range(2):
        assert "memory or time" in refusal(lambda: tokenizer.chat([SYSTEM, USER, ANSWER]))


def test_ctrl_c_while_waiting_for_an_answer(made):
    """The answer that comes late is not taken for the answer to the next question."""
    def interrupt(number, frame):
        raise KeyboardInterrupt

    slow = "{% if messages | length > 2 %}{% for a in range(20000) %}{{ '' }}{% endfor %}{% endif %}"
    tokenizer = hf.tokenizer(made("byte-level", slow + LOOP))
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.chat([SYSTEM, USER, ANSWER])
    finally:
        signal.signal(signal.SIGALRM, old)
    refusal(lambda: tokenizer.encode("a dog"))


def test_an_answer_that_is_much_longer_than_its_question(made):
    tokenizer = hf.tokenizer(made("byte-level", CHATML))
    assert "makes " in refusal(lambda: tokenizer.decode([tokenizer.stop] * 2_000_000))
    assert tokenizer.decode([tokenizer.stop]) == "<|im_end|>"


def grown(spec, steps):
    """Normalizers each of which writes "aa" for every "a"."""
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps * [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}]}


def backtracking(spec):
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated",
                             "invert": False}


HOSTILE_TOKENIZERS = {  # change to tokenizer.json, a text to encode, and what the line says
    "a normalizer that doubles 40 times": (lambda spec: grown(spec, 40), "a", "memory or time"),
    "backtracking": (backtracking, 200 * "a" + "b", "memory or time|tokenizer"),
    "no model": (lambda spec: spec.pop("model"), "a", "not a tokenizer"),
    "a list for a model": (lambda spec: spec.update(model=[1]), "a", "not a tokenizer"),
    "tokens that are numbers": (lambda spec: spec.update(added_tokens=[1, 2]), "a", "not a tokenizer"),
    "an id of 2^62": (lambda spec: spec["model"]["vocab"].update(dog=2**62), "a", "not a tokenizer"),
    "nesting": (lambda spec: spec.update(model=functools.reduce(lambda inner, _: [inner], range(900), [])), "a",
                "not a tokenizer"),
}


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_hostile_tokenizers(made, name):
    change, text, match = HOSTILE_TOKENIZERS[name]
    folder = altered(made("byte-level", CHATML), change)
    assert re.search(match, refusal(lambda: hf.tokenizer(folder).encode(text)))


@pytest.mark.parametrize("name, write", {
    "tokenizer.json": lambda path: os.mkfifo(path),
    "tokenizer.json of 4 GB": lambda path: (path.touch(), os.truncate(path, 2**32)),
    "tokenizer.json nested": lambda path: path.write_text("[" * 100_000),
    "tokenizer_config.json nested": lambda path: path.write_text("[" * 100_000),
    "tokenizer_config.json that is binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "chat_template.jinja that is binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "chat_template.jinja of 4 GB": lambda path: (path.touch(), os.truncate(path, 2**32)),
}.items())
def test_hostile_files(made, name, write):
    folder = made("byte-level", CHATML)
    path = folder / name.split(" ")[0]
    path.unlink(missing_ok=True)
    write(path)
    assert str(folder) in refusal(lambda: hf.tokenizer(folder))


def test_a_pipe_beside_a_tokenizer_is_not_waited_for(made):
    folder = made("byte-level", CHATML)
    os.mkfifo(folder / "chat_template.jinja")
    assert flat(hf.tokenizer(folder).chat([USER, ANSWER])) == theirs(folder, [USER, ANSWER])


def test_bpe_dropout_is_off(made):
    """It would give the same text other ids in every run."""
    def drop(spec):
        spec["model"]["dropout"] = 0.5

    plain, dropping = hf.tokenizer(made("byte-level", CHATML)), hf.tokenizer(altered(made("byte-level", CHATML), drop))
    text = USER["content"]
    assert dropping.encode(text) == plain.encode(text) == hf.tokenizer(dropping.name).encode(text)
    assert dropping.chat([USER, ANSWER]) == plain.chat([USER, ANSWER])


def test_a_conversation_of_forty_thousand_turns(made):
    """It is tokenized in seconds; whether a model has room for it is found out then."""
    turns = [USER, ANSWER] * 20_000
    tokenizer, began = hf.tokenizer(made("byte-level", CHATML)), used()
    pieces = tokenizer.chat(turns)
    del tokenizer
    gc.collect()
    assert used() - began < 10
    assert [piece.turn for piece in pieces if piece.turn is not None] == list(range(40_000))
    tokenizer = hf.tokenizer(made("byte-level", CHATML))
    assert "longer than any model reads" in refusal(lambda: tokenizer.chat([{"role": "user", "content": 2**24 * "a"}]))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_with_limits_ends_with_the_one_that_asks(made):
    """Also when that one is killed, and so has no time to say anything."""
    code = "import sys, time, hf; t = hf.tokenizer(sys.argv[1]); print(1, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(made("byte-level", CHATML))]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ORACLE.parents[2])
    asking.stdout.readline()
    children = Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list the children of a process")
    child, = children.read_text().split()
    assert "hf.templates" in Path(f"/proc/{child}/cmdline").read_text()
    asking.kill()
    asking.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_text():
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_does_not_end_it(made):
    """A terminal sends the signal to both processes; a run that is to be stopped still has answers to decode."""
    tokenizer = hf.tokenizer(made("byte-level", CHATML))
    child, = [int(each) for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
              if "hf.templates" in Path(f"/proc/{each}/cmdline").read_text()][-1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    assert tokenizer.decode(tokenizer.encode("a dog")) == "a dog"


def test_a_template_whose_bos_the_tokenizer_takes_for_text_is_refused(made):
    """It stands in the vocabulary, but is no added token: the row would begin with "<", "s", ">"."""
    def forget(spec):
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<s>"]

    folder = altered(made("byte-level", "{{ bos_token }}" + CHATML), lambda spec: None)
    hf.tokenizer(folder)
    with pytest.raises(UserError, match="bos_token <s> is none of its added tokens"):
        hf.tokenizer(altered(folder, forget))


def test_a_forked_process_leaves_the_other_one_alone(made):
    """As in test_kills, which forks a process that may hold tokenizers."""
    tokenizer = hf.tokenizer(made("byte-level", CHATML))
    child = os.fork()
    if child == 0:
        del tokenizer
        gc.collect()
        os._exit(0)
    for _ in range(100):
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it waits for a process that is not its child")
    assert ended[1] == 0 and tokenizer.encode("a")
