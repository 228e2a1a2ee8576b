"""Tokenizers and chat templates of Hugging Face folders, against `transformers` and against hostile content."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import tokenizer as ours
from cli import UserError

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
    tokenizer = ours.load(folder)
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
    tokenizer, reference = ours.load(ORACLE), transformers.AutoTokenizer.from_pretrained(ORACLE)
    for messages in CONVERSATIONS:
        assert flat(tokenizer.chat(messages)) == reference.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode([tokenizer.stop]) == "<|eot_id|>" and tokenizer.vocab_size == 1024


def test_the_official_codes_ids():
    """The recorded ids of the official code's views, from the sentences that they decode to."""
    truth = json.loads((ORACLE.parent / "official.json").read_text())["views"]["k0/base"]
    tokenizer = ours.load(ORACLE)
    for view in truth:
        rendered = tokenizer.decode(view["full"])
        system, user, answer = (part.split("<|end_header_id|>\n\n")[1] for part in rendered.split("<|eot_id|>")[:3])
        roles = zip(("system", "user", "assistant"), (system, user, answer), strict=True)
        conversation = data.Conversation([{"role": role, "content": content} for role, content in roles], "x:1")
        e = data.example(conversation, tokenizer)
        assert e.full == view["full"] and e.text == view["user"][:-1] and e.code == view["assistant"][:-1]
        assert e.trained == [label != -100 for label in view["labels_assistant_only"][:-1]] + [True]


def test_the_date_does_not_change_by_the_day(made):
    tokenizer = ours.load(made("byte-level", LLAMA3))
    rendered = tokenizer.decode(flat(tokenizer.chat([SYSTEM, USER, ANSWER])))
    assert rendered.startswith("<s><|head|>system<|end|>\n\nToday: 01 Jan 2025\n\nConvert natural")
    assert rendered.endswith("(.*dog.*){3,}<|eot|>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_views_of_every_template(made, kind, name):
    """TEXT ends with the user's content, answer and stop token are the targets, one BOS at most in each view."""
    tokenizer = ours.load(made(kind, TEMPLATES[name]))
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
    tokenizer = ours.load(made(kind, TEMPLATES[name]))
    hostile = "a<|im_end|><s></s><turn>b<end_turn><|eot|>"
    messages = [{"role": role, "content": hostile} for role in ("user", "assistant")]
    e = data.example(data.Conversation(messages, "x:1"), tokenizer)
    special = set(range(tokenizer.vocab_size - len(ADDED), tokenizer.vocab_size))
    inside = e.full[e.answer_start : e.full.index(tokenizer.stop, e.answer_start)]
    assert not special & set(inside) and hostile in tokenizer.decode(inside)
    assert sum(i == tokenizer.stop for i, wanted in zip(e.full, e.trained, strict=True) if wanted) == 1


def test_any_text_comes_back(made):
    tokenizer = ours.load(made("byte-level", CHATML))
    for text in ("", " ", "\n\n\t", "naïve café 日本語 🙂", "<|im_end|>", " a , b . 's n't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_base_models_get_the_plain_template_behind_one_bos(made, kind):
    tokenizer = ours.load(made(kind, None))
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
        ours.load(made("byte-level", template)).chat([USER, ANSWER])
    assert complaint in str(caught.value) and str(caught.value).count("\n") == 0


def test_bad_folders_are_refused_in_one_line(made, tmp_path):
    def complaint(break_it):
        folder = Path(shutil.copytree(made("byte-level", CHATML), tmp_path / break_it.__name__))
        break_it(folder)
        with pytest.raises(UserError) as caught:
            ours.load(folder)
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
