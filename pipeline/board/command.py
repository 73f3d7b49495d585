"""`unclip board`: serves the report to a browser."""

import argparse
import hmac
import ipaddress
import json
import socket
import sys
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_urlsafe
from urllib.parse import parse_qs, urlsplit

from pipeline.board.content import Content, page_without_runs
from pipeline.errors import UserError
from pipeline.report.select import select_runs
from pipeline.workflow.progress import EXIT_INTERRUPTED
from pipeline.workflow.sealed import warn

_COOKIE = "unclip-board"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def add_board_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip board` takes beside `--outputs`."""
    parser.add_argument("runs", nargs="*", metavar="run", help="runs as for unclip compare; without any, all there are")
    parser.add_argument("--port", type=int, default=8123, help="0 for one that is free (default: 8123)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="the address to listen at; any but this machine's own asks for the token in the line that is printed",
    )  # fmt: skip


def board(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises `UserError` where that address cannot be had."""
    with make_server(options) as server:
        try:
            select_runs(options.outputs, options.runs or ["*"])
        except UserError as error:
            warn(f"{error}; the board shows what comes as soon as it is there")
        print(f"board: {server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    return 0


def make_server(options: argparse.Namespace) -> "BoardServer":
    """A server that listens and does not serve yet. Raises `UserError` where that address cannot be had."""
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port} is no port; give 0 to {2**16 - 1}")
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return BoardServer(family, str(address[0]), int(address[1]), Content(options.outputs, options.runs))
    except socket.gaierror as error:
        raise UserError(
            f"--host {options.host} is no address of this machine ({error.strerror}); give another"
        ) from error
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port} cannot be listened at ({error.strerror}); "
            "give another --port, or --port 0 for one that is free"
        ) from error


class BoardServer(ThreadingHTTPServer):
    """Answers on one address. It has a token where other machines can ask."""

    daemon_threads = True

    def __init__(self, family: int, address: str, port: int, content: Content) -> None:
        self.address_family = socket.AddressFamily(family)
        super().__init__((address, port), _Handler)
        self.content = content
        self.token = None if ipaddress.ip_address(address).is_loopback else token_urlsafe(24)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing where a browser went away before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]

    @property
    def url(self) -> str:
        """What to open."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        query = f"?token={self.token}" if self.token else ""
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"


class _Handler(BaseHTTPRequestHandler):
    server_version = "unclip"

    @property
    def _board(self) -> BoardServer:
        assert isinstance(self.server, BoardServer)
        return self.server

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if not self._is_allowed(path.query):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "open the address that unclip board has printed\n")
        elif path.path == "/":
            try:
                text = self._board.content.page()
            except UserError as error:
                text = page_without_runs(error)
            self._answer(HTTPStatus.OK, "text/html", text)
        elif path.path == "/now":
            try:
                now = self._board.content.now()
                said = {"html": now.html, "version": now.version}
            except UserError as error:
                said = {"html": "", "version": str(error)}
            self._answer(HTTPStatus.OK, "application/json", json.dumps(said))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is / alone\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Nothing: the terminal is the user's."""

    def _is_allowed(self, query: str) -> bool:
        token = self._board.token
        if token is None:
            # Another site's page, whose name leads to this machine, has its own name here.
            return self.headers.get("Host", "").rpartition(":")[0] in _LOCAL_NAMES
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        given = [*parse_qs(query).get("token", []), *([cookie.value] if cookie else [])]
        return any(hmac.compare_digest(each.encode(), token.encode()) for each in given)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self._board.token and status is HTTPStatus.OK:
            self.send_header("Set-Cookie", f"{_COOKIE}={self._board.token}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        self.wfile.write(content)
