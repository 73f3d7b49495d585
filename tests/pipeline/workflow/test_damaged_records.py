"""Whatever bytes a file of a store holds: a reader gives the same answer, refuses in a line, or falls back with one."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.launch.slurm.jobs import JobRecord, latest_record, write_record
from pipeline.report.evaluations import evaluations_directory, new_evaluation, read_evaluations
from pipeline.tracking import wandb_record
from pipeline.tracking.sync import _lacks
from pipeline.tracking.tensorboard import TensorBoard
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.causes import Cause, End, read_ends, write_end
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.frozen import read_frozen, write_frozen
from pipeline.workflow.ownership import Vacancy
from pipeline.workflow.progress import Failure, read_failure, read_hardware, read_progress, write_failure
from pipeline.workflow.record import Replay, read_standing, resume
from pipeline.workflow.runs import config_with, read_run
from pipeline.workflow.sealed import NO_FILE, read_json, warn, write_json_atomically
from tests.support import small_world

RUN, PAUSED = "whole", "paused"
TRIALS = 15
NOT_READ = ("log.txt",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and one in progress, with every kind of record that a process reads back."""
    outputs = tmp_path_factory.mktemp("pristine") / "outputs"
    small_world.run(outputs, RUN, weight=0.1)
    plan = small_world.run(outputs, PAUSED, weight=0.7, stops_at=25)
    work = small_world.work_of(plan, "painter")
    for samples in (100, 200):
        directory = work / "checkpoints" / f"samples-{samples:012}.ckpt"
        directory.mkdir(parents=True)
        (directory / "trainer.pt").write_bytes(random.Random(samples).randbytes(200))
        values = {
            "samples_seen": samples,
            "files": {"trainer.pt": file_sha256(directory / "trainer.pt")},
            "elapsed_s": 1.5,
        }
        write_json_atomically(directory.with_suffix(".json"), values)
    for number in (1, 2):
        names = {"token": "t", "name": "n", "group": "g", "wanted_by": [PAUSED], "submitted_at": "now"}
        write_record(work, JobRecord(number=number, job_id=str(number), **names))
    wandb_record.write_record(work, wandb_record.WandbRecord("id", "project", None, PAUSED, "name", 1.0, sent=3))
    for start, cause in enumerate((None, Cause.DATA)):
        write_end(work, End("7", start, "node", cause))
    write_failure(work, Failure("it failed", is_user_error=True))
    write_frozen(next(stage.frozen for stage in plan.stages if stage.name == "painter" and stage.frozen))
    points = {"": {"clip_score": 0.5, "fid": None}}
    evaluation = {"made_at": "now", "data": "validation", "settings": {"samples": 4}, "points": points}
    write_json_atomically(new_evaluation(evaluations_directory(outputs, RUN), ""), evaluation)
    return outputs


@pytest.fixture
def restored(pristine: Path, tmp_path: Path) -> Callable[[], Path]:
    outputs = tmp_path / "outputs"

    def restore() -> Path:
        shutil.rmtree(outputs, ignore_errors=True)
        shutil.copytree(pristine, outputs)
        warn.cache_clear()
        return outputs

    return restore


