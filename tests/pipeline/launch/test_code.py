"""What is submitted runs the code that was submitted, in real processes."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import UserError
from pipeline.launch.launcher import StageOutcome
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.code import RECORD, current_code, snapshot
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.plan import Plan, plan_run
from pipeline.workflow.progress import Outcome, read_failure
from pipeline.workflow.runs import read_run
from tests.support import ROOT
from tests.support.fakes import run_config

PACKAGE = {
    "__init__.py": "",
    "catalog.py": """
from pipeline.config import Settings
from pipeline.workflow.declaration import Catalog, StageDeclaration


class PaintSettings(Settings):
    stops: bool = False


PAINT = StageDeclaration(version=1, settings=PaintSettings, run="own.painting.work:run", output="painting")
CATALOG = Catalog({"paint": PAINT})
""",
    "painting/__init__.py": "",
    "painting/work.py": """
from pipeline.errors import StageInterrupted
from pipeline.training.context import StageContext, StageResult

SHADE = 1


def run(context: StageContext) -> StageResult:
    checkpoint = context.work / "checkpoints" / "samples-000000000008.json"
    if context.settings.stops and not checkpoint.exists():
        checkpoint.parent.mkdir()
        checkpoint.write_text("{}")
        raise StageInterrupted("stopped")
    return StageResult(metrics={"shade": SHADE})
""",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's package of stages, beside where the commands are typed."""
    package = tmp_path / "project" / "own"
    for name, content in PACKAGE.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    monkeypatch.chdir(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(package.parent)
    yield package
    for name in ("own", "own.catalog"):
        sys.modules.pop(name, None)  # the next one is another
    current_code.cache_clear()


def planned(outputs: Path, run: str = "trial", **settings: Any) -> Plan:
    """As a new command plans it."""
    current_code.cache_clear()
    stages = {"paint": {"kind": "paint", **settings}}
    config = run_config(outputs, stages, catalog="own.catalog:CATALOG")
    return plan_run(config.model_copy(update={"run": config.run.model_copy(update={"name": run})}))


def started(plan: Plan, *, accepts_code: bool = False) -> StageOutcome:
    (outcome,) = start([plan], Display(Console(file=io.StringIO())), waits=True, accepts_code=accepts_code)
    return outcome


def made(plan: Plan) -> Artifact:
    artifact = plan.store.find("paint", plan.stages[0].fingerprint or "")
    assert artifact is not None
    return artifact


def edit(own: Path, before: str = "SHADE = 1", after: str = "SHADE = 2") -> None:
    file = own / "painting" / "work.py"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


def test_a_stage_runs_the_code_that_it_was_submitted_with_and_its_artifact_has_the_record(own: Path, tmp_path: Path):
    plan = planned(tmp_path / "outputs")
    edit(own)
    assert started(plan).outcome is Outcome.FINISHED
    artifact = made(plan)
    assert artifact.manifest.metrics == {"shade": 1}
    record = json.loads((artifact.path / RECORD).read_text())
    assert record["digest"] == plan.code.digest == read_run(plan.store.outputs, "trial").code
    assert {"own/painting/work.py", "pipeline/training/worker.py"} <= record["files"].keys()
    assert {"torch", "unclip"} <= record["packages"].keys()
    assert record["diff"].keys() == ({ROOT.name} if (ROOT / ".git").exists() else set())
    assert record["before"] == []


def test_snapshots_are_shared_between_runs_and_are_others_after_a_change(own: Path, tmp_path: Path):
    first, second = (planned(tmp_path, name) for name in ("a", "b"))
    assert first.code.keep(tmp_path) == second.code.keep(tmp_path) == snapshot(tmp_path, first.code.digest)
    edit(own)
    third = planned(tmp_path)
    assert third.code.keep(tmp_path) != snapshot(tmp_path, first.code.digest)
    assert {each.name for each in (tmp_path / "code").iterdir()} == {first.code.digest, third.code.digest}


def test_a_resume_on_other_code_says_what_differs_and_asks(own: Path, tmp_path: Path):
    before = planned(tmp_path, stops=True)
    assert started(before).outcome is Outcome.INTERRUPTED
    assert planned(tmp_path, stops=True).stages[0].reason == "from the checkpoint at 8 samples"
    edit(own)
    after = planned(tmp_path, stops=True)
    assert after.stages[0].reason.endswith("; other code than then: own/painting/work.py; run it with --accept-code")
    with pytest.raises(UserError, match=r"other code \(own/painting/work.py changed\); add --accept-code"):
        started(after)
    assert started(after, accepts_code=True).outcome is Outcome.FINISHED
    record = json.loads((made(after).path / RECORD).read_text())
    assert [each["digest"] for each in record["before"]] == [before.code.digest]


def test_a_module_that_changed_under_the_same_version_is_pointed_out(own: Path, tmp_path: Path):
    assert started(planned(tmp_path)).outcome is Outcome.FINISHED
    assert "changed since" not in planned(tmp_path).stages[0].reason
    (own / "catalog.py").write_text(f"{PACKAGE['catalog.py']}\n# of no stage's own folder\n")
    assert "changed since" not in planned(tmp_path).stages[0].reason
    edit(own)
    stage = planned(tmp_path).stages[0]
    assert stage.action.value == "reuse"
    assert (
        "own/painting/work.py changed since: if it makes something else now, raise the stage's version" in stage.reason
    )


def test_code_that_was_edited_ends_in_a_line_and_a_record_of_it_that_was_lost_is_written_anew(
    own: Path, tmp_path: Path
):
    plan = planned(tmp_path)
    place = plan.code.keep(tmp_path)
    file = place / "own" / "painting" / "work.py"
    file.write_text("SHADE = 3")
    with pytest.raises(UserError, match=re.escape(f"{file} is not as it was submitted; remove {place} and run again")):
        started(plan)
    (place / RECORD).unlink()
    file.write_text(PACKAGE["painting/work.py"])
    assert started(plan).outcome is Outcome.FINISHED


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_worker_refuses_code_that_was_edited_or_lost_since_it_was_submitted(own: Path, tmp_path: Path, is_gone: bool):
    """As where a queue starts a job again."""
    plan = planned(tmp_path)
    place = plan.code.keep(tmp_path)
    file = place / "own" / "painting" / "work.py"
    stage = plan.with_code().stages[0].frozen
    assert stage is not None
    frozen = write_frozen(stage)
    if is_gone:
        (place / RECORD).unlink()
    else:
        file.write_text(f"{PACKAGE['painting/work.py']}\n# edited\n")
    assert subprocess.run([sys.executable, "-m", "pipeline.training.worker", str(frozen.path)]).returncode != 0
    failure = read_failure(stage.work)
    assert failure is not None
    if is_gone:
        assert failure.message == f"{place / RECORD} is gone or damaged; remove {place} and run again"
    else:
        assert failure.message == f"{file} is not as it was submitted; remove {place} and run again"
    assert not list(tmp_path.glob("artifacts/*/*/manifest.json"))


def test_a_package_with_data_in_it_is_refused(own: Path, tmp_path: Path):
    with (own / "weights.bin").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(UserError, match=rf"{re.escape(str(own))} holds more than 64 MiB, .*; move data out of it"):
        planned(tmp_path)
