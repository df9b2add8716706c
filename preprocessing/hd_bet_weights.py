"""The weights of HD-BET 2: where they lie, whether they are whole, and ``braindino fetch-hd-bet``, which brings them.

Nothing here touches the network unless that verb is called. The archive is 100 MB or so from Zenodo. It is checked
against the size and MD5 that its Zenodo record publishes (or a SHA-256 given by hand), downloaded into a ``.part`` file
that a second call goes on with, unpacked beside its place and renamed into it. The SHA-256 of every file is kept in
``fetched.json`` (version 1, owned here) and verified whenever the weights are used.
"""

import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import tyro

from braindino.atomic import write_json
from braindino.command_line import command_line
from braindino.file_digest import file_digest

# As HD_BET.paths of version 2.0.1 has them.
URL = "https://zenodo.org/records/14445620/files/release_v1.5.0.zip?download=1"
RECORD_URL = "https://zenodo.org/api/records/14445620"
FOLDER = ("hd-bet_params", "release_2.0.0")
CHECKPOINT = "fold_all/checkpoint_final.pth"
NEEDED = ("dataset.json", "plans.json", CHECKPOINT)
ENVIRONMENT = "BRAINDINO_WEIGHTS_DIR"

FETCHED = "fetched.json"
FETCHED_VERSION = 1
# Twenty times what the release holds; a zip bomb is told by what it says it will unpack to.
MAX_UNPACKED_BYTES = 8 << 30
TIMEOUT_S = 60

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Fetch the weights of HD-BET 2, once."""

    weights_dir: Path | None = None
    """folder for weights; they go into hd-bet_params/release_2.0.0 in it. Default: $BRAINDINO_WEIGHTS_DIR, else home"""
    url: str = URL
    """where the archive is"""
    record: str = RECORD_URL
    """Zenodo record that publishes the archive's size and MD5; not asked when --sha256 is given"""
    sha256: str = ""
    """SHA-256 that the archive must have, 64 hexadecimal digits"""
    archive: Annotated[Path | None, tyro.conf.arg(metavar="ZIP")] = None
    """an archive that is on this machine already; nothing is fetched"""

    def __post_init__(self) -> None:
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"--sha256 {self.sha256}: expected 64 hexadecimal digits")


@dataclass(frozen=True)
class Expected:
    """What an archive must be: a digest by the named algorithm, and its size in bytes where that is known."""

    algorithm: str
    digest: str
    size: int | None = None


