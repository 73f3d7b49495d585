import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from pipeline.report.records import Comparison
from tests.support import small_world
from tests.support.small_world import compared

SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        message = "chromium is missing; sudo apt-get install -y chromium brings it"
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three, one that shares a member's painter, one interrupted, one killed, one that failed."""
    outputs = tmp_path_factory.mktemp("compared")
    for number, weight in enumerate((0.0, 0.1, 0.3)):
        overrides = ["run.name=trial", f"stage.painter.weight={weight:g}"]
        small_world.run(outputs, f"trial.{number}", group="trial", overrides=overrides, weight=weight)
    small_world.run(outputs, "again", weight=0.1)
    small_world.run(outputs, "paused", weight=0.7, stops_at=25)
    small_world.run(outputs, "broken", weight=0.9, fails_at=12, note=small_world.HARM)
    killed = small_world.work_of(small_world.run(outputs, "killed", weight=0.8, stops_at=15), "painter")
    # What SIGKILL leaves: a last word that grows old, and a row that is cut short.
    progress = json.loads((killed / "progress.json").read_text())
    (killed / "progress.json").write_text(json.dumps(progress | {"phase": "working", "updated_at": 1.0}))
    with (killed / "metrics.jsonl").open("a") as rows:
        rows.write('{"samples_seen": 128, "train/err')
    return outputs


@pytest.fixture(scope="session")
def trial(outputs: Path) -> Comparison:
    return compared(outputs, "sweep:trial")