def readers(outputs: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that reads a store, by name; each gives what can be compared."""
    store = ArtifactStore(outputs)
    (painting,) = (work for work in outputs.glob("work/painter/*") if (work / "checkpoints").exists())
    for name in (RUN, PAUSED):
        yield f"status {name}", lambda name=name: main(["status", name, "--outputs", str(outputs)])
        yield f"card {name}", lambda name=name: main(["card", name, "--outputs", str(outputs)])
        yield f"logs {name}", lambda name=name: main(["logs", name, "painter", "-n", "1", "--outputs", str(outputs)])
        yield f"read_run {name}", lambda name=name: read_run(outputs, name)
    yield "compare", lambda: main(["compare", "*", "--json", "--outputs", str(outputs)])
    yield "report", lambda: main(["compare", "*", "--output", str(outputs / "r.html"), "--outputs", str(outputs)])
    yield "evaluations", lambda: [asdict(each) for each in read_evaluations(outputs, RUN)]
    yield "config_with", lambda: config_with(outputs, PAUSED, "painter", painting.name)
    yield "checkpoint", lambda: latest_checkpoint(painting)
    yield "job", lambda: latest_record(painting)
    yield "ends", lambda: read_ends(painting)
    yield "wandb", lambda: wandb_record.read_record(painting)
    yield "lacks", lambda: _lacks(painting)
    yield "frozen", lambda: [read_frozen(path) for path in sorted(painting.glob("frozen/*.json"))]
    yield "vacancy", lambda: [Vacancy(work, 60.0).is_free for work in sorted(outputs.glob("work/*/*"))]
    yield "progress", lambda: (read_progress(painting), read_failure(painting), read_hardware(painting))
    yield "rows", lambda: read_standing(painting)
    yield "replay", lambda: list(Replay(painting).new())
    yield "tensorboard", lambda: TensorBoard(painting, read_standing(painting)).close()
    yield "resume", lambda: resume(painting, 100)
    for path in sorted(outputs.glob("artifacts/*/*/manifest.json")):
        stage, fingerprint = path.parent.parent.name, path.parent.name
        yield f"open {stage}", lambda key=(stage, fingerprint): store.open(*key)
        yield f"damage {stage}", lambda key=(stage, fingerprint): raised(store.known_damage(*key))
    yield "verify", lambda: main(["verify", "--all", "--outputs", str(outputs)])


def raised(damage: UserError | None) -> None:
    if damage is not None:
        raise damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with some bytes flipped, cut off, put in or added, or with others altogether."""
    at, some = rng.randrange(len(content) + 1), rng.randbytes(rng.choice([1, 1, 3, 40]))
    match rng.choice(["flip", "flip", "flip", "cut", "insert", "append", "replace", "zeros"]):
        case "flip" if content:
            at = rng.randrange(len(content))
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + some + content[at:]
        case "append":
            return content + some
        case "zeros":
            return content[:at] + bytes(len(content) - at)
    return some


STRANGE = (None, True, -1, 1e308, float("inf"), float("nan"), 10**400, "", "\0", "x" * 300, [], {}, [None], {"": None})


def with_another_value(values: Any, rng: random.Random) -> Any:
    """JSON values with one of them, at any depth, replaced by something else, or left out."""
    if isinstance(values, dict) and values and rng.random() < 0.9:
        key = rng.choice(list(values))
        if rng.random() < 0.1:
            return {name: value for name, value in values.items() if name != key}
        return {**values, key: with_another_value(values[key], rng)}
    if isinstance(values, list) and values and rng.random() < 0.8:
        at = rng.randrange(len(values))
        return [*values[:at], with_another_value(values[at], rng), *values[at + 1 :]]
    return rng.choice(STRANGE)


def answers(outputs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """What each reader gives, and what it says to people beside that."""
    found = {}
    for name, read in readers(outputs):
        warn.cache_clear()
        refusal = ""
        try:
            given = repr(read())
        except UserError as error:
            given, refusal = "", str(error)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            given, refusal = "", str(error)
        shown = capsys.readouterr()
        assert len(refusal.splitlines()) <= 1
        found[name] = f"{given}\n{shown.out}", refusal + shown.err
    return found


@pytest.mark.parametrize("seed", range(2))
def test_bytes_that_changed_are_noticed_or_change_no_answer(
    restored: Callable[[], Path], seed: int, capsys: pytest.CaptureFixture[str]
):
    before = answers(restored(), capsys)
    rng = random.Random(seed)
    for trial in range(TRIALS):
        outputs = restored()
        records = [path for path in sorted(outputs.rglob("*")) if path.is_file() and path.name not in NOT_READ]
        path = rng.choice([each for each in records if each.suffix in (".json", ".jsonl")] if trial % 2 else records)
        content = path.read_bytes()
        now = damaged(content, rng)
        if path.suffix == ".jsonl" and content.startswith(now[: now.rfind(b"\n") + 1]):
            continue  # as a kill at an earlier moment could have left it
        path.write_bytes(now)
        for name, (answer, said) in answers(outputs, capsys).items():
            is_told = said or "damaged" in answer
            assert answer == before[name][0] or is_told, (name, path, content, path.exists() and path.read_bytes())


@pytest.mark.parametrize("seed", range(2))
def test_records_from_before_there_were_digests_may_hold_any_values(
    restored: Callable[[], Path], seed: int, capsys: pytest.CaptureFixture[str]
):
    rng = random.Random(seed)
    for _ in range(TRIALS):
        outputs = restored()
        path = rng.choice([each for each in sorted(outputs.rglob("*.json*")) if each.is_file()])
        if path.suffix == ".jsonl":
            lines = path.read_bytes().splitlines()
            at = rng.randrange(len(lines))
            values = {name: each for name, each in json.loads(lines[at]).items() if name != "crc32"}
            lines[at] = json.dumps(with_another_value(values, rng)).encode()
            path.write_bytes(b"\n".join(lines) + b"\n")
        else:
            path.write_text(json.dumps(with_another_value(read_json(path), rng)))
        answers(outputs, capsys)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [Path.mkdir, a_pipe, a_link_to_itself])
def test_what_is_in_the_place_of_a_file_is_noticed_or_changes_no_answer_and_nobody_waits_for_it(
    restored: Callable[[], Path], make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    before = answers(restored(), capsys)
    rng = random.Random(make.__name__)
    for _ in range(TRIALS):
        outputs = restored()
        path = rng.choice([each for each in sorted(outputs.rglob("*")) if each.is_file() and each.name not in NOT_READ])
        path.unlink()
        make(path)
        for name, (answer, said) in answers(outputs, capsys).items():
            is_told = said or "damaged" in answer
            assert answer == before[name][0] or is_told, (name, path)


def test_what_is_in_a_record_s_way_is_named_and_nothing_is_left_beside_it(tmp_path: Path):
    record = tmp_path / "run.json"
    record.mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        write_json_atomically(record, {"a": 1})
    assert raised.value.filename == str(record)
    assert list(tmp_path.iterdir()) == [record]