@command_line("fetch-hd-bet", interrupted="the same command goes on where it stopped")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the weights are there, 1 on an error."""
    folder = fetch(tyro.cli(FetchOptions, args=argv, prog="braindino fetch-hd-bet"))
    print(f"{folder / CHECKPOINT}: sha256 {checkpoint_sha256(folder)}")
    if folder != model_folder():
        print(f"this is not where it will be looked for: export {ENVIRONMENT}={folder.parents[len(FOLDER) - 1]}")
    return 0


def model_folder(weights_dir: Path | None = None) -> Path:
    """Where the weights are expected: in ``weights_dir``, in ``$BRAINDINO_WEIGHTS_DIR``, or in HD-BET's own place
    in the home folder."""
    base = weights_dir or Path(os.environ.get(ENVIRONMENT) or Path.home())
    return base.expanduser().absolute().joinpath(*FOLDER)


def checkpoint_sha256(folder: Path) -> str:
    """The SHA-256 of the weights in ``folder``, compared with what was fetched if ``braindino fetch-hd-bet`` did that.

    Raises:
        ValueError: there are none (says from where, whereto, and what needs no download), or they have changed.
    """
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(
            f"the weights of HD-BET 2 are missing: {folder} has no {', '.join(missing)}. Run `braindino fetch-hd-bet`, "
            f"which fetches {URL}; on a machine without network, bring that file and run `braindino fetch-hd-bet "
            f"--archive FILE`; or use --skull-strip hd-bet-offline, whose weights come with pip. {ENVIRONMENT} names "
            "another place"
        )
    known = _read_fetched(folder)
    digests = {name: file_digest(folder / name) for name in NEEDED}
    for name, digest in digests.items():
        if known is not None and known.get(name) != digest:
            raise ValueError(
                f"{folder / name}: SHA-256 {digest}, but {known.get(name)} was fetched; remove {folder} and run "
                "`braindino fetch-hd-bet` again"
            )
    return digests[CHECKPOINT]


def fetch(options: FetchOptions) -> Path:
    """Bring the weights to their place and return it; does nothing where they are whole already.

    Raises:
        ValueError: the archive is not what it should be, and has been removed; or the place holds something else.
        OSError: the network or the disk failed; what has arrived is kept for the next call.
    """
    folder = model_folder(options.weights_dir)
    if all((folder / name).is_file() for name in NEEDED):
        checkpoint_sha256(folder)
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds {sorted(p.name for p in folder.iterdir())[:5]}, not the weights; remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    expected = _expected(options)
    archive = options.archive or _download(options.url, folder.parent / f"{folder.name}.zip.part", expected)
    sha256 = _check(archive, expected, remove=options.archive is None)
    source = str(options.archive.absolute()) if options.archive else options.url
    try:
        _install(archive, folder, {"source": source, "archive_sha256": sha256})
    finally:
        if options.archive is None:
            archive.unlink()
    return folder


def _expected(options: FetchOptions) -> Expected | None:
    """By hand, by the record, or, for an archive that somebody brought without either, nothing."""
    if options.sha256:
        return Expected("sha256", options.sha256.lower())
    if options.archive is not None:
        return None
    name = PurePosixPath(urlsplit(options.url).path).name
    try:
        with _open(Request(options.record)) as response:
            files = json.load(response)["files"]
        (entry,) = [entry for entry in files if entry["key"] == name]
        algorithm, _, digest = entry["checksum"].partition(":")
        return Expected(algorithm, digest, int(entry["size"]))
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise OSError(
            f"{options.record} does not say what {name} must be ({error}); try again, or give its --sha256"
        ) from error


def _open(request: Request):
    parts = urlsplit(request.full_url)
    if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"{request.full_url}: expected an https address")
    return urlopen(request, timeout=TIMEOUT_S)


def _download(url: str, part: Path, expected: Expected | None) -> Path:
    """``part``, complete. What is there already is not fetched again."""
    have = part.stat().st_size if part.exists() else 0
    size = expected.size if expected else None
    if size is not None and have >= size:
        return part
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with _open(request) as response:
            if response.status != 206:  # the server sends the whole file
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else size
            with part.open("r+b" if have else "wb") as handle:
                handle.seek(have)
                while block := response.read(_BLOCK):
                    handle.write(block)
                    have += len(block)
                handle.truncate()
                os.fsync(handle.fileno())
    except HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the checksum decides
            return part
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise OSError(f"{url}: {error}; {_size(part)} bytes are kept, the same command goes on from there") from error
    if total is not None and have < total:
        raise OSError(f"{url}: the connection ended after {have} of {total} bytes; the same command goes on from there")
    return part


def _check(archive: Path, expected: Expected | None, *, remove: bool) -> str:
    """The SHA-256 of the archive, which is the expected one; a wrong one is removed if we fetched it."""
    sha256 = file_digest(archive)
    if expected is None:
        return sha256
    found = sha256 if expected.algorithm == "sha256" else file_digest(archive, algorithm=expected.algorithm)
    if found != expected.digest or expected.size not in (None, _size(archive)):
        fact = f"{archive}: {_size(archive)} bytes, {expected.algorithm} {found}"
        if remove:
            archive.unlink()
        raise ValueError(
            f"{fact}; expected {expected.size or 'any number of'} bytes, {expected.algorithm} {expected.digest}"
            + ("; removed, run the same command again" if remove else "")
        )
    return sha256


def _install(archive: Path, folder: Path, facts: dict[str, str]) -> None:
    """Unpack beside the place, check, and rename."""
    unpacked = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as source:
            for member in source.infolist():
                _check_member(member)
            if (size := sum(member.file_size for member in source.infolist())) > MAX_UNPACKED_BYTES:
                raise ValueError(f"{archive}: would unpack to {size} bytes, expected at most {MAX_UNPACKED_BYTES}")
            source.extractall(unpacked)
        if missing := [name for name in NEEDED if not (unpacked / name).is_file()]:
            raise ValueError(f"{archive}: has no {', '.join(missing)}; is it the release of HD-BET 2?")
        digests = {name: file_digest(unpacked / name) for name in NEEDED}
        write_json(unpacked / FETCHED, {"version": FETCHED_VERSION, **facts, "sha256": digests})
        unpacked.chmod(0o755)
        unpacked.replace(folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: not a zip archive ({error})") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    steps = name.removesuffix("/").split("/")  # an empty first step is an absolute path
    if is_link or {"..", "."} & set(steps) or "" in steps or "\\" in name or ":" in name:
        raise ValueError(f"the archive holds {name!r}, which would be written elsewhere; it is refused")


def _read_fetched(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256, as fetched; none where the weights came another way."""
    path = folder / FETCHED
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != FETCHED_VERSION:
            raise ValueError(f"version {record['version']}, expected {FETCHED_VERSION}")
        return {str(name): str(digest) for name, digest in record["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove {folder} and run `braindino fetch-hd-bet`") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main())
