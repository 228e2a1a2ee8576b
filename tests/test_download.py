"""datasets/download.py against a real HTTP server on loopback that misbehaves as told."""

import hashlib
import importlib.util
import io
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support import cli

SCRIPT = Path(__file__).parent.parent / "datasets" / "download.py"
# loaded by its path: the name `datasets` may belong to an installed package
spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)

BODY = random.Random(0).randbytes(300_000)  # a few reads long


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.plan names what to do wrong, one entry per request."""

    def do_GET(self):
        self.server.asked.append(self.path)
        fault = self.server.plan.pop(0) if self.server.plan else None
        body = self.server.files.get(self.path)
        if body is None or fault == "503":
            return self.send_error(503 if fault else 404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("truncated", "dropped", "stalled"):  # half of it, then the end
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if fault == "dropped":
            self.reset()
        if fault == "stalled":
            self.server.released.wait(60)

    def reset(self):
        """Break the connection as a failing network does (RST), not with an orderly end (FIN)."""
        time.sleep(0.05)  # let the client read what was sent
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with one file of each kind of checksum, which the script's table knows as the set `tiny`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    blob = hashlib.sha1(b"blob 300000\0" + BODY).hexdigest()
    tiny = [
        ("tiny_train.jsonl", len(BODY), hashlib.sha256(BODY).hexdigest()),
        ("tiny_test.jsonl", None, blob),
    ]
    monkeypatch.setitem(download.FILES, "tiny", tiny)
    monkeypatch.setitem(download.FILES, "one", tiny[:1])
    monkeypatch.setitem(download.FILES, "blob", tiny[1:])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"/datasets/tiny_train.jsonl": BODY, "/datasets/tiny_test.jsonl": BODY}
    server.plan, server.asked, server.released = [], [], threading.Event()
    server.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(server, tmp_path, capsys):
    """Call the script's main with the server and tmp_path/out; gives the exit code, stdout and the lines of stderr."""

    def call(*names):
        code = command([*names, "--base", server.base, "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return call


def command(arguments):
    """The exit code of the script, run in this process."""
    try:
        cli.run(lambda: download.main(arguments))
    except SystemExit as ended:
        return ended.code
    return 0


def contents(folder):
    """Relative path -> bytes of every file below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetches_and_then_only_verifies(run, server, tmp_path):
    code, out, err = run("tiny")
    assert (code, err) == (0, []) and out.count("checksum right") == 2
    assert contents(tmp_path / "out") == {"tiny_train.jsonl": BODY, "tiny_test.jsonl": BODY}
    assert server.asked == ["/datasets/tiny_train.jsonl", "/datasets/tiny_test.jsonl"]
    code, out, err = run("tiny")
    assert (code, err) == (0, []) and out.count("already there") == 2
    assert len(server.asked) == 2, "a file that is there and right is not asked for again"


def test_replaces_a_file_that_is_not_the_published_one(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny_train.jsonl").write_bytes(BODY[:-1])
    code, out, _ = run("one")
    assert code == 0 and "not the published file" in out
    assert contents(tmp_path / "out") == {"tiny_train.jsonl": BODY}


@pytest.mark.parametrize("fault", ["truncated", "dropped"])
def test_asks_again_after_a_broken_connection(run, server, tmp_path, fault):
    server.plan = [fault, fault]
    code, _, err = run("one")
    assert (code, err) == (0, []) and contents(tmp_path / "out") == {"tiny_train.jsonl": BODY}
    assert len(server.asked) == 3


@pytest.mark.parametrize("fault", ["truncated", "dropped"])
@pytest.mark.parametrize("name", ["one", "blob"])
def test_gives_up_with_one_line_and_leaves_what_was_there(run, server, tmp_path, fault, name):
    file = download.FILES[name][0][0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_bytes(b"of an earlier day")
    server.plan = [fault] * 4
    code, _, err = run(name)
    assert code == 2 and len(err) == 1 and "gave up after 4 tries" in err[0] and len(server.asked) == 4
    assert contents(tmp_path / "out") == {file: b"of an earlier day"}
    code, _, err = run(name)
    assert (code, err) == (0, []) and contents(tmp_path / "out") == {file: BODY}


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_leaves_no_half_file(run, server, tmp_path, sent, code):
    """After Ctrl-C there is nothing; what a killed process leaves does not look like the file, and is replaced."""
    server.plan = ["stalled"]
    server.files["/datasets/turk_train.jsonl"] = BODY
    arguments = [sys.executable, SCRIPT, "turk", "--base", server.base, "--out", tmp_path / "out"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        began = time.monotonic()
        while not any(contents(tmp_path / "out").values()) and time.monotonic() < began + 30:
            time.sleep(0.05)
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "") and err == ("interrupted\n" if code == 130 else "")
    assert set(contents(tmp_path / "out")) == (set() if code == 130 else {"turk_train.jsonl.partial"})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "tiny_train.jsonl.partial").write_bytes(b"of a run that was killed" + BODY)
    assert run("one")[0] == 0
    assert contents(tmp_path / "out").pop("tiny_train.jsonl") == BODY
    assert not (tmp_path / "out" / "tiny_train.jsonl.partial").exists()


@pytest.mark.parametrize("name", ["one", "blob"])
def test_wrong_checksum_leaves_what_was_there(run, server, tmp_path, name):
    file, _, published = download.FILES[name][0]
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    header = b"" if name == "one" else b"blob 300000\0"
    got = (hashlib.sha256 if name == "one" else hashlib.sha1)(header + wrong).hexdigest()
    server.files[f"/datasets/{file}"] = wrong
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_bytes(b"of an earlier day")
    code, _, err = run(name)
    assert code == 2 and len(err) == 1 and "wrong checksum" in err[0] and got in err[0] and published in err[0]
    assert contents(tmp_path / "out") == {file: b"of an earlier day"}


def test_a_good_file_survives_an_error_in_another(run, server, tmp_path):
    run("one")
    server.files["/datasets/tiny_test.jsonl"] = BODY[1:]
    code, out, err = run("tiny")
    assert code == 2 and len(err) == 1 and "already there" in out
    assert contents(tmp_path / "out") == {"tiny_train.jsonl": BODY}


def test_size_is_checked_too(run, server, tmp_path, monkeypatch):
    file, size, published = download.FILES["one"][0]
    monkeypatch.setitem(download.FILES, "one", [(file, size + 1, published)])
    code, _, err = run("one")
    assert code == 2 and len(err) == 1 and "(300000 bytes) instead of" in err[0] and "(300001 bytes)" in err[0]
    assert contents(tmp_path / "out") == {}


def test_a_git_lfs_pointer_is_not_the_data(run, server, tmp_path, monkeypatch):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    monkeypatch.setitem(download.FILES, "blob", [("tiny_test.jsonl", None, blob)])
    server.files["/datasets/tiny_test.jsonl"] = pointer
    code, _, err = run("blob")
    assert code == 2 and len(err) == 1 and "Git LFS pointer" in err[0] and contents(tmp_path / "out") == {}


def test_missing_file_is_one_line_and_asked_for_once(run, server, tmp_path):
    server.files.clear()
    code, _, err = run("one")
    assert code == 2 and len(err) == 1 and f"{server.base}/datasets/tiny_train.jsonl: HTTP 404" in err[0]
    assert len(server.asked) == 1 and contents(tmp_path / "out") == {}


def test_a_busy_server_is_asked_again(run, server, tmp_path):
    server.plan = ["503"]
    code, _, err = run("one")
    assert (code, err) == (0, []) and contents(tmp_path / "out") == {"tiny_train.jsonl": BODY}


def test_no_server_is_one_line(run, server):
    with socket.socket() as taken:  # bound but not listening: connecting is refused
        taken.bind(("127.0.0.1", 0))
        server.base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = run("one")
    assert code == 2 and len(err) == 1 and "gave up after 4 tries" in err[0] and "refused" in err[0]


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    code, _, err = run("one")
    assert code == 2 and len(err) == 1 and str(tmp_path / "out") in err[0]


@pytest.mark.parametrize("fault", ["404", "wrong checksum"])
def test_as_a_program(server, tmp_path, fault):
    if fault != "404":
        server.files["/datasets/rotten_tomatoes_train.jsonl"] = b"{}\n"
    command = [sys.executable, SCRIPT, "rotten_tomatoes", "--base", server.base, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: http://127.0.0.1:") and done.stderr.count("\n") == 1
    assert fault in done.stderr and contents(tmp_path) == {}


def test_progress_is_shown(run, server, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(download, "tqdm", Bar)
    server.plan = ["truncated"]
    run("one")
    failed, whole = bars
    assert failed.desc == whole.desc == "tiny_train.jsonl" and failed.total == whole.total == whole.n == len(BODY)
    assert 0 < failed.n < len(BODY)


def test_a_full_disk_is_one_line_and_asked_for_once(run, server, tmp_path, monkeypatch):
    class Bar(download.tqdm):
        def update(self, count):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "tqdm", Bar)
    code, _, err = run("one")
    assert code == 2 and len(err) == 1 and "No space left" in err[0] and len(server.asked) == 1
    assert contents(tmp_path / "out") == {}


def archive(entries):
    """The bytes of a zip with these names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return buffer.getvalue()


def publish(server, monkeypatch, body):
    server.files["/spider_data.zip"] = body
    entry = ("spider_data.zip", len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(download.FILES, "spider_databases", [entry])
    monkeypatch.setitem(download.FILES, "spider", download.FILES["one"])


@pytest.mark.parametrize("top", ["spider_data/", "another-name/", ""])
@pytest.mark.parametrize("names", [["spider", "--databases"], ["spider_databases"]])
def test_databases_are_extracted(run, server, tmp_path, monkeypatch, top, names):
    entries = {
        f"{top}database/pets_1/pets_1.sqlite": b"pets",
        f"{top}database/world_1/world_1.sqlite": b"world",
        f"{top}database/world_1/schema.sql": b"no",
        f"{top}test_database/pets_1/pets_1.sqlite": b"no",
        f"{top}tables.json": b"no",
        f"__MACOSX/{top}database/pets_1/._pets_1.sqlite": b"no",
    }
    publish(server, monkeypatch, archive(entries))
    code, out, err = run(*names)
    assert (code, err) == (0, []) and "2 databases extracted" in out
    wanted = {"pets_1/pets_1.sqlite": b"pets", "world_1/world_1.sqlite": b"world"}
    assert contents(tmp_path / "out" / "spider_databases") == wanted
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["spider_data.zip", "spider_databases"] + ["tiny_train.jsonl"] * ("spider" in names)
    )
    (tmp_path / "out" / "spider_data.zip").unlink()  # once extracted the archive is not needed again
    asked = len(server.asked)
    code, out, _ = run(*names)
    assert code == 0 and "already there" in out and len(server.asked) == asked


def test_no_entry_of_the_archive_escapes(run, server, tmp_path, monkeypatch):
    entries = {
        "spider_data/database/pets_1/pets_1.sqlite": b"pets",
        "spider_data/database/../...sqlite": b"evil",
        "spider_data/database/../../../evil/evil.sqlite": b"evil",
        "spider_data/database/../evil.sqlite": b"evil",
        f"{tmp_path}/database/evil/evil.sqlite": b"evil",
        "spider_data/database/a\\..\\..\\evil/a\\..\\..\\evil.sqlite": b"evil",
        "../../database/evil/evil.sqlite": b"evil",
    }
    publish(server, monkeypatch, archive(entries))
    before = contents(tmp_path)
    code, _, _ = run("spider_databases")
    new = {name for name in contents(tmp_path) if name not in before}
    assert code == 0 and new == {"out/spider_data.zip", "out/spider_databases/pets_1/pets_1.sqlite"}


def test_a_bad_archive_leaves_no_half_extracted_folder(run, server, tmp_path, monkeypatch):
    good = archive({"s/database/a/a.sqlite": b"first", "s/database/b/b.sqlite": b"second"})
    publish(server, monkeypatch, good.replace(b"second", b"sekond"))  # its own CRC no longer fits
    code, _, err = run("spider_databases")
    assert code == 2 and len(err) == 1 and "nothing extracted" in err[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["spider_data.zip"]
    publish(server, monkeypatch, archive({"s/database/a/readme": b""}))
    code, _, err = run("spider_databases")
    assert code == 2 and len(err) == 1 and "holds no database" in err[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["spider_data.zip"]


def test_what_a_killed_extraction_left_is_cleared(run, server, tmp_path, monkeypatch):
    publish(server, monkeypatch, archive({"s/database/a/a.sqlite": b"first"}))
    left = tmp_path / "out" / "spider_databases.part" / "a"
    left.mkdir(parents=True)
    (left / "a.sqlite").write_bytes(b"fi")
    (tmp_path / "out" / "spider_databases").mkdir()  # empty: not unpacked yet
    code, _, _ = run("spider_databases")
    assert code == 0
    assert set(contents(tmp_path / "out")) == {"spider_data.zip", "spider_databases/a/a.sqlite"}


def test_published_addresses_and_table():
    raw = "https://raw.githubusercontent.com/galilai-group/llm-jepa/6d7d0d1"
    media = "https://media.githubusercontent.com/media/galilai-group/llm-jepa/6d7d0d1"
    assert download.address("turk_test.jsonl") == f"{raw}/datasets/turk_test.jsonl"
    assert download.address("spider_data.zip") == f"{media}/spider_data.zip"
    files = [entry for entries in download.FILES.values() for entry in entries]
    assert len(files) == len({name for name, _, _ in files}) == len({total for _, _, total in files}) == 18
    for name, size, published in files:
        digits = 40 if size is None else 64  # git blob id only where the size is not known
        assert re.fullmatch(rf"[0-9a-f]{{{digits}}}", published), name


def test_all_and_names(monkeypatch):
    got = []
    monkeypatch.setattr(download, "get", lambda name, out, base: got.append(name))
    download.main(["all"])
    assert got == list(download.FILES)
    got.clear()
    download.main(["yelp", "synth", "yelp", "--databases"])
    assert got == ["synth", "spider_databases", "yelp"]


@pytest.mark.parametrize("argv, said", [
    (["synthetic"], "no data set named synthetic"),
    ([], "name at least one"),
    (["synth", "--base", "file:///tmp"], "not an http:// or https:// address"),
    (["synth", "--base", "http://["], "'[' is not a valid host or port; nothing fetched"),
    (["synth", "--base", "http://"], "No host"),
    (["synth", "--base", "http://a..b"], "a..b"),
    (["synth", "--base", "http://localhost:99999999"], "99999999"),
    (["synth", "--base", "https://" + "a" * 300], "too long"),
    (["synth", "--out", "a" * 300], "File name too long"),
    (["synth", "--ou", "x"], "--ou"),
])
def test_a_mistake_on_the_command_line_is_one_line(capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(tmp_path)
    default = [] if "--out" in argv else ["--out", "out"]
    assert command([*argv, *default]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and contents(tmp_path) == {}


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        download.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "download.py turk spider" in text and "published" in text
    assert all(name in text for name in download.FILES)
    default = f"(default: {SCRIPT.parent / 'published'})"
    assert "".join(default.split()) in "".join(text.split())  # argparse breaks lines anywhere


def test_readme_states_the_sizes_of_the_table():
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    for name, files in download.FILES.items():
        assert f"`{name}`" in readme
        for file, size, _ in files:
            assert re.search(rf"^\| `{file}`.* \| {f'{size:,}' if size else '-'} \|$", readme, re.M), file
