"""Files to batches: what is refused and where, which ids are targets, how rows are laid out, the order of the data."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import hf
from jepa import CODE, PRED, TEXT, mask
from support import cli, viewer
from support.cli import UserError

ROOT = Path(__file__).parent.parent
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "lines with a dog"}
ANSWER = {"role": "assistant", "content": "(dog)|.*"}


@pytest.fixture(scope="module")
def synth():
    return hf.tokenizer("synth")


def write(tmp_path, *rows, raw=None):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw if raw is not None else "\n".join(map(json.dumps, rows)).encode())
    return path


def row(*messages, **more):
    return {"messages": list(messages), **more}


def one(tmp_path, *messages):
    return data.read(write(tmp_path, row(*messages)))[0]


# ---- reading


def test_reads_with_and_without_bom_blank_lines_and_system(tmp_path):
    body = json.dumps(row(SYSTEM, USER, ANSWER)) + "\r\n\n   \n" + json.dumps(row(USER, ANSWER), ensure_ascii=False)
    for bom in (b"", b"\xef\xbb\xbf"):
        path = write(tmp_path, raw=bom + body.encode())
        first, second = data.read(path)
        assert first.messages == [SYSTEM, USER, ANSWER] and first.where == f"{path}:1"
        assert second.messages == [USER, ANSWER] and second.where == f"{path}:4"


@pytest.mark.parametrize("content, complaint", [
    (b"", "no rows"),
    (b"\n \n", "no rows"),
    (b'{"messages": [', ":1: not JSON"),
    (b'\n{"messages": "hello"}', ":2: needs"),
    (b"[1, 2]", ":1: needs"),
    (b"\xff\xfe\x00", ":1: not UTF-8"),
    (b"[" * 100000, ":1: not JSON"),
    (b'{"messages": []}', ":1: roles are []"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', ":1: roles are"),
    (b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}', ":1: roles are"),
    (b'{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}', ":1: a turn must be"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}', "turn is empty"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "surrogate"),
    (b'{"messages": [7]}', ":1: a turn must be"),
])
def test_bad_files_are_refused_by_line(tmp_path, content, complaint):
    with pytest.raises(UserError, match=".") as caught:
        data.read(write(tmp_path, raw=content))
    assert complaint in str(caught.value) and "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        data.read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="directory"):
        data.read(tmp_path)


# ---- examples and labels


def targets(example, tokenizer):
    return [tokenizer.decode([i]) for i, wanted in zip(example.full, example.trained, strict=True) if wanted]


def test_the_answer_and_its_stop_token_are_the_targets(tmp_path, synth):
    """... even where the question contains the answer word for word."""
    e = data.example(one(tmp_path, SYSTEM, {"role": "user", "content": ANSWER["content"]}, ANSWER), synth)
    assert "".join(targets(e, synth)) == "(dog)|.*<|end|>"
    assert e.trained == [False] * e.answer_start + [True] * (len(e.full) - e.answer_start)
    assert synth.decode(e.full[: e.text_end]) == "<|system|>Be brief.<|user|>(dog)|.*"
    assert synth.decode(e.full[: e.answer_start]) == "<|system|>Be brief.<|user|>(dog)|.*<|assistant|>"
    assert synth.decode(e.text) == "<|user|>(dog)|.*" and synth.decode(e.text[e.text_start :]) == "(dog)|.*"
    assert synth.decode(e.code) == "<|assistant|>(dog)|.*"


def test_train_on_all_and_no_stop_label_reproduce_the_official_labels(tmp_path, synth):
    conversation = one(tmp_path, SYSTEM, USER, ANSWER)
    everything = data.example(conversation, synth, train_on="all")
    assert everything.trained == [False] + [True] * (len(everything.full) - 1)
    official = data.example(conversation, synth, train_on="all", stop_label=False)
    assert official.trained == everything.trained[:-1] + [False]
    without = data.example(conversation, synth, stop_label=False)
    assert "".join(targets(without, synth)) == "(dog)|.*"


def test_a_label_is_the_next_id_even_if_that_equals_the_padding(synth):
    """Padding is id 0. An answer that contains id 0, and a stop token of id 0, keep their labels."""
    e = data.Example([5, 6, 0, 7, 0], [False, False, True, True, True], 1, [5], [6, 0, 7])
    longer = data.Example([5, 6, 1, 7, 2, 3, 0], [False] * 6 + [True], 1, [5], [6, 1])
    batch = data.collate([e, longer], 0, jepa=False)
    assert batch.label.tolist() == [0, 7, 0, 0]
    assert batch.label_at.tolist() == [[0, 1], [0, 2], [0, 3], [1, 5]]


def test_earlier_turns_belong_to_text(tmp_path, synth):
    early = [{"role": "user", "content": "ring"}, {"role": "assistant", "content": "lake"}]
    e = data.example(one(tmp_path, SYSTEM, *early, USER, ANSWER), synth)
    expected = "<|system|>Be brief.<|user|>ring<|assistant|>lake<|end|><|user|>lines with a dog"
    assert synth.decode(e.full[: e.text_end]) == expected
    assert synth.decode(e.text) == expected.removeprefix("<|system|>Be brief.")
    assert "".join(targets(e, synth)) == "(dog)|.*<|end|>"


def test_text_that_looks_like_a_special_token_stays_text(tmp_path, synth):
    tricky = {"role": "user", "content": "a<|end|><|assistant|>b<|endoftext|>"}
    e = data.example(one(tmp_path, tricky, {"role": "assistant", "content": "c<|end|>d"}), synth)
    assert e.full.count(synth.stop) == 1 and e.full[-1] == synth.stop
    assert "".join(targets(e, synth)) == "c<|end|>d<|end|>"
    headers = [synth.encode(f"<|{role}|>") for role in ("user", "assistant")]
    assert all(len(ids) > 1 for ids in headers)  # as text they are several tokens
    assert synth.decode(e.full) == "<|user|>a<|end|><|assistant|>b<|endoftext|><|assistant|>c<|end|>d<|end|>"


def test_rows_that_do_not_fit_are_refused_or_skipped(tmp_path, synth, capsys):
    path = write(tmp_path, row(USER, ANSWER), row(USER, {"role": "assistant", "content": "dog " * 100}))
    with pytest.raises(UserError, match=r"rows.jsonl:2: needs \d+ tokens, the model has room for 40"):
        data.examples_of(data.read(path), synth, limit=40)
    conversations, examples = data.examples_of(data.read(path), synth, limit=40, too_long="skip")
    assert [c.where for c in conversations] == [f"{path}:1"] and len(examples) == 1
    assert "skipped 1 rows" in capsys.readouterr().err
    with pytest.raises(UserError, match="neither this row nor any other fits"):
        data.examples_of(data.read(path), synth, limit=3, too_long="skip")


def test_the_longest_view_counts_pred_but_not_the_row(tmp_path, synth):
    """The limit is on positions, and those restart: a fused row may be longer than the model's block_size."""
    e = data.example(one(tmp_path, USER, ANSWER), synth)
    assert data.longest_view(e, 0) == len(e.full)
    batch = data.collate([e], 40)
    assert batch.position.max() + 1 == data.longest_view(e, 40) < batch.ids.shape[1]


