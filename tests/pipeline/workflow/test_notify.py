"""Who is told of a failure and of an end, by a real program and a real server."""

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pipeline.config import NotifySettings
from pipeline.errors import UserError
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.notify import Event, tell, tell_of_end
from pipeline.workflow.plan import Plan, plan_run
from tests.support import ROOT
from tests.support.halves import plan_halves
from tests.support.tracked import wait_until

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


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that has a fault of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
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
    assert capsys.readouterr().out.count("notify.command was not told of this") == 2


def test_a_run_that_damage_keeps_from_starting_is_told_of(tmp_path: Path, posted: list[dict[str, str]]):
    made = planned(tmp_path, ["true"], fails=False)
    start([made], Display(Console(file=io.StringIO())), waits=True)
    (file,) = tmp_path.glob("artifacts/left/*/said.txt")
    file.write_text("flipped")
    with pytest.raises(UserError):
        start([plan_run(made.config)], Display(Console(file=io.StringIO())), waits=True)
    assert [each["event"] for each in posted] == ["end", "failure"]
    assert posted[1]["text"].startswith(f"unclip: trial did not start: stage left is blocked: {file}")


def test_an_address_that_is_none_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = planned(tmp_path, ["true"], fails=False)
    for address in ("file:///etc/passwd", None):
        if address is None:
            monkeypatch.delenv("HOOK", raising=False)
        else:
            monkeypatch.setenv("HOOK", address)
        with pytest.raises(UserError, match=r"notify\.webhook=\$HOOK: the variable holds no https:// address here"):
            start([made], Display(Console(file=io.StringIO())), waits=True)
    assert not (tmp_path / "starts").exists()


def test_what_is_told_and_does_not_answer_or_refuses_costs_a_line_and_leaves_no_process(
    tmp_path: Path, refusing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.workflow.notify._TIMEOUT_S", 3.0)
    pids = tmp_path / "pids"
    hangs = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '300']); "
        "open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"
    )
    settings = NotifySettings(command=[sys.executable, "-c", hangs, str(pids)], webhook=refusing)
    tell(settings, Event.END, "trial", "it has ended")
    said = capsys.readouterr().out
    assert "notify.command was not told of this: it took more than 3 s, and was ended" in said
    assert "notify.webhook was not told of this: it answered with status 500" in said
    assert refusing not in said
    wait_until(lambda: has_ended(int(pids.read_text())))  # SIGKILL takes effect when the kernel gets to it


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
