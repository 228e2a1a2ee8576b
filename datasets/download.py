"""Fetch the data files published with LLM-JEPA, and the databases that go with Spider.

In: names of data sets. Out: their files under --out, each one there only once its size and checksum are right.
Bytes are first written to NAME.part; a run that was cut off goes on from that file, a finished one renames it.
The project does not need these files: what it ships is made by make_synth.py. README.md beside this file says what
each set is, where it comes from and how it is scored.
"""

import argparse
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

REPOSITORY = "galilai-group/llm-jepa/6d7d0d1"  # owner, name, commit: the files never change under us
RAW = f"https://raw.githubusercontent.com/{REPOSITORY}"
MEDIA = f"https://media.githubusercontent.com/media/{REPOSITORY}"  # serves Git LFS objects

# set -> its files: name, bytes (None: not known), checksum: 64 digits are a sha256, 40 digits a git blob id
FILES = {
    "synth": [
        ("synth_train.jsonl", 2089621, "ca959f108fb5a9c363910bca46cd9de69ead3bac016ed2564c74be39ba634e46"),
        ("synth_test.jsonl", 521305, "acfce67c9284bb97dc0b89ad9412b00f6464faf2dfbd2581dd4930140716e45d"),
    ],
    "turk": [
        ("turk_train.jsonl", 2039851, "61d5d6df65a7a899c6f45948a37729bb84b84b4943750f8fa38c1042250ec664"),
        ("turk_test.jsonl", 509811, "5cab7cfadd071a15e0956cc32e1d4d1bbe99750868b8f064d55cc569f5aefbd3"),
    ],
    "gsm8k": [
        ("gsm8k_train.jsonl", None, "f9b00a73bd5f61064b76faba80dbd1277139914d"),
        ("gsm8k_test.jsonl", 917251, "a5287ca8aa668fbf272df8b882dafbd41a93fc4710bf09c411ab482955353468"),
    ],
    "spider": [
        ("spider_train.jsonl", 2377836, "84e4b5f717100871e61ae38589e8f3d44dafab33b69c2d3b8e5ee38224070ba4"),
        ("spider_test.jsonl", 527336, "9462b996c4859bdd27836a46489f741a48f0e8100da1534542d7a44dbab78fe7"),
    ],
    "spider_databases": [
        ("spider_data.zip", 205800266, "00636695dabed6b5f4b8328a16b13e069a2f16591d5efcce57660669c85b121b"),
    ],
    "nq_open": [
        ("nq_open_train.jsonl", 1681867, "a95d112bfc9ba1cbca37511003ca3bc7c5623d4e3187591aeea20273a83a7d37"),
        ("nq_open_test.jsonl", 389655, "77812745a8650ccf2b23e52dee0e8066b32189e48aaaccde37d08e0bb4ad0e6b"),
    ],
    "hellaswag": [
        ("hellaswag_train.jsonl", None, "127b4e84b5034838573e295150eabb6355bca002"),
        ("hellaswag_test.jsonl", 2957082, "07835fa76c8bf513b5651cab8ee18f814331d49f9e6c6a63039be129c598c095"),
    ],
    "rotten_tomatoes": [
        ("rotten_tomatoes_train.jsonl", 2488099, "83cc99291f73fc059bca0b9b2562747a690c462a3a374681870ba5ac8bc6cde4"),
        ("rotten_tomatoes_test.jsonl", 312587, "adb522ad74f15238ac334274324deacebffbdd0266d892dac85a31bc51f12336"),
    ],
    "yelp": [
        ("yelp_train.jsonl", None, "80dfafcf24aa9cff0dd98acea5bf24e1b3ffce86"),
        ("yelp_test.jsonl", 1833782, "a848b39ad7361a10d08740a8191c2e17f168b158c6b83730e704d521837f420b"),
    ],
    "paraphrase": [
        ("paraphrase_train.jsonl", None, "b223c762dca836132e29faee27f76c30dafba714"),
    ],
}
DATABASES = "spider_databases"
LFS_POINTER = b"version https://git-lfs"  # the first bytes of what git stores for an LFS object

