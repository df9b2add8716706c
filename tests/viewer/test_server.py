"""Who is answered, and what: the server without a browser."""

import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from braindino.viewer.latest_wins import LatestWins, SupersededError
from braindino.viewer.scans import ScanShelf, given_source
from braindino.viewer.server import CONTENT_SECURITY_POLICY, MAX_BODY_BYTES, PAGE_FILES, TOKEN_HEADER, ViewServer
from braindino.viewer.session import Session

PAGE = Path(__file__).resolve().parents[2] / "viewer" / "page"


@pytest.fixture
def client(serve, phantom_session):
    return serve(phantom_session)


def test_the_page_is_served_without_a_token_and_nothing_else_is(client) -> None:
    for address, (name, content_type) in PAGE_FILES.items():
        status, headers, body = client.ask(address, headers={TOKEN_HEADER: None})
        assert (status, headers["Content-Type"]) == (200, content_type)
        assert body == (PAGE / name).read_bytes()
    for address in ("/api/scene", "/api/scans/given", "/api/scans/given/volume", "/api/thumbnails/given/3"):
        for token in (None, "", "x" * 43, client.server.token[:-1]):
            status, error = client.error(address, headers={TOKEN_HEADER: token})
            assert status == 401
            assert "token" in error["what"] and "behind the #" in error["next"]
    status, error = client.error("/api/similarity", {"scan": "given"}, headers={TOKEN_HEADER: None})
    assert status == 401


def test_every_answer_forbids_what_the_page_does_not_need(client) -> None:
    answers = [client.ask("/"), client.ask("/api/scene"), client.ask("/api/scans/given/volume"), client.ask("/nothing")]
    for _, headers, _ in answers:
        assert headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert not any(name.lower().startswith("access-control") for name in headers)
        assert "Python" not in headers["Server"]
    assert "unsafe" not in CONTENT_SECURITY_POLICY and "http" not in CONTENT_SECURITY_POLICY


def test_only_the_loopback_interface_is_bound(client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "", None])
def test_a_name_that_is_not_this_machine_s_is_refused(client, host) -> None:
    named = None if host is None else host.format(port=client.server.server_port)
    for address in ("/", "/api/scene"):
        status, error = client.error(address, headers={"Host": named})
        assert status == 421
        assert f"127.0.0.1:{client.server.server_port}" in error["what"]
    assert client.ask("/api/scene", headers={"Host": f"localhost:{client.server.server_port}"})[0] == 200


