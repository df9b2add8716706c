"""Weights of HD-BET 2: fetched once, resumed, checked, unpacked nowhere else; never fetched behind anybody's back."""

import hashlib
import io
import json
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from braindino.preprocessing import hd_bet_weights
from braindino.preprocessing.hd_bet_weights import CHECKPOINT, checkpoint_sha256, main, model_folder

CHECKPOINT_BYTES = bytes(range(256)) * 400


def archive(**extra: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as handle:
        for name, content in {
            "dataset.json": b"{}",
            "plans.json": b"{}",
            CHECKPOINT: CHECKPOINT_BYTES,
            **extra,
        }.items():
            handle.writestr(name, content)
    return buffer.getvalue()


class Server:
    """A Zenodo on loopback: one archive and its record; notes what was asked for."""

    def __init__(self):
        self.content = archive()
        self.cut_after: int | None = None
        self.ranges = True
        self.md5: str | None = None
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append((self.path, asked))
                if self.path == "/record":
                    self.reply(200, json.dumps({"files": [outer.entry()]}).encode())
                    return
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and outer.ranges else 0
                if start >= len(outer.content):
                    self.reply(416, b"")
                    return
                self.reply(206 if start else 200, outer.content[start:], cut=outer.cut_after)

            def reply(self, status, body, cut=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

            def log_message(self, *_):
                """Silent."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def entry(self):
        md5 = self.md5 or hashlib.md5(self.content, usedforsecurity=False).hexdigest()
        return {"key": "release.zip", "size": len(self.content), "checksum": f"md5:{md5}"}

    def arguments(self, tmp_path):
        url, record = f"{self.base}/files/release.zip?download=1", f"{self.base}/record"
        return ["--weights-dir", str(tmp_path), "--url", url, "--record", record]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def part_of(tmp_path):
    return model_folder(tmp_path).parent / "release_2.0.0.zip.part"


def test_weights_are_fetched_checked_and_noted_and_not_fetched_again(server, tmp_path, capsys):
    assert main(server.arguments(tmp_path)) == 0
    folder = tmp_path / "hd-bet_params" / "release_2.0.0"
    sha256 = hashlib.sha256(CHECKPOINT_BYTES).hexdigest()
    assert (folder / CHECKPOINT).read_bytes() == CHECKPOINT_BYTES
    assert checkpoint_sha256(folder) == sha256
    note = json.loads((folder / "fetched.json").read_text())
    assert note["archive_sha256"] == hashlib.sha256(server.content).hexdigest() and note["sha256"][CHECKPOINT] == sha256
    assert sorted(path.name for path in folder.parent.iterdir()) == ["release_2.0.0"]
    assert f"sha256 {sha256}" in capsys.readouterr().out
    asked = len(server.asked)
    assert main(server.arguments(tmp_path)) == 0
    assert len(server.asked) == asked


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.fault
def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path, capsys, ranges):
    server.cut_after, server.ranges = 40_000, ranges
    assert main(server.arguments(tmp_path)) == 1
    assert "the same command goes on from there" in capsys.readouterr().err
    assert part_of(tmp_path).read_bytes() == server.content[:40_000]
    assert not model_folder(tmp_path).exists()
    server.cut_after = None
    assert main(server.arguments(tmp_path)) == 0
    assert server.asked[-1][1] == "bytes=40000-"
    assert (model_folder(tmp_path) / CHECKPOINT).read_bytes() == CHECKPOINT_BYTES
    assert not part_of(tmp_path).exists()


def test_a_wrong_checksum_is_refused_and_the_file_removed(server, tmp_path, capsys):
    server.md5 = "0" * 32
    assert main(server.arguments(tmp_path)) == 1
    assert "md5" in (said := capsys.readouterr().err) and "expected" in said and "removed" in said
    assert not part_of(tmp_path).exists() and not model_folder(tmp_path).exists()


def test_half_a_file_of_another_release_is_found_by_the_checksum(server, tmp_path, capsys):
    part_of(tmp_path).parent.mkdir(parents=True)
    part_of(tmp_path).write_bytes(b"x" * 1000)
    assert main(server.arguments(tmp_path)) == 1
    assert not part_of(tmp_path).exists()
    assert main(server.arguments(tmp_path)) == 0
    capsys.readouterr()


def test_a_sha256_by_hand_stands_in_for_the_record(server, tmp_path, capsys):
    right = hashlib.sha256(server.content).hexdigest()
    arguments = server.arguments(tmp_path)
    assert main([*arguments, "--sha256", "1" * 64]) == 1
    assert f"sha256 {right}" in capsys.readouterr().err
    assert main([*arguments, "--sha256", right.upper()]) == 0
    assert all(path != "/record" for path, _ in server.asked)


@pytest.mark.fault
def test_a_record_that_says_nothing_stops_before_the_download(server, tmp_path, capsys):
    arguments = server.arguments(tmp_path)
    arguments[3] = f"{server.base}/files/other.zip"
    assert main(arguments) == 1
    assert "does not say what other.zip must be" in capsys.readouterr().err
    assert [path for path, _ in server.asked] == ["/record"]


def zip_of(name: str, *, link: bool = False) -> bytes:
    buffer = io.BytesIO(archive())
    with zipfile.ZipFile(buffer, "a") as handle:
        member = zipfile.ZipInfo(name)
        member.external_attr = (0o120777 if link else 0o100644) << 16
        handle.writestr(member, "/etc")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "link"),
    [("../evil", False), ("a/../../evil", False), ("/evil", False), ("a\\..\\evil", False), ("l", True)],
)
def test_archives_that_would_write_elsewhere_are_refused(server, tmp_path, capsys, name, link):
    server.content = zip_of(name, link=link)
    assert main(server.arguments(tmp_path)) == 1
    assert "would be written elsewhere; it is refused" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "hd-bet_params"]
    assert not (tmp_path.parent / "evil").exists()


def test_a_zip_bomb_is_refused_by_what_it_says(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hd_bet_weights, "MAX_UNPACKED_BYTES", 1000)
    assert main(server.arguments(tmp_path)) == 1
    assert "expected at most 1000" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [(b"no zip", "not a zip archive"), (None, "has no plans.json")])
def test_archives_of_something_else_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "brought.zip"
    if content is None:
        with zipfile.ZipFile(path, "w") as handle:
            handle.writestr("dataset.json", "{}")
            handle.writestr(CHECKPOINT, "")
    else:
        path.write_bytes(content)
    assert main(["--weights-dir", str(tmp_path / "weights"), "--archive", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert path.exists() and not model_folder(tmp_path / "weights").exists()


def test_an_archive_that_was_brought_needs_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hd_bet_weights, "urlopen", lambda *_, **__: pytest.fail("network"))
    (tmp_path / "brought.zip").write_bytes(archive())
    monkeypatch.setenv("BRAINDINO_WEIGHTS_DIR", str(tmp_path / "weights"))
    assert main(["--archive", str(tmp_path / "brought.zip")]) == 0
    assert checkpoint_sha256(model_folder()) == hashlib.sha256(CHECKPOINT_BYTES).hexdigest()
    assert (tmp_path / "brought.zip").exists()
    assert "export" not in capsys.readouterr().out


def test_weights_that_have_changed_since_are_refused(server, tmp_path, capsys):
    assert main(server.arguments(tmp_path)) == 0
    path = model_folder(tmp_path) / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"checkpoint_final.pth: SHA-256 .* was fetched; remove"):
        checkpoint_sha256(model_folder(tmp_path))
    assert main(server.arguments(tmp_path)) == 1
    (model_folder(tmp_path) / "fetched.json").write_text("{")
    with pytest.raises(ValueError, match=r"fetched.json: damaged"):
        checkpoint_sha256(model_folder(tmp_path))
    capsys.readouterr()


@pytest.mark.fault
def test_missing_weights_name_url_place_and_alternative_and_fetch_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hd_bet_weights, "urlopen", lambda *_, **__: pytest.fail("network"))
    folder = model_folder(tmp_path)
    with pytest.raises(ValueError, match=r"https://zenodo.org/records/.*hd-bet-offline") as caught:
        checkpoint_sha256(folder)
    assert str(folder) in str(caught.value)
    assert not folder.parent.exists()


def test_the_place_is_the_flag_then_the_variable_then_hd_bets_own(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINDINO_WEIGHTS_DIR", str(tmp_path / "variable"))
    assert model_folder(tmp_path / "flag") == tmp_path / "flag" / "hd-bet_params" / "release_2.0.0"
    assert model_folder() == tmp_path / "variable" / "hd-bet_params" / "release_2.0.0"
    monkeypatch.delenv("BRAINDINO_WEIGHTS_DIR")
    paths = pytest.importorskip("HD_BET.paths")
    assert str(model_folder()) == paths.folder_with_parameter_files
    assert paths.ZENODO_DOWNLOAD_URL == hd_bet_weights.URL


def test_only_https_is_asked_and_other_folders_are_left_alone(tmp_path, capsys):
    place = ["--weights-dir", str(tmp_path)]
    assert main([*place, "--url", "http://example.org/a.zip", "--sha256", "0" * 64]) == 1
    assert "expected an https address" in capsys.readouterr().err
    model_folder(tmp_path).mkdir(parents=True)
    (model_folder(tmp_path) / "mine.txt").write_text("mine")
    assert main(place) == 1
    assert "mine.txt" in capsys.readouterr().err
    assert (model_folder(tmp_path) / "mine.txt").exists()
    assert urllib.request.urlopen is hd_bet_weights.urlopen
