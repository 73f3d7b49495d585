"""Who is told of a failure and of an end, by a real program and a real server."""

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import NotifySettings
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.notify import tell_of_end
from pipeline.workflow.plan import Plan, plan_run
from tests.support import ROOT
from tests.support.halves import plan_halves

WRITE = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')"


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What the server at the address in `$HOOK` was sent."""
    found: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield found
    server.shutdown()


def planned(outputs: Path, command: list[str], *, fails: bool) -> Plan:
    config = plan_halves(outputs, "trial", {"left": {"fails": fails}}).config
    return plan_run(config.model_copy(update={"notify": NotifySettings(command=command, webhook="$HOOK")}))


def test_a_failure_and_the_end_are_told_once_each_and_nothing_of_a_config_reaches_a_shell(
    tmp_path: Path, posted: list[dict[str, str]]
):
    log = tmp_path / "$(touch pwned) `x`"
    display = Display(Console(file=io.StringIO()))
    start([planned(tmp_path, [sys.executable, "-c", WRITE, str(log)], fails=True)], display, waits=True)
    written = [json.loads(line) for line in log.read_text().splitlines()]
    assert written == posted
    assert [(each["event"], each["run"]) for each in posted] == [("failure", "trial"), ("end", "trial")]
    assert posted[0]["stage"] == "left"
    assert posted[0]["cause"] == "settings"
    assert "left was to fail" in posted[0]["text"]
    assert posted[1]["text"] == "unclip: trial has ended: 1 finished, 1 failed, 1 skipped"


def test_who_cannot_be_told_costs_a_line_and_a_queue_tells_of_the_end_once(
    tmp_path: Path,
    posted: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    made = planned(tmp_path, ["no such program"], fails=False)
    start([made], Display(Console(file=io.StringIO())), waits=True)
    assert [each["event"] for each in posted] == ["end"]
    frozen = made.stages[-1].frozen
    assert frozen is not None
    tell_of_end(frozen)
    tell_of_end(frozen)
    assert [each["text"] for each in posted[1:]] == ["unclip: every stage of trial is finished"]
    monkeypatch.setenv("HOOK", "file:///etc/passwd")
    start([made], Display(Console(file=io.StringIO())), waits=True)
    monkeypatch.delenv("HOOK")
    start([made], Display(Console(file=io.StringIO())), waits=True)
    said = capsys.readouterr().out
    assert said.count("notify.command was not told of this") == 4
    assert "notify.webhook was not told of this: ValueError" in said
    assert "notify.webhook was not told of this: KeyError" in said