TIMEOUT = 30  # seconds without a byte
PAUSES = (0.5, 1, 2)  # seconds before each further try; one try more than there are pauses
CHUNK = 1 << 16


class UserError(Exception):
    """What went wrong and what to do, in one line."""


class Dropped(Exception):
    """The connection ended before the file did; another try may go on from the part."""


def address(name, base=None):
    """Where the file is published. `base` is a mirror that has the layout of the authors' repository."""
    if name.endswith(".jsonl"):
        return f"{base or RAW}/datasets/{name}"
    return f"{base or MEDIA}/{name}"  # spider_data.zip: a Git LFS object at the top of the repository


def kind_of(published):
    """What sort of checksum the table holds."""
    return "sha256" if len(published) == 64 else "git blob id"


def checksum(path, published):
    """The file's checksum in the kind of the published one: sha256, or git's id of a blob with this content."""
    # git hashes "blob <bytes>\0" followed by the content
    total = hashlib.sha256() if len(published) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def difference(path, size, published):
    """What is wrong with the file, or None when it is the published one."""
    got_size, got = path.stat().st_size, checksum(path, published)
    if got != published or size not in (None, got_size):
        kind = kind_of(published)
        return f"wrong checksum, {kind} {got} ({got_size} bytes) instead of {published} ({size or '?'} bytes)"
    with open(path, "rb") as file:  # a git blob id is also right for the note that stands for a Git LFS object
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "a Git LFS pointer in place of the data"
    return None


def chunks(response):
    """The body as it arrives; a read that fails is a dropped connection (and a write that fails is not)."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise Dropped(error) from error
        if not chunk:
            return
        yield chunk


def receive(response, part, start):
    """Write the body to `part` from byte `start` on, with a progress bar on a terminal."""
    length = response.headers.get("Content-Length")
    end = start + int(length) if length else None
    name = part.name.removesuffix(".part")
    with (
        open(part, "ab" if start else "wb") as file,
        tqdm(total=end, initial=start, desc=name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for chunk in chunks(response):
            file.write(chunk)
            bar.update(len(chunk))
    # read1 ends a body that is shorter than announced without an error
    if end is not None and part.stat().st_size < end:
        raise Dropped("the connection closed early")


def attempt(url, part):
    """One request for what `part` still lacks; raise Dropped when another one may help."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        complete = f"bytes */{have}"  # 416, nothing lies after byte `have`: the part is the whole file, or too long
        if error.code == 416 and have and error.headers.get("Content-Range", complete) == complete:
            return
        if error.code == 416:
            part.unlink(missing_ok=True)
        elif error.code != 429 and error.code < 500:
            raise UserError(f"{url}: HTTP {error.code} {error.reason}; nothing fetched, see --base") from error
        raise Dropped(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Dropped(getattr(error, "reason", error)) from error
    with response:
        if response.status != 206:  # the server does not do ranges and sends the file from its beginning
            receive(response, part, 0)
        elif response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            receive(response, part, have)
        else:
            part.unlink(missing_ok=True)
            raise Dropped("the server sent another range than it was asked for")


def fetch(url, target, size, published):
    """Make `target` the published file: skip it, resume it or fetch it. It is replaced only by a verified one."""
    if target.exists():
        if difference(target, size, published) is None:
            print(f"{target}: already there, checksum right")
            return
        print(f"{target}: not the published file, fetching that one")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for pause in (*PAUSES, None):
        try:
            attempt(url, part)
            break
        except Dropped as error:
            if pause is None:
                kept = f"{part.stat().st_size} bytes kept in {part}, " if part.exists() else ""
                raise UserError(
                    f"{url}: gave up after {len(PAUSES) + 1} tries ({error}); {kept}run the same command to go on"
                ) from error
            time.sleep(pause)
    wrong = difference(part, size, published)
    if wrong:
        part.unlink()
        raise UserError(f"{url}: {wrong}; what came is removed, run again or choose another --base")
    os.replace(part, target)
    print(f"{target}: fetched, {target.stat().st_size} bytes, checksum right")


def extract_databases(archive, folder):
    """Copy every database/ID/ID.sqlite of the archive to folder/ID/ID.sqlite; the folder appears only when complete."""
    # one folder may stand above database/; test_database/ is another set. The target is built from the ID alone,
    # which has no dot and no slash, so nothing in the archive can name a place outside.
    wanted = re.compile(r"(?:[^/]+/)?database/([\w-]+)/\1\.sqlite")
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)  # from a run that was killed
    try:
        with zipfile.ZipFile(archive) as source:
            found = {match[1]: name for name in source.namelist() if (match := wanted.fullmatch(name))}
            if not found:
                raise UserError(f"{archive}: holds no database/ID/ID.sqlite; nothing extracted")
            for database, name in tqdm(sorted(found.items()), desc=folder.name, unit="database", disable=None):
                target = temporary / database / f"{database}.sqlite"
                target.parent.mkdir(parents=True)
                with source.open(name) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{archive}: {error}; nothing extracted, remove the file and run again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {len(found)} databases extracted")


