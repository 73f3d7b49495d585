"""Stores of small runs: published stages, work folders with checkpoints, owners, all without training anything."""

import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import OnDamage, RunSettings, StoreSettings
from pipeline.store.collect import find, take_away
from pipeline.store.removable import Found
from pipeline.store.trash import TRASH, empty_trash
from pipeline.workflow.frozen import StageKey, write_frozen
from pipeline.workflow.ownership import ATTEMPTS, Owner, acquire
from pipeline.workflow.plan import Plan, PlannedStage, plan_run
from pipeline.workflow.progress import CHECKPOINTS, LOG
from pipeline.workflow.runs import record_run
from tests.support.fakes import WORKFLOW, by_name, publish, run_config

Stages = dict[str, PlannedStage]
ALL_AGES: dict[str, Any] = {"older_than_s": 0.0, "keeps_checkpoints": False, "takes_caches": False}


def settings(width: int = 4, weight: float = 0.1) -> dict[str, dict[str, Any]]:
    """The small world's workflow with another encoder, or another decoder."""
    decoder = {**WORKFLOW["decoder"], "loss": {"weight": weight}}
    return {**WORKFLOW, "clip": {**WORKFLOW["clip"], "width": width}, "decoder": decoder}


def planned(outputs: Path, name: str, group: str | None = None, **changes: Any) -> Plan:
    config = run_config(outputs, settings(**changes), run=RunSettings(name=name, group=group))
    return plan_run(config, (f"run.name={name}",))


def record(outputs: Path, name: str, group: str | None = None, **changes: Any) -> Stages:
    """Record a run; its stages."""
    plan = planned(outputs, name, group, **changes)
    record_run(plan)
    return by_name(plan)


def finish(stages: Iterable[PlannedStage]) -> None:
    """Publish stages, with what they left in their work folders."""
    for stage in stages:
        begin([stage])
        publish(stage)


def begin(stages: Iterable[PlannedStage]) -> None:
    """Leave what a start of each stage leaves: the frozen stage, a log and a checkpoint."""
    for stage in stages:
        assert stage.frozen is not None
        write_frozen(stage.frozen)
        checkpoint = stage.frozen.work / CHECKPOINTS / "samples-000000000008.ckpt"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "weights").write_bytes(bytes(5000))
        checkpoint.with_suffix(".json").write_text(json.dumps({"samples_seen": 8, "elapsed_s": 1.0, "files": {}}))
        (stage.frozen.work / LOG).write_text("a line\n")


def own(stage: PlannedStage) -> Owner:
    """Work on it in this process, until `release`: its first sign of life is there, the next one in many minutes."""
    assert stage.frozen is not None
    owner = acquire(stage.frozen.work, 3600.0, threading.Event())
    while not (stage.frozen.work / ATTEMPTS / f"{owner.attempt:06}.alive").read_bytes():
        time.sleep(0.001)
    return owner


def key_of(stage: PlannedStage) -> StageKey:
    assert stage.fingerprint is not None
    return stage.name, stage.fingerprint


def keys(stages: Stages, *names: str) -> set[StageKey]:
    """The keys of these stages; of all without names."""
    return {key_of(stages[name]) for name in names or stages}


def with_inputs(stages: Stages, name: str) -> set[StageKey]:
    """A stage, what it was made from, and what that was made from."""
    found = {key_of(stages[name])}
    for upstream in stages[name].upstream:
        found |= with_inputs(stages, upstream)
    return found


def there(outputs: Path, tree: str = "artifacts", below: str = "") -> set[StageKey]:
    """The stages that have something there: an artifact, a work folder, or what is `below` it."""
    found = {(path.parent.name, path.name): path for path in (outputs / tree).glob("*/*") if len(path.name) == 64}
    return {key for key, path in found.items() if (path / below).exists()}


def contents(outputs: Path, trees: Sequence[str] = ("artifacts", "work", "runs")) -> dict[str, bytes]:
    """Every file of a store."""
    files = [path for tree in trees for path in (outputs / tree).rglob("*") if path.is_file()]
    return {str(path.relative_to(outputs)): path.read_bytes() for path in files}


def collect(outputs: Path, **changes: Any) -> Found:
    """`unclip gc --older-than 0m --delete`; what it found."""
    found = find(outputs, {}, **{**ALL_AGES, **changes})
    done = take_away(outputs, found.going, {})
    assert empty_trash(outputs) == []
    assert (list(done.going), list(done.staying)) == (list(found.going), [])
    return found


@contextmanager
def stopped_after(steps: int) -> Iterator[threading.Event]:
    """Stop what is done inside as Ctrl-C would, after so many renames into a trash and half deletions there.

    The event says whether it was.
    """
    stopped, left = threading.Event(), steps
    rename, rmtree = Path.rename, shutil.rmtree

    def step() -> None:
        nonlocal left
        if left == 0:
            stopped.set()
            raise KeyboardInterrupt
        left -= 1

    def rename_or_stop(path: Path, target: Path) -> Path:
        if TRASH in target.parts:
            step()
        return rename(path, target)

    def remove_half_or_all(path: Path, *arguments: Any, **named: Any) -> None:
        if TRASH in path.parts:
            next(each for each in path.rglob("*") if each.is_file()).unlink(missing_ok=True)
            step()
        rmtree(path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_stop)
        patch.setattr(shutil, "rmtree", remove_half_or_all)
        try:
            yield stopped
        except KeyboardInterrupt:
            assert stopped.is_set()


def flip(file: Path) -> None:
    """Change the last bit of every byte of it."""
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def planned_where(outputs: Path, on_damage: OnDamage) -> Plan:
    """The usual run, where damage is met so."""
    return plan_run(run_config(outputs, settings(), store=StoreSettings(on_damage=on_damage)))