def test_requests_that_another_page_began_are_refused(client) -> None:
    port = client.server.server_port
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        for address, question in (("/", None), ("/api/scene", None), ("/api/similarity", {"scan": "given"})):
            status, error = client.error(address, question, headers=headers)
            assert status == 403
            assert "another page" in error["what"]
    for headers in ({"Origin": f"http://127.0.0.1:{port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert client.ask("/api/scene", headers=headers)[0] == 200


@pytest.mark.parametrize(
    "address",
    [
        "/../setup.py",
        "/..%2f..%2fsetup.py",
        "/page/../view.py",
        "//etc/passwd",
        "/viewer.js/../../view.py",
        "/api/scans/../../../../etc/passwd",
        "/api/scans/..%2f..%2fetc%2fpasswd/volume",
        "/api/scans/given/../volume",
        "/api/scans/given/affine",
        "/api/scans//etc/passwd",
        "/api/thumbnails/given/-1",
        "/api/thumbnails/given/1e3",
        "/api",
        "/api/",
        "/favicon.ico",
    ],
)
def test_no_path_leads_out_of_the_table_of_addresses(client, address) -> None:
    status, error = client.error(address)
    assert status == 404
    assert set(error) == {"what", "where", "next"}


def test_a_part_that_the_scan_does_not_have_is_not_found(client) -> None:
    assert client.error("/api/scans/given/mask")[0] == 404


def test_unknown_scans_are_named_and_never_looked_for_on_disk(client, phantom) -> None:
    for key in ("nobody", str(phantom.scan), ""):
        status, error = client.error("/api/similarity", {"scan": key})
        assert status == 404
        assert error["what"] == "No scan has this key."
    assert client.error("/api/scans/0123456789abcdef")[0] == 404


def test_other_methods_are_refused(client) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, headers, body = client.ask("/", method=method)
        assert (status, headers["Allow"]) == (405, "GET, POST"), method
        assert json.loads(body)["error"]["next"] == "GET"
    assert client.ask("/", method="HEAD")[0] == 405
    assert client.error("/api/scene", {"a": 1})[0] == 405
    assert client.error("/api/similarity")[0] == 405
    status, headers, body = client.ask("/", method="BREW")
    assert status == 501
    assert "Traceback" not in body.decode() and headers["Content-Type"] == "application/json"


def test_bodies_are_bounded_and_must_be_json(client) -> None:
    status, error = client.error("/api/similarity", body=b" " * (MAX_BODY_BYTES + 1))
    assert status == 413
    assert str(MAX_BODY_BYTES) in error["what"]
    # Refused by what it announces, before anything is read.
    assert client.error("/api/similarity", body=b"", headers={"Content-Length": "9" * 30})[0] == 413
    assert client.error("/api/similarity", body=b"", headers={"Content-Length": "-1"})[0] == 411
    assert client.error("/api/similarity", method="POST")[0] == 411
    assert client.error("/api/similarity", body=b"{}", headers={"Transfer-Encoding": "chunked"})[0] == 411
    assert client.error("/api/similarity", body=b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    for body in (b"{", b"[1]", b"\xff\xfe", b"[" * 4000):
        assert client.error("/api/similarity", body=body)[0] == 400


def test_what_is_no_http_gets_an_answer_too(client) -> None:
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/9.9.9\r\n\r\n")
        answer = connection.recv(65536)
    assert b"Bad request version" in answer and b"Traceback" not in answer


def test_a_token_that_is_no_ascii_is_refused_like_any_other(client) -> None:
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=10) as connection:
        head = f"GET /api/scene HTTP/1.1\r\nHost: 127.0.0.1:{client.server.server_port}\r\n{TOKEN_HEADER}: "
        connection.sendall(head.encode() + b"\xff\xfe\r\n\r\n")
        assert b" 401 " in connection.recv(65536)


def test_a_failure_inside_is_told_without_its_trace(client, capfd, monkeypatch) -> None:
    monkeypatch.setattr(Session, "scene", lambda self: 1 / 0)
    status, error = client.error("/api/scene")
    assert status == 500
    assert error["what"] == "The viewer failed (ZeroDivisionError)."
    assert "division" in capfd.readouterr().err, "the terminal shows what happened"


def test_wrong_questions_are_answered_with_what_was_expected(client) -> None:
    right = {"scan": "given", "encoder": "encoder-0", "block": 3, "voxel": [20, 30, 12], "layer": 12, "smooth": True}
    for change, message in (
        ({"encoder": "x"}, "expected one of encoder-0"),
        ({"encoder": None}, "expected one of encoder-0"),
        ({"block": 4}, "expected 0 to 3"),
        ({"block": True}, "expected a whole number"),
        ({"block": 1.0}, "expected a whole number"),
        ({"voxel": [1, 2]}, "three whole numbers"),
        ({"voxel": [1, 2, 1e9]}, "three whole numbers"),
        ({"voxel": [1, 2, 26]}, "outside the scan"),
        ({"layer": -1}, "outside the scan"),
        ({"smooth": 1}, "true or false"),
    ):
        status, error = client.error("/api/similarity", right | change)
        assert status == 422
        assert message in error["what"], change
    status, error = client.error("/api/neighbours", {"scan": "given", "encoder": "encoder-0", "layer": 3})
    assert (status, "--features" in error["what"]) == (422, True)


def test_a_file_that_is_gone_is_an_error_that_names_it(serve, tiny_encoder, tmp_path) -> None:
    source = given_source(tmp_path / "gone.nii.gz", mask=None, segmentation=None)
    status, error = serve(Session(ScanShelf([source]), [tiny_encoder], {})).error("/api/scans/given")
    assert status == 422
    assert "gone.nii.gz" in error["what"]


def test_the_facts_of_a_scan(client, phantom) -> None:
    scene = client.json("/api/scene")
    assert [scan["key"] for scan in scene["scans"]] == ["given"]
    assert scene["encoders"] == [{"key": "encoder-0", "name": "tiny", "blocks": 4, "slices": True, "neighbours": False}]
    assert str(phantom.scan.parent) not in json.dumps(scene), "the page need not know where files lie"
    facts = client.json("/api/scans/given")
    assert facts["shape"] == [44, 60, 26]
    assert facts["spacing"] == [2.0, 1.5, 3.0]
    assert [label["value"] for label in facts["labels"]] == [2, 7]
    assert facts["labels"][0]["ml"] == round(7 * 5 * 9 / 1000, 2)
    assert (facts["mask"], facts["segmentation"], facts["warning"]) == (False, True, "")


def test_of_clicks_that_wait_only_the_newest_is_answered() -> None:
    work = LatestWins()
    done: list[str] = []
    superseded: list[str] = []
    started = threading.Event()

    def click(name: str, kind: str = "similarity", hold: threading.Event | None = None) -> None:
        try:
            with work.turn(kind):
                started.set()
                if hold is not None:
                    hold.wait(10)
                done.append(name)
        except SupersededError:
            superseded.append(name)

    hold = threading.Event()
    threads = [threading.Thread(target=click, args=("first",), kwargs={"hold": hold})]
    threads[0].start()
    assert started.wait(10)
    kinds = {"second": "similarity", "search": "neighbours", "third": "similarity", "fourth": "similarity"}
    for name, kind in kinds.items():
        before = dict(work._newest)
        threads.append(threading.Thread(target=click, args=(name, kind)))
        threads[-1].start()
        deadline = time.monotonic() + 10
        while work._newest == before and time.monotonic() < deadline:
            time.sleep(0.005)
    hold.set()
    for thread in threads:
        thread.join(10)
    assert done[0] == "first"
    assert sorted(done[1:]) == ["fourth", "search"], "a search is not made superfluous by a click"
    assert sorted(superseded) == ["second", "third"]


def test_the_bundled_niivue_is_the_one_that_its_licence_file_names() -> None:
    text = (PAGE / "niivue-license.txt").read_text(encoding="utf-8")
    content = (PAGE / "niivue.umd.js").read_bytes()
    assert re.search(r"sha256 ([0-9a-f]{64})", text)[1] == hashlib.sha256(content).hexdigest()
    assert f"{len(content):,} bytes" in text
    assert "NiiVue 0.69.0" in text and "Redistributions in binary form must reproduce the above copyright" in text
    assert b'"0.69.0"' in content


def test_the_page_names_no_other_address() -> None:
    for name in ("index.html", "viewer.css", "viewer.js"):
        text = (PAGE / name).read_text(encoding="utf-8")
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text), name
        assert not re.search(r"\bon[a-z]+=\"|style=\"|<script>", text), f"{name}: forbidden by the policy"


def test_ctrl_c_ends_the_viewer_with_0(phantom, hears_ctrl_c) -> None:
    command = [sys.executable, "-m", "braindino.cli", "view", str(phantom.scan), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"view: http://127\.0\.0\.1:(\d+)/#[\w-]{43}\n", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert (response.status, len(response.read()) > 0) == (200, True)
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("view: ended\n")


def wait_for_the_answers() -> None:
    for thread in threading.enumerate():
        if "process_request_thread" in thread.name:
            thread.join(30)
            assert not thread.is_alive()


def test_a_page_that_is_closed_amid_an_answer_is_no_error_to_tell_and_other_errors_are(client, capsys) -> None:
    port = client.server.server_port
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as page:
            # Closed like a tab: what was not read yet is refused (RST), not waited for.
            page.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            page.sendall(f"GET /niivue.umd.js HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            assert page.recv(15) == b"HTTP/1.1 200 OK"
    wait_for_the_answers()
    assert capsys.readouterr().err == ""
    try:
        raise ZeroDivisionError("planted")
    except ZeroDivisionError:
        client.server.handle_error(None, ("127.0.0.1", 1))
    assert "ZeroDivisionError: planted" in capsys.readouterr().err


def test_two_runs_have_two_tokens(phantom_session) -> None:
    tokens = set()
    for _ in range(2):
        with ViewServer(phantom_session) as server:
            tokens.add(server.token)
            assert server.url == f"http://127.0.0.1:{server.server_port}/#{server.token}"
    assert len(tokens) == 2


def test_numbers_of_a_map_survive_the_way(client, phantom) -> None:
    question = {
        "scan": "given",
        "encoder": "encoder-0",
        "block": 2,
        "voxel": list(phantom.voxel),
        "layer": phantom.voxel[2],
        "smooth": False,
    }
    answer = client.json("/api/similarity", question)
    values = np.frombuffer(base64.b64decode(answer["map"]), "<f4").reshape(44, 60, order="F")
    x, y, _ = phantom.voxel
    assert values[x, y] == 1.0
    columns, rows = answer["cells"]
    assert [columns[x], rows[y]] == answer["reference"]
    assert answer["grid"][columns[x]][rows[y]] == 1.0
    assert values[0, 0] == -2, "no brain in the corner"


def test_opening_a_scan_prepares_what_the_first_click_would_wait_for(phantom, tiny_encoder, monkeypatch) -> None:
    prepared = threading.Event()
    prepare_planes = tiny_encoder.encoder.prepare_planes
    calls = []

    def prepare(*arguments, **options):
        calls.append(threading.current_thread().name)
        made = prepare_planes(*arguments, **options)
        prepared.set()
        return made

    monkeypatch.setattr(tiny_encoder.encoder, "prepare_planes", prepare)
    session = Session(ScanShelf([given_source(phantom.scan, mask=None, segmentation=None)]), [tiny_encoder], {})
    session.scan_facts("given")
    assert prepared.wait(timeout=60)
    question = {"scan": "given", "encoder": tiny_encoder.key, "block": 0, "voxel": list(phantom.voxel)}
    session.similarity(question | {"layer": phantom.voxel[2]})
    assert len(calls) == 1 and calls[0].startswith("prepare")


def test_a_scan_that_the_encoder_has_no_use_for_is_told_of_at_the_click(phantom, tiny_encoder, monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise ValueError("not for this encoder")

    monkeypatch.setattr(tiny_encoder.encoder, "prepare_planes", refuse)
    session = Session(ScanShelf([given_source(phantom.scan, mask=None, segmentation=None)]), [tiny_encoder], {})
    session.scan_facts("given")
    question = {"scan": "given", "encoder": tiny_encoder.key, "block": 0, "voxel": list(phantom.voxel)}
    with pytest.raises(ValueError, match="not for this encoder"):
        session.similarity(question | {"layer": phantom.voxel[2]})