def get(name, out, base=None):
    """Fetch the files of one set; for the databases also unpack them."""
    folder = out / DATABASES
    if name == DATABASES and folder.is_dir() and any(folder.iterdir()):
        print(f"{folder}: already there")  # it was renamed into place complete; the archive may be gone
        return
    for file, size, published in FILES[name]:
        fetch(address(file, base), out / file, size, published)
    if name == DATABASES:
        extract_databases(out / "spider_data.zip", folder)


def print_list():
    """One line per file: set, file, bytes, what its checksum is."""
    print(f"{'name':<17} {'file':<28} {'bytes':>11}  checksum")
    for name, files in FILES.items():
        for file, size, published in files:
            print(f"{name:<17} {file:<28} {f'{size:,}' if size else '-':>11}  {kind_of(published)}")


def parse(argv):
    """The command line; `names` comes back checked and in full."""
    parser = argparse.ArgumentParser(
        description="Fetch data files published with LLM-JEPA (size and checksum verified, cut-off downloads resumed).",
        epilog="example:  python datasets/download.py turk spider --databases\n"
        "          fetches both sets and Spider's SQLite databases; run it again and it only verifies.\n"
        "          python datasets/download.py --list  shows every name with its files and sizes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FILES)}, or all")
    parser.add_argument("--databases", action="store_true", help=f"the same as the name {DATABASES} (206 MB)")
    published = Path(__file__).parent / "published"
    parser.add_argument("--out", type=Path, default=published, help="folder for the files (default: %(default)s)")
    parser.add_argument(
        "--base", help=f"http(s) address of a copy of the authors' repository (default: {RAW}, and {MEDIA} for the zip)"
    )
    parser.add_argument("--list", action="store_true", help="print names, files and sizes, and fetch nothing")
    args = parser.parse_args(argv)
    if args.base and not args.base.startswith(("http://", "https://")):
        raise UserError(f"--base {args.base}: not an http:// or https:// address")
    unknown = [name for name in args.names if name not in (*FILES, "all")]
    if unknown:
        raise UserError(f"no data set named {unknown[0]}; the names are {', '.join(FILES)} and all")
    wanted = set(FILES) if "all" in args.names else {*args.names, *([DATABASES] if args.databases else [])}
    args.names = [name for name in FILES if name in wanted]
    if not args.names and not args.list:
        raise UserError("name at least one data set, or all; --list shows them, --help explains")
    return args


def main(argv=None):
    """Run the command; the exit code: 0, 2 after one line about what went wrong, 130 when interrupted."""
    try:
        args = parse(argv)
        if args.list:
            print_list()
            return 0
        for name in args.names:
            get(name, args.out, args.base and args.base.rstrip("/"))
        return 0
    except (UserError, OSError) as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download.py: interrupted; run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
