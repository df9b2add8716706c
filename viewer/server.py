"""The page's own server: on the loopback interface only, with only the scans it was given, for who has the token.

What keeps others out (docs/viewer.md): the socket is bound to 127.0.0.1; a name in the Host header that is not this
machine is refused (a web page cannot reach it under a name of its own, DNS rebinding), and so is every request that
another origin started; everything but the page's own program needs the token of this run in a header, which no other
page can send; no path comes from a URL, every address is looked up in a table.
"""

import hmac
import json
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from braindino.viewer.latest_wins import LatestWins, SupersededError
from braindino.viewer.session import Session
from braindino.viewer.token_planes import OutsideError

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
TOKEN_HEADER = "X-BrainDINO-Token"
MAX_BODY_BYTES = 4096
SECONDS_TO_SEND = 30
# blob: thumbnails and downloads are made in the page; data: NiiVue carries its typeface as one. No inline script.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "/niivue.umd.js": ("niivue.umd.js", "text/javascript; charset=utf-8"),
    "/niivue-license.txt": ("niivue-license.txt", "text/plain; charset=utf-8"),
}


class RequestError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        what: went wrong.
        where: the address, the field or the file; may be empty.
        next_step: what to do about it.
    """

    def __init__(self, status: HTTPStatus, what: str, *, where: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.status, self.what, self.where, self.next_step = status, what, where, next_step


@dataclass(frozen=True)
class Answer:
    """A body and its type."""

    body: bytes
    content_type: str = "application/json"


class ViewServer(ThreadingHTTPServer):
    """Serves one ``Session``.

    Attributes:
        session: what can be asked for.
        token: of this run; whoever has it may ask.
        url: to open in a browser; the token stands behind the #, which browsers do not send.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, session: Session, *, port: int = 0) -> None:
        """``port``: 0 for one that is free.

        Raises:
            OSError: the port is taken.
        """
        self.session = session
        self.token = secrets.token_urlsafe(32)
        self.work = LatestWins()
        page = files("braindino.viewer").joinpath("page")
        self.page = {
            address: Answer(page.joinpath(name).read_bytes(), content_type)
            for address, (name, content_type) in PAGE_FILES.items()
        }
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}; give another --port, or 0 for any that is free") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tells of what failed, but not of a page that was closed while an answer was on its way."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/#{self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version = "braindino"
    sys_version = ""
    timeout = SECONDS_TO_SEND

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _refuse_method(self) -> None:
        self._answer(self.command)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses of scans are nobody's business, and errors are told elsewhere."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself (a request that is no HTTP), in our form."""
        status = HTTPStatus(code)
        self._send_error(RequestError(status, message or status.phrase, next_step="Use the page of this server."))

    def _answer(self, method: str) -> None:
        try:
            answer = self._route(method)
        except RequestError as error:
            self._send_error(error)
        except SupersededError:
            what = "A newer click came while this one waited."
            self._send_error(RequestError(HTTPStatus.CONFLICT, what, where=self.path))
        except (ValueError, OSError) as error:
            # The messages of the core say what, where and what to do.
            self._send_error(RequestError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)))
        except Exception as error:
            traceback.print_exc()
            what = f"The viewer failed ({type(error).__name__})."
            step = "The terminal where `braindino view` runs shows the details; report them."
            self._send_error(RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, what, where=self.path, next_step=step))
        else:
            self._send(HTTPStatus.OK, answer)

    def _route(self, method: str) -> Answer:
        self._check_origin()
        address = urlsplit(self.path).path
        if address in self.server.page:
            self._check_method(method, "GET")
            return self.server.page[address]
        self._check_token()
        words = address.split("/")[1:]
        if words[0] != "api":
            raise self._unknown(address)
        if words[1:] == ["scene"]:
            self._check_method(method, "GET")
            return _json(self.server.session.scene())
        if len(words) == 3 and words[1] == "scans":
            self._check_method(method, "GET")
            return _json(self.server.session.scan_facts(self._known(words[2])))
        if len(words) == 4 and words[1] == "scans" and words[3] in self.server.session.FILES:
            self._check_method(method, "GET")
            content = self.server.session.file(self._known(words[2]), words[3])
            if content is None:
                raise self._unknown(address)
            return Answer(content, "application/octet-stream")
        if len(words) == 4 and words[1] == "thumbnails" and words[3].isascii() and words[3].isdigit():
            self._check_method(method, "GET")
            return Answer(self.server.session.thumbnail(self._known(words[2]), int(words[3][:6])), "image/png")
        works: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "similarity": self.server.session.similarity,
            "neighbours": self.server.session.neighbours,
        }
        if len(words) == 2 and words[1] in works:
            self._check_method(method, "POST")
            question = self._read_json()
            self._known(question.get("scan"))
            with self.server.work.turn(words[1]):
                try:
                    return _json(works[words[1]](question))
                except OutsideError as error:
                    return _json({"outside": str(error)})
        raise self._unknown(address)

    def _check_origin(self) -> None:
        port = self.server.server_port
        hosts = {f"{name}:{port}" for name in NAMES}
        host = self.headers.get("Host", "")
        if host not in hosts:
            raise RequestError(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"Host {host!r}: this server answers to {' and '.join(sorted(hosts))} only.",
                next_step="Open the address that `braindino view` printed.",
            )
        origin = self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site")
        if (origin is not None and origin != f"http://{host}") or site not in (None, "same-origin", "none"):
            raise RequestError(
                HTTPStatus.FORBIDDEN,
                f"A request that another page began (origin {origin!r}, site {site!r}).",
                next_step="Open the address that `braindino view` printed in a tab of its own.",
            )

    def _check_token(self) -> None:
        token = self.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise RequestError(
                HTTPStatus.UNAUTHORIZED,
                "The token of this run is missing or wrong.",
                where=TOKEN_HEADER,
                next_step="Open the address that `braindino view` printed: the token stands behind the #.",
            )

    def _check_method(self, found: str, expected: str) -> None:
        if found != expected:
            raise RequestError(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{found} is not answered here.", where=self.path, next_step=expected
            )

    def _known(self, key: object) -> str:
        if not isinstance(key, str) or key not in self.server.session.shelf.sources:
            raise RequestError(
                HTTPStatus.NOT_FOUND,
                "No scan has this key.",
                where=str(key)[:64],
                next_step="Reload the page: the viewer may have been started anew with other scans.",
            )
        return key

    def _unknown(self, address: str) -> RequestError:
        return RequestError(
            HTTPStatus.NOT_FOUND, "There is nothing at this address.", where=address[:200], next_step="Reload the page."
        )

    def _read_json(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or self.headers.get("Transfer-Encoding"):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "A body needs a Content-Length.", where=self.path)
        if int(length[:10]) > MAX_BODY_BYTES:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"A body of {length[:10]} bytes; expected at most {MAX_BODY_BYTES}.",
                where=self.path,
            )
        if self.headers.get_content_type() != "application/json":
            raise RequestError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected a body of type application/json.", where=self.path
            )
        try:
            content = json.loads(self.rfile.read(int(length)))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"The body is no JSON ({error}).", where=self.path) from error
        if not isinstance(content, dict):
            raise RequestError(HTTPStatus.BAD_REQUEST, "The body is no JSON object.", where=self.path)
        return content

    def _send_error(self, error: RequestError) -> None:
        # The body of a refused request was not read: what follows on this connection would be taken for a request.
        self.close_connection = True
        content = {"error": {"what": error.what, "where": error.where, "next": error.next_step}}
        self._send(error.status, _json(content))

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, POST")
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content, allow_nan=False).encode())