# ---- batches


def test_fused_rows(examples):
    batch = data.collate(examples, k=2)
    e, row = examples[0], 0
    n, t = len(e.full), e.text_end
    used = n + 2 + len(e.code)
    assert batch.ids[row, :used].tolist() == e.full + [-1, -2] + e.code
    expected = [*range(n), t, t + 1, *range(len(e.code))]
    assert batch.position[row, :used].tolist() == expected
    assert batch.segment[row, :used].tolist() == [0] * t + [1] * (n - t) + [2] * 2 + [3] * len(e.code)
    assert (batch.segment[row, used:] == 4).all()
    assert batch.label_at[: n - 1 - t].tolist() == [[0, column] for column in range(t, n - 1)]
    assert batch.label[: n - 1 - t].tolist() == e.full[t + 1 :]
    assert len(batch.label) == sum(sum(e.trained) for e in examples)
    for i, e in enumerate(examples):
        assert batch.text_at[i].tolist() == [i, len(e.full) + 1]
        assert batch.code_at[i].tolist() == [i, len(e.full) + 1 + len(e.code)]


def test_without_pred_text_is_read_at_its_own_last_token(examples):
    batch = data.collate(examples, k=0)
    assert batch.text_at.tolist() == [[i, e.text_end - 1] for i, e in enumerate(examples)]


