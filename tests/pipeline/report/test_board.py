"""`unclip board`, in headless Chromium and by hand."""

import argparse
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pipeline.board.command import BoardServer, make_server
from pipeline.board.content import Content
from pipeline.errors import UserError
from tests.support import small_world


@contextmanager
def served(outputs: Path, *runs: str, host: str = "127.0.0.1") -> Iterator[BoardServer]:
    with make_server(argparse.Namespace(outputs=outputs, runs=list(runs), port=0, host=host)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_shows_what_runs_now_and_takes_in_what_is_new_as_the_reader_left_the_page(browser: Browser, tmp_path: Path):
    small_world.run(tmp_path, "first", weight=0.1)
    small_world.run(tmp_path, "paused", weight=0.7, stops_at=25)
    with served(tmp_path) as server:
        context = browser.new_context()
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        now = page.locator("#now-tables").inner_text()
        assert "run paused" in now
        assert "interrupted" in now
        assert "run first" not in now
        assert page.locator(".results tbody tr").count() == 2
        page.locator("#all-metrics").check()
        page.locator("#metric-filter").fill("error")
        small_world.run(tmp_path, "later", weight=0.9)
        page.locator(".results tbody tr").nth(2).wait_for(timeout=60_000)
        assert page.locator("#all-metrics").is_checked()
        assert page.locator("#metric-filter").input_value() == "error"
        context.close()
        assert complaints == []


def test_what_is_damaged_while_it_is_open_is_on_the_page_that_is_made_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small_world.run(tmp_path, "first", weight=0.1)
    monkeypatch.setattr("pipeline.board.content.SECONDS_FRESH", 0.0)
    content = Content(tmp_path, [])
    assert "is missing" not in content.page()
    (artifact,) = (tmp_path / "artifacts" / "painter").iterdir()
    lost = next(path for path in artifact.iterdir() if path.name not in ("manifest.json", "metrics.jsonl"))
    lost.unlink()
    assert f"{lost.name} is missing" in content.page()


def test_what_changes_below_an_artifact_s_folder_makes_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_world.run(tmp_path, "first", weight=0.1)
    monkeypatch.setattr("pipeline.board.content.SECONDS_FRESH", 0.0)
    (artifact,) = (tmp_path / "artifacts" / "painter").iterdir()
    nested = artifact / "network" / "weights.safetensors"
    nested.parent.mkdir()
    nested.write_bytes(b"1234")
    content = Content(tmp_path, [])
    before = content.now().version
    assert content.now().version == before
    nested.write_bytes(b"12")
    assert content.now().version != before


def test_a_directory_in_the_place_of_an_artifact_s_rows_is_damage_and_no_end_of_the_board(tmp_path: Path):
    small_world.run(tmp_path, "first", weight=0.1)
    (artifact,) = (tmp_path / "artifacts" / "painter").iterdir()
    (artifact / "metrics.jsonl").unlink()
    (artifact / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in Content(tmp_path, []).page()


def test_nothing_but_the_page_and_its_news_is_served(tmp_path: Path):
    small_world.run(tmp_path, "first", weight=0.1)
    with served(tmp_path) as server:
        for path in ("..%2frun.json", "runs/first/run.json", "../../etc/passwd"):
            assert status_of(f"{server.url}{path}") == 404
        with urllib.request.urlopen(f"{server.url}now", timeout=30) as answer:
            assert "All that was started is finished." in json.loads(answer.read())["html"]


def test_a_browser_that_goes_away_before_its_answer_leaves_nothing_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    small_world.run(tmp_path, "first", weight=0.1)
    capfd.readouterr()
    with served(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", int(server.server_address[1]))) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
            # Closed so, it is reset at once, and not when all was read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert status_of(server.url) == 200
        # The page is made once; the thread of the first question writes before or right after that.
        while any("process_request_thread" in each.name for each in threading.enumerate()):
            time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_a_page_of_another_name_that_leads_here_gets_nothing(tmp_path: Path):
    with served(tmp_path) as server:
        assert status_of(server.url) == 200
        assert status_of(server.url, Host="evil.example:80") == 403


def test_other_addresses_ask_for_the_token(tmp_path: Path):
    small_world.run(tmp_path, "first", weight=0.1)
    with served(tmp_path, host="0.0.0.0") as server:
        port = server.server_address[1]
        assert server.token is not None
        assert server.token in server.url
        here = f"http://127.0.0.1:{port}/"
        assert status_of(here) == status_of(f"{here}?token=x") == status_of(here, Cookie="unclip-board=x") == 403
        assert status_of(f"{here}now", Cookie=f"unclip-board={server.token}") == 200
        assert status_of(f"{here}?token={server.token}") == 200


def test_a_store_without_runs_says_so_until_there_is_one(tmp_path: Path):
    with served(tmp_path) as server:
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            assert "there is no run yet" in answer.read().decode()
        small_world.run(tmp_path, "first", weight=0.1)
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            assert '<section id="results"' in answer.read().decode()


def test_an_address_that_is_taken_is_refused_in_a_line(tmp_path: Path):
    with served(tmp_path) as server:
        port = server.server_address[1]
        taken = argparse.Namespace(outputs=tmp_path, runs=[], port=port, host="127.0.0.1")
        with pytest.raises(UserError, match=f"--port {port} cannot be listened at .*; give another --port"):
            make_server(taken)
    none = argparse.Namespace(outputs=tmp_path, runs=[], port=0, host="no.such.invalid")
    with pytest.raises(UserError, match=r"--host no\.such\.invalid is no address of this machine .*; give another"):
        make_server(none)
