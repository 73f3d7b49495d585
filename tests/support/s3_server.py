"""A real S3 server (moto's) in a process of its own, and a front before it that counts requests and spoils some."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import fsspec.config
import pytest

# The server wants to see that a request is signed, and does not look whether it is signed well.
_SIGNED = "AWS4-HMAC-SHA256 Credential=me/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_NOT_FORWARDED = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Fault(Enum):
    """What the front does with a request in place of passing it on."""

    SERVER_ERROR = auto()
    SLOW_DOWN = auto()
    CUT = auto()
    RESET = auto()


_STATUS = {Fault.SERVER_ERROR: (500, "InternalError"), Fault.SLOW_DOWN: (503, "SlowDown")}


class Front(ThreadingHTTPServer):
    """Passes requests on to the server at `port`; of those for an object, the next ones meet `faults`."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind = port
        self.faults: list[Fault] = []
        self.fetched: list[str] = []
        self.held = threading.Event()
        self.held.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, path: str, content: bytes = b"") -> dict[str, str]:
        """Make a bucket, or an object in one; gives the answer's headers."""
        status, headers, answer = request(self.behind, "PUT", f"/{path}", content, {"Authorization": _SIGNED})
        assert status == 200, answer
        return dict(headers)


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        front = cast(Front, self.server)
        path = self.path.split("?")[0]
        fault = None
        if path.count("/") > 1 and not path.endswith("/"):
            front.fetched.append(path)
            fault = front.faults.pop(0) if front.faults else None
            assert front.held.wait(30)
        if fault is Fault.RESET:
            self.close_connection = True
            return
        if fault in _STATUS:
            status, code = _STATUS[fault]
            content = f"<Error><Code>{code}</Code><Message>try again</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], content, len(content))
            return
        passed = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        status, headers, content = request(front.behind, "GET", self.path, headers=passed)
        self._answer(status, headers, content[: len(content) // 2] if fault is Fault.CUT else content, len(content))

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _NOT_FORWARDED:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass


def request(
    port: int, method: str, path: str, content: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and content that the server at `port` of this machine answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, content or None, headers or {})
    answer = connection.getresponse()
    try:
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that is empty at first and ends with the block."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "Running on" in line:
                    break
            else:
                raise AssertionError(f"the server did not start: {''.join(said)}")
            # What it goes on to say is read, so that it never waits for it.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield int(said[-1].rsplit(":", 1)[1])
        finally:
            process.terminate()
            process.wait(10)


@contextmanager
def bucket(port: int, monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> Iterator[Front]:
    """The server with an empty bucket, `bucket`, to which the environment points; the outside is out of reach."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert request(port, "POST", "/moto-api/reset")[0] == 200
    with front_of(port) as front:
        for name, value in {
            "AWS_ENDPOINT_URL": front.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(nowhere / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(nowhere / "no-credentials"),
        }.items():
            monkeypatch.setenv(name, value)
        front.put("bucket")
        yield front


@contextmanager
def front_of(port: int) -> Iterator[Front]:
    """A front that serves until the block ends."""
    with Front(port) as front:
        threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield front
        finally:
            front.held.set()
            front.shutdown()