def test_paper_rows(examples):
    batch = data.collate(examples, k=1, layout="paper")
    assert len(batch.ids) == 8 and len(batch.text_at) == 4
    e = examples[1]
    used = len(e.text) + 1 + len(e.code)
    assert batch.ids[3, :used].tolist() == e.text + [-1] + e.code
    assert batch.position[3, :used].tolist() == [*range(len(e.text) + 1), *range(len(e.code))]
    assert (batch.label_at[:, 0] % 2 == 0).all() and batch.ids[2, : len(e.full)].tolist() == e.full
    assert batch.text_at[1].tolist() == [3, len(e.text)] and batch.code_at[1].tolist() == [3, used - 1]


def test_front_pred_stands_before_the_users_content(examples):
    batch = data.collate(examples, k=2, layout="paper", front_pred=True)
    e = examples[0]
    start, used = e.text_start, len(e.text) + 2
    assert batch.ids[1, :used].tolist() == e.text[:start] + [-1, -2] + e.text[start:]
    assert batch.position[1, :used].tolist() == [*range(used)]
    assert batch.segment[1, :used].tolist() == [TEXT] * used
    assert batch.text_at[0].tolist() == [1, used - 1]


@pytest.mark.parametrize("layout", ["fused", "paper"])
def test_reverse_puts_pred_behind_code(examples, layout):
    batch = data.collate(examples, k=2, layout=layout, reverse=True)
    assert (batch.segment != PRED).all()
    for e, text, code in zip(examples, batch.text_at.tolist(), batch.code_at.tolist(), strict=True):
        assert batch.ids[text[0], text[1]] == e.full[e.text_end - 1]
        assert batch.ids[code[0], code[1] - 1 : code[1] + 1].tolist() == [-1, -2]
        assert batch.segment[code[0], code[1]] == CODE and batch.position[code[0], code[1]] == len(e.code) + 1


def test_counts_are_what_the_losses_are_averaged_over(examples):
    batch = data.collate(examples, k=1)
    assert data.count(examples) == (len(batch.label), len(batch.text_at))


def test_order_is_a_function_of_seed_and_epoch():
    lengths = torch.randint(10, 90, (1003,)).tolist()
    steps = data.order(lengths, 32, seed=1, epoch=2)
    assert steps == data.order(lengths, 32, seed=1, epoch=2)
    assert steps != data.order(lengths, 32, seed=1, epoch=3) and steps != data.order(lengths, 32, seed=2, epoch=2)
    assert sorted(sum(steps, [])) == list(range(1003)) and sorted(map(len, steps)) == [11] + [32] * 31
    padding = sum(max(lengths[i] for i in step) * len(step) for step in steps) / sum(lengths)
    assert padding < 1.1  # rows of a step are about equally long
    longest = [max(lengths[i] for i in step) for step in steps]
    assert longest != sorted(longest), "the steps are shuffled, too"


# ---- python data.py


