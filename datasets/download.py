"""Fetch the data files published with LLM-JEPA, and the databases that go with Spider.

    python datasets/download.py turk spider --databases    # two sets, and Spider's SQLite databases
    python datasets/download.py all --out FOLDER           # every set; run it again and it only verifies

A file appears only once its size and checksum are right. The project does not need these files: README.md beside this
script says what each set is and how it is scored.
"""

import hashlib
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support import cli  # noqa: E402
from support.cli import UserError  # noqa: E402

REPOSITORY = "galilai-group/llm-jepa/6d7d0d1"  # owner, name, commit: the files never change under us
RAW = f"https://raw.githubusercontent.com/{REPOSITORY}"
MEDIA = f"https://media.githubusercontent.com/media/{REPOSITORY}"  # serves Git LFS objects
# set -> its files: name, bytes (None: not known), checksum: 64 digits are a sha256, 40 digits a git blob id
FILES = cli.read_json(HERE / "published_files.json")
DATABASES = "spider_databases"
PAUSES = (0.5, 1, 2)  # seconds before each further try; one try more than there are pauses


def address(name, base=None):
    """Where the file is published. `base` is a mirror that has the layout of the authors' repository."""
    if name.endswith(".jsonl"):
        return f"{base or RAW}/datasets/{name}"
    return f"{base or MEDIA}/{name}"  # spider_data.zip: a Git LFS object at the top of the repository


def difference(path, size, published):
    """What is wrong with the file, or None when it is the published one."""
    got_size, kind = path.stat().st_size, "sha256" if len(published) == 64 else "git blob id"
    with open(path, "rb") as file:
        # a git blob id is the sha1 of "blob <bytes>\0" and the content
        start = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % got_size)
        got = hashlib.file_digest(file, lambda: start).hexdigest()
        file.seek(0)
        pointer = file.read(23) == b"version https://git-lfs"  # what git stores for a Git LFS object has its blob id
    if got != published or size not in (None, got_size):
        return f"wrong checksum, {kind} {got} ({got_size} bytes) instead of {published} ({size or '?'} bytes)"
    return "a Git LFS pointer in place of the data" if pointer else None


def receive(url, path):
    """Write what the address holds to `path`. Raises ConnectionError where another try may help."""
    import pooch

    try:
        # pooch sets the total; a bar that has none cannot be asked whether it is there
        with tqdm(desc=url.rpartition("/")[2], total=1, unit="B", unit_scale=True, disable=None) as bar:
            pooch.HTTPDownloader(bar, chunk_size=1 << 16)(url, str(path), None)
    except (OSError, ValueError) as failure:  # what requests raises is one of these
        response = getattr(failure, "response", None)
        if isinstance(failure, OSError) and failure.errno is not None:  # the disk's, not the network's
            raise
        said = failure if response is None else f"HTTP {response.status_code} {response.reason}"
        busy = response is not None and (response.status_code == 429 or response.status_code >= 500)
        if busy or response is None and not isinstance(failure, ValueError):  # ValueError: no address
            raise ConnectionError(said) from None
        raise UserError(f"{url}: {said}; nothing fetched, see --base") from None


def fetch(url, target, size, published):
    """Make `target` the published file: skip it or fetch it. It is replaced only by a verified one."""
    if target.exists():
        if difference(target, size, published) is None:
            print(f"{target}: already there, checksum right")
            return
        print(f"{target}: not the published file, fetching that one")
    with cli.writing(target) as unfinished:
        for pause in (*PAUSES, None):
            try:
                receive(url, unfinished)
                break
            except ConnectionError as failure:
                if pause is None:
                    raise UserError(f"{url}: gave up after {len(PAUSES) + 1} tries ({failure}); try again") from None
                time.sleep(pause)
        wrong = difference(unfinished, size, published)
        if wrong:
            raise UserError(f"{url}: {wrong}; what came is removed, run again or choose another --base")
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
                (temporary / database).mkdir(parents=True)
                with source.open(name) as packed, open(temporary / database / f"{database}.sqlite", "wb") as file:
                    shutil.copyfileobj(packed, file)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, zlib.error) as failure:
        raise UserError(f"{archive}: {failure}; nothing extracted, remove the file and run again") from None
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


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FILES)}, or all")
    parser.add_argument("--databases", action="store_true", help=f"the same as the name {DATABASES} (206 MB)")
    parser.add_argument("--out", type=Path, default=HERE / "published", help="folder for the files")
    parser.add_argument("--base", help=f"address of a copy of the authors' repository; default: {RAW}, {MEDIA}")
    args = parser.parse_args(argv)
    for unknown in sorted({*args.names} - {*FILES, "all"}):
        raise UserError(f"no data set named {unknown}; the names are {', '.join(FILES)} and all")
    if args.base and not args.base.startswith(("http://", "https://")):
        raise UserError(f"--base {args.base}: not an http:// or https:// address")
    wanted = {*args.names} | ({DATABASES} if args.databases else set())
    if not wanted:
        raise UserError("name at least one data set, or all; --help lists them")
    for name in FILES:
        if name in wanted or "all" in wanted:
            get(name, args.out, args.base and args.base.rstrip("/"))


if __name__ == "__main__":
    cli.run(main)
