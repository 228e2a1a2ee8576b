"""Pictures of runs: what is drawn, and that nothing in a log or a name keeps one from being drawn."""

import json

import pytest

from evaluation import plots

LOG = [{"step": 1, "lm": 5.0, "jepa": 0.9, "total": 5.9}, {"step": 2, "lm": 4.0, "jepa": None, "total": 4.0},
       {"step": 2, "val_lm": 4.5, "val_jepa": 0.5, "val_cosine_pairs": 0.5, "val_cosine_shuffled": 0.25,
        "val_exact": 0.125}]


@pytest.fixture
def run(tmp_path):
    """A function that makes a run folder of a name and the bytes of its log."""

    def make(name, log=None, data="rows.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        arguments = {"init": "tiny", "tokenizer": "synth", "data": data, "layout": "fused", "seed": 3}
        config = {"arguments": arguments, "sha256": {}, "rows": 1000}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "log.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in LOG)
                                           if log is None else log)
        return folder

    return make


@pytest.fixture
def rough():
    """Pictures as users get them, unlike in other tests."""


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path, **how: figures.append(figure) or save(figure, path, **how))
    return figures


def lines_of(axis):
    """What an axis shows: the points of each line that has some."""
    return [line.get_xydata().tolist() for line in axis.get_lines() if len(line.get_xdata())]


def test_three_panels_show_losses_cosines_and_exact_match(run, drawn, tmp_path):
    plots.curves([run("a"), run("b", b"")], tmp_path / "new/loss.png")
    lm, jepa, validation = drawn[0].axes
    assert lines_of(lm) == [[[1, 5], [2, 4]], [[2, 4.5]]] and lines_of(jepa) == [[[1, 0.9]], [[2, 0.5]]]
    assert lines_of(validation) == [[[2, 0.5]], [[2, 0.25]], [[2, 0.125]]]
    names = [text.get_text() for text in validation.get_legend().get_texts()]
    assert names == ["cosine of pairs", "cosine of shuffled pairs", "exact match"]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == [f"{name} (tiny, rows.jsonl, n = 1,000, seed 3)" for name in "ab"]
    assert b"nano-llm-jepa" in (tmp_path / "new/loss.png").read_bytes()


def test_what_a_power_cut_leaves_in_a_log_is_left_out(run, drawn, tmp_path, capsys):
    damaged = [b"\0\0\0\0", b"", b"null", b"[1]", b"{\"step\": 1, \"l", b"\xff\xfe", b"[" * 100_000, b"{\"lm\": 1}",
               b"{\"step\": 3, \"lm\": \"x\", \"jepa\": [], \"val_exact\": {}}", b"{\"step\": 4, \"lm\": NaN}",
               b"{\"step\": 5, \"lm\": 1e999}", b"{\"step\": 6, \"lm\": 1" + b"0" * 400 + b"}",
               b"{\"step\": 1" + b"0" * 400 + b", \"lm\": 1}", b"{\"step\": 7, \"lm\": 2.5}"]
    plots.curves([run("a", b"\n".join(damaged))], tmp_path / "loss.png")
    assert lines_of(drawn[0].axes[0]) == [[[7, 2.5]]]
    assert "log.jsonl: " in capsys.readouterr().err


def test_names_are_shown_as_they_are(run, drawn, tmp_path):
    names = ["$", "a$b$c", "$\\frac$", "$$", "\\$", "_x", "a_b^c", "{}%s", "\udcff\udcfe", "x" * 200]
    folders = {name: run(name, data=f"/somewhere/{name}.jsonl") for name in names}
    plots.curves(folders, tmp_path / "loss.png")
    x = plots.np.eye(3)
    plots.spectrum({name: {"text": x, "pred": x, "code": x} for name in names}, "$\\frac$", tmp_path / "s.png")
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in ("loss.png", "s.png"))
    for figure, ending in zip(drawn, (" (tiny, {}.jsonl, n = 1,000, seed 3)", ""), strict=True):
        texts = [text._preprocess_math(text.get_text()) for text in figure.legends[0].get_texts()]
        assert not any(formula for _, formula in texts), "matplotlib must not see a formula"
        assert [text for text, _ in texts][:8] == [name + ending.format(name) for name in names[:8]]
        assert len(texts) == 10 and max(len(text) for text, _ in texts) < 150