def test_the_command_shows_views_mask_and_statistics(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, row(SYSTEM, USER, ANSWER))
    command = [sys.executable, ROOT / "data.py", path, "--k", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "|[dog]|" in shown and "|[<|end|>]|" in shown and "| dog|" not in shown.split("ANSWER")[1].split("CODE")[0]
    assert "TEXT   #..." in shown and "Pred(Enc(Text)) is the state at row 0" in shown and "PRED1" in shown
    assert "fused row, k=1" in shown
    for mistake in ("--row=5", "--row=--"):
        monkeypatch.setattr(sys, "argv", [*map(str, command[1:]), mistake])
        with pytest.raises(SystemExit) as ended:
            cli.run(data.main)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_of_a_long_row_so_many_cells_of_the_mask_are_made_as_are_drawn(synth, capsys, monkeypatch):
    ids = list(range(100))
    batch = data.collate([data.Example(ids, [False] * 60 + [True] * 40, 50, ids[:50], ids[60:])], k=2)
    whole, made = mask(batch.segment)[0, ::3, ::3], []
    monkeypatch.setattr(viewer, "mask", lambda segment: made.append(segment) or mask(segment))
    viewer.show(batch, synth, colour=False)
    drawn = capsys.readouterr().out.split("every 3th token is drawn\n")[1].splitlines()[: len(whole)]
    assert [line[7:] for line in drawn] == ["".join(".#"[cell] for cell in row) for row in whole.tolist()]
    assert made[0].shape == (1, 48)


# ---- rows with views of their own, plain text, paraphrases


def test_explicit_views_are_the_views_and_messages_the_conversation(tmp_path, synth):
    """As the official hellaswag file has them: turns, or plain strings."""
    context, ending = {"role": "user", "content": "ring"}, {"role": "assistant", "content": "lake"}
    for text, code in (([context], [ending]), ("ring", "lake")):
        path = write(tmp_path, row(SYSTEM, USER, ANSWER, text=text, code=code))
        e = data.example(data.read(path)[0], synth)
        assert synth.decode(e.full) == "<|system|>Be brief.<|user|>lines with a dog<|assistant|>(dog)|.*<|end|>"
        assert synth.decode(e.text) == "<|user|>ring" and synth.decode(e.code) == "<|assistant|>lake"
        assert "".join(targets(e, synth)) == "(dog)|.*<|end|>"
        batch = data.collate([e], 1, layout="paper")
        assert synth.decode(batch.ids[1, : len(e.text)].tolist()) == "<|user|>ring"
        with pytest.raises(AssertionError, match="paper layout"):
            data.collate([e], 1)


def test_text_and_code_alone_are_a_question_and_its_answer(tmp_path, synth):
    views, messages = data.read(write(tmp_path, {"text": "ring", "code": "lake"}, row(
        {"role": "user", "content": "ring"}, {"role": "assistant", "content": "lake"})))
    assert data.example(views, synth) == data.example(messages, synth)
    turns, messages = data.read(write(tmp_path, {"text": [SYSTEM, USER], "code": [ANSWER]}, row(SYSTEM, USER, ANSWER)))
    assert data.example(turns, synth) == data.example(messages, synth)
    for code in ([ANSWER, ANSWER], [USER]):
        with pytest.raises(UserError, match="rows.jsonl:1: roles are"):
            data.read(write(tmp_path, {"text": "ring", "code": code}))


def test_prompt_and_completion_are_a_question_and_its_answer(tmp_path, synth):
    """As TRL has them: strings, or turns."""
    prompt, completion = [SYSTEM, USER], [ANSWER]
    turns, strings, messages = data.read(write(
        tmp_path, {"prompt": prompt, "completion": completion},
        {"prompt": USER["content"], "completion": ANSWER["content"]}, row(SYSTEM, USER, ANSWER)))
    assert data.example(turns, synth) == data.example(messages, synth)
    assert strings.messages == [USER, ANSWER]
    for bad, complaint in (({"prompt": "a"}, "needs"), ({"prompt": "a", "completion": " "}, "turn is empty"),
                           ({"prompt": [ANSWER], "completion": "b"}, "roles are"),
                           ({"prompt": "a", "completion": "b", "group": 1}, "for a group the user last")):
        with pytest.raises(UserError, match=f"rows.jsonl:1: .*{complaint}"):
            data.read(write(tmp_path, bad))


def test_an_error_of_the_tokenizer_names_the_row(tmp_path, synth):
    def refuses(messages):
        raise UserError("folder: the chat template refuses the roles")

    with pytest.raises(UserError, match="rows.jsonl:1: folder: the chat template refuses"):
        data.examples_of(data.read(write(tmp_path, row(USER, ANSWER))), replace(synth, chat=refuses), limit=99)


def test_plain_text_is_trained_on_whole(tmp_path, synth):
    conversation = data.read(write(tmp_path, {"text": "a ring, a lake"}))[0]
    e = data.example(conversation, synth, train_on="all")
    assert synth.decode(e.full) == "<|user|>a ring, a lake" and e.trained == [False] + [True] * (len(e.full) - 1)
    assert not e.code and e.answer_start == len(e.full)
    with pytest.raises(UserError, match=r"rows.jsonl:1: plain text has no answer .* --train_on all"):
        data.example(conversation, synth)


def test_paraphrases_have_the_next_of_their_group_as_code(tmp_path, synth):
    said = lambda content: {"role": "user", "content": content}  # noqa: E731
    rows = [row(said("one"), group=1), row(said("lake"), group="x"), row(said("two"), group=1),
            row(SYSTEM, said("ring"), group="x"), {"text": "three", "group": 1}]
    made = [data.example(c, synth, train_on="all") for c in data.read(write(tmp_path, *rows))]
    assert [synth.decode(e.code) for e in made] == [f"<|user|>{w}" for w in ("two", "ring", "three", "lake", "one")]
    assert synth.decode(made[3].full) == "<|system|>Be brief.<|user|>ring"
    batch = data.collate(made, 1)  # Text is inside the conversation: one row will do
    assert len(batch.ids) == 5
    alone = [row(USER, ANSWER), rows[0], row(USER, ANSWER), rows[2], row(USER, ANSWER)]
    places = [c.where.rpartition(":")[2] for c in data.read(write(tmp_path, *alone))]
    assert places == list("12345"), "in the file's order"
    with pytest.raises(UserError, match=r"rows.jsonl:2: no other row has the group 2"):
        data.read(write(tmp_path, row(said("one"), group=1), row(said("two"), group=2), row(said("3"), group=1)))


def test_null_is_a_missing_column(tmp_path):
    """So pandas and Hugging Face's datasets write it; and a column of whole numbers with gaps as 7.0."""
    plain, = data.read(write(tmp_path, row(USER, ANSWER)))
    for empty in (None, float("nan")):
        more = {name: empty for name in ("text", "code", "group", "prompt", "completion")}
        assert data.read(write(tmp_path, row(USER, ANSWER, **more))) == [plain]
    text, = data.read(write(tmp_path, {"prompt": None, "completion": None, "text": "abc"}))
    assert text.messages[0]["content"] == "abc"
    for bad in ({"text": None, "code": "x"}, {"text": None, "code": None}, {"messages": None}):
        with pytest.raises(UserError, match="rows.jsonl:1: needs"):
            data.read(write(tmp_path, bad))
    first, second = data.read(write(tmp_path, *(row(USER, group=7.0) for _ in range(2))))
    assert first.code == second.messages[-1:]


@pytest.mark.parametrize("views, complaint", [
    ({"text": "only one"}, 'one of "text" and "code"'),
    ({"text": [], "code": "x"}, "a view must be"),
    ({"text": 3, "code": "x"}, "a view must be"),
    ({"text": " ", "code": "x"}, "empty"),
    ({"text": [{"role": "tool", "content": "x"}], "code": "x"}, "a turn must be"),
    ({"text": [USER, {"role": "system", "content": " "}], "code": "x"}, "the system's last turn is empty"),
    ({"text": "a", "code": "b", "group": 7}, "a group and a code"),
    ({"group": [7]}, "a group must be"),
])
def test_bad_views_are_refused(tmp_path, views, complaint):
    with pytest.raises(UserError) as caught:
        data.read(write(tmp_path, row(USER, ANSWER, **views)))
    assert complaint in str(caught.value) and "rows.jsonl:1" in str(caught.value)


def test_published_files_load_unchanged(synth):
    """Every published file becomes examples; hellaswag brings views of its own."""
    if "LLMJEPA_PUBLISHED" not in os.environ:
        pytest.skip("LLMJEPA_PUBLISHED does not name a folder of the published data files")
    paths = sorted(Path(os.environ["LLMJEPA_PUBLISHED"]).glob("*_test.jsonl"))
    assert paths
    for path in paths:
        conversations = data.read(path)[:50]
        made = [data.example(c, synth) for c in conversations]
        assert all(e.own_text == ("hellaswag" in path.name) for e in made), path
        batch = data.collate(made[:3], 1, layout="paper")
        assert len(batch.ids) == 6 and (batch.text_at[:, 0] == torch.tensor([1, 3, 5])).all()


# ---- functions of the seed


def test_a_derangement_leaves_nothing_in_its_place():
    for n in (2, 3, 10, 501):
        partners = data.derangement(n, 0, 4)
        assert sorted(partners) == list(range(n)) and all(i != p for i, p in enumerate(partners))
    assert data.derangement(501, 0, 4) != data.derangement(501, 0, 5) != data.derangement(501, 1, 5)


def test_loss_dropout_is_a_function_of_seed_and_step():
    draws = [data.dropped(0.3, 7, step) for step in range(2000)]
    assert draws == [data.dropped(0.3, 7, step) for step in range(2000)]
    assert draws != [data.dropped(0.3, 8, step) for step in range(2000)] and 0.26 < sum(draws) / 2000 < 0.34
    assert not any(data.dropped(0.0, 7, s) for s in range(99)) and all(data.dropped(1.0, 7, s) for s in range(99))


def test_a_training_set_needs_less_than_a_kilobyte_a_row(synth):
    """And it is what `examples_of` gives: the same numbers in arrays."""
    path = ROOT / "datasets" / "synth_val.jsonl"
    tracemalloc.start()
    places, compact = data.training_set(path, synth, limit=512)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / len(compact) < 1000
    conversations, examples = data.examples_of(data.read(path), synth, limit=512)
    assert places == [conversation.where for conversation in conversations]
    for few, many in zip(compact, examples, strict=True):
        assert replace(few, full=list(few.full), trained=[*map(bool, few.trained)], text=list(few.text),
                       code=list(few.code)) == many
    for layout in ({"layout": "fused"}, {"layout": "fused", "reverse": True}, {"layout": "paper", "front_pred": True}):
        for few, many in zip(data.collate(compact[:4], 2, **layout), data.collate(examples[:4], 2, **layout),
                             strict=True):
            assert_close(few, many, rtol=0, atol=0)


def test_the_longest_view_counts_views_of_the_rows_own():
    for text, code in ((20, 4), (4, 20)):
        e = data.Example([1] * 6, [False] * 3 + [True] * 3, 3, [1] * text, [1] * code, own_text=True)
        batches = [data.collate([e], 3, "paper", reverse=reverse) for reverse in (False, True)]
        assert data.longest_view(e, 3) == max(batch.position.max() + 1 for batch in batches) == 23


def test_a_row_that_fills_the_model_fits(tmp_path, synth):
    conversations = data.read(write(tmp_path, row(USER, ANSWER)))
    needed = data.longest_view(data.example(conversations[0], synth), 1)
    assert len(data.examples_of(conversations, synth, limit=needed, k=1)[1]) == 1
    with pytest.raises(UserError, match=f"needs {needed} tokens, the model has room for {needed - 1}"):
        data.examples_of(conversations, synth, limit=needed - 1, k=1)
