"""A small stand-in for the W&B server: it speaks what the client asks of it to log, resume and sync runs."""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


class Health(Enum):
    """`BROKEN` answers every request with status 500; `SILENT` with nothing, until it is well again."""

    WELL = auto()
    BROKEN = auto()
    SILENT = auto()


@dataclass
class ServerRun:
    """What the server has of a run: its rows by their place, and the statuses that it was ended with."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict)
    """What the client said of it when it was opened first."""
    ended_with: list[int] = field(default_factory=list)
    preempted: int = 0
    is_known: bool = False

    def axis(self, name: str) -> list[int]:
        """`samples_seen` of the rows that have this column, in the order in which they are there."""
        return [row["samples_seen"] for row in self.rows if name in row]


class WandbServer:
    """Runs by id. `address` is the WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.used: list[str] = []
        """Names of artifacts that runs asked for as their inputs."""
        self.secrets: list[str] = []
        self.rows_to_take: int | None = None
        """After so many rows of a run the server is broken, and the client does not hear of the last ones."""
        self._health = Health.WELL
        self._changed = Event()
        handler = type("_BoundHandler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        setattr(self.http, "handle_error", lambda *_: None)  # noqa: B010 - clients that are killed hang up
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    @property
    def health(self) -> Health:
        return self._health

    @health.setter
    def health(self, health: Health) -> None:
        self._health = health
        self._changed.set()
        self._changed = Event()

    def wait_for_change(self) -> None:
        self._changed.wait()

    def run(self, name: str) -> ServerRun:
        return self.runs.setdefault(name, ServerRun())

    @property
    def only_run(self) -> ServerRun:
        (run,) = self.runs.values()
        return run


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server in a thread, for as long as the context lasts."""
    server = WandbServer()
    thread = Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.health = Health.WELL
        server.http.shutdown()
        thread.join()
        server.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""

    def do_GET(self) -> None:
        if self._is_well():
            self._answer({})

    def do_PUT(self) -> None:
        body = self._body()
        if self._is_well():
            self.owner.files[self.path.removeprefix("/up/")] = body
            self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if not self._is_well():
            return
        self.owner.secrets.append(self.headers.get("Authorization") or "")
        if self.path.startswith("/sdk/"):  # telemetry
            self._answer({})
            return
        asked = json.loads(body or b"{}")
        if "file_stream" in self.path:
            self._take_rows(self.owner.run(self.path.split("/")[-2]), asked)
            if self._is_well():
                self._answer({})
        else:
            self._graphql(asked.get("query", ""), asked.get("variables") or {})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _is_well(self) -> bool:
        if self.owner.health is Health.BROKEN:
            self._answer({"errors": [{"message": "down"}]}, 500)
        if self.owner.health is Health.SILENT:
            self.owner.wait_for_change()
            self.close_connection = True
            return False
        return self.owner.health is Health.WELL

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take_rows(self, run: ServerRun, asked: dict[str, Any]) -> None:
        for name, part in (asked.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in part["content"]]
                assert part["offset"] <= len(run.rows), "a gap"
                run.rows[part["offset"] : part["offset"] + len(rows)] = rows
                if self.owner.rows_to_take is not None and len(run.rows) > self.owner.rows_to_take:
                    del run.rows[self.owner.rows_to_take :]
                    self.owner.health = Health.BROKEN
                    return
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if asked.get("complete") is not None:
            run.ended_with.append(asked.get("exitcode") or 0)
        run.preempted += bool(asked.get("preempting"))

    def _graphql(self, query: str, values: dict[str, Any]) -> None:
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = named.group(1) if named else ""
        answers = {
            "UpsertBucket": self._upsert,
            "Viewer": self._viewer,
            "ServerFeaturesQuery": self._viewer,
            "CreateRunFiles": self._files,
            "CreateArtifact": self._artifact,
            "CreateArtifactManifest": self._manifest,
            "CreateArtifactFiles": self._artifact_files,
            "CommitArtifact": lambda _values: {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}},
        }
        if "ResumeStatus" in operation:
            self._answer({"data": self._resume_status(values)})
        elif operation in answers:
            self._answer({"data": answers[operation](values)})
        else:
            if operation == "ArtifactType":
                self.owner.used.append(values["name"])
            self._answer({"errors": [{"message": f"{operation} is not spoken here"}], "data": None})

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.owner.run(values["name"])
        is_new, run.is_known = not run.is_known, True
        run.begun = run.begun or values
        if values.get("config"):
            run.config = json.loads(values["config"])
        project = {"id": "p", "name": values.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "x", "name": values["name"], "displayName": "n", "description": None, "sweepName": None,
            "config": json.dumps(run.config), "project": project, "historyLineCount": len(run.rows),
            "summaryMetrics": json.dumps(run.summary), "runId": 1,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _resume_status(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.owner.runs.get(values["name"])
        bucket = None
        if run is not None and run.is_known:
            bucket = {
                "id": "x", "name": values["name"], "displayName": "n", "logLineCount": 0, "eventsLineCount": 0,
                "historyLineCount": len(run.rows), "summaryMetrics": json.dumps(run.summary), "eventsTail": "[]",
                "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]), "tags": [],
                "config": json.dumps({key: {"value": each.get("value")} for key, each in run.config.items()}),
                "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _viewer(self, _values: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _artifact(self, values: dict[str, Any]) -> dict[str, Any]:
        self.owner.artifacts.append(values["input"])
        sequence = {"id": "s", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": sequence}}}

    def _artifact_files(self, values: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "id": "f", "name": each["name"], "displayName": each["name"], "uploadUrl":
                f"{self.owner.address}/up/{each['name']}", "uploadHeaders": [], "artifact": {"id": "a"},
                "storagePath": each["name"], "uploadMultipartUrls": None,
            }
            for each in values["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _manifest(self, _values: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.owner.address}/up/manifest-{len(self.owner.artifacts)}"
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _files(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.owner.address}/up/{name}"} for name in values.get("files", [])]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
