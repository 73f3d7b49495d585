"""The stage `prepare` through the engine's entry point: any number of processes makes the same."""

import multiprocessing
from pathlib import Path

import pytest

from pipeline.data.prepared import read_prepared
from pipeline.data.splits import Split
from pipeline.workflow.progress import Outcome, read_failure, read_progress
from tests.support.processes import no_process_left, started_since
from tests.support.tiny_runs import TINY, failure_of, plan_stages, run_and_stop, run_stage_of, run_until

SOURCES = {
    "scenes": ["data.samples=150", "data.shard_samples=40"],
    "emoji": ["data=emoji", "data.max_glyphs=40", "data.image_size=24", "data.shard_samples=100"],
}
TWO = "trainer.cpu_threads=2"


def contents(directory: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("manifest.json", "metrics.jsonl")}


@pytest.mark.parametrize("source", SOURCES)
def test_one_and_two_processes_make_the_same_bytes(tmp_path: Path, source: str):
    base = TINY if source == "scenes" else ["tracking=none", "trainer.accelerator=cpu", "trainer.cpu_threads=1"]
    one, two = (
        run_until(tmp_path / threads, "prepare", *SOURCES[source], f"trainer.cpu_threads={threads}", base=base)
        for threads in ("1", "2")
    )
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert one.manifest.metrics == two.manifest.metrics
    assert len(list((one.path / "shards").iterdir())) > 2
    assert contents(one.path) == contents(two.path)


def test_of_several_captions_of_a_picture_a_showing_draws_one(tmp_path: Path):
    made = run_until(tmp_path, "prepare", *SOURCES["scenes"], "data.captions_each=3")
    alone = run_until(tmp_path, "prepare", *SOURCES["scenes"], "data.captions_each=1")
    several, one = (read_prepared(each.path) for each in (made, alone))
    rows = range(150)
    assert [several.caption(row) for row in rows] == [one.caption(row) for row in rows]
    assert [one.caption(row, 0.99) for row in rows] == [one.caption(row) for row in rows]
    others = sum(several.caption(row, 0.99) != several.caption(row) for row in rows)
    assert others > 100
    unseen = several.samples_in(Split.UNSEEN)
    assert all(several.caption(int(row), 0.99) == one.caption(int(row)) for row in unseen)


def test_a_stop_ends_all_processes_and_the_same_command_makes_it_whole(tmp_path: Path):
    frozen = plan_stages(tmp_path, "data.samples=2000", TWO)["prepare"]

    def has_begun() -> bool:
        progress = read_progress(frozen.work)
        return progress is not None and progress.samples_seen > 0

    with no_process_left():
        assert run_and_stop(frozen, when=has_begun) is Outcome.INTERRUPTED
    assert run_stage_of(frozen) is Outcome.FINISHED


def test_what_a_process_refuses_is_said_in_one_line(tmp_path: Path):
    refused = ["data.split_key=group"]
    said = [
        failure_of(tmp_path / threads, "prepare", *refused, f"trainer.cpu_threads={threads}") for threads in ("1", "2")
    ]
    assert said[0] == said[1]
    assert said[0].is_user_error
    assert "data.split_key group is no field of sample scene-00000000's JSON" in said[0].message
    assert "\n" not in said[0].message


def test_a_process_that_is_killed_is_told_of(tmp_path: Path):
    frozen = plan_stages(tmp_path, "data.samples=20000", TWO)["prepare"]

    before = multiprocessing.active_children()

    def kill_one() -> bool:
        for process in started_since(before)[:1]:
            process.kill()
        return False

    stage_ends = run_and_stop(frozen, when=kill_one)
    assert stage_ends is Outcome.FAILED
    failure = read_failure(frozen.work)
    assert failure is not None
    assert failure.message == (
        "stage prepare: a process that makes pictures was killed, perhaps for want of memory; run again, or with "
        "fewer: stage.prepare.trainer.cpu_threads below 2"
    )
