"""What is needed of a store, and by whom: the one answer for `unclip du`, `gc` and `rm`.

A run needs its stages and, through their inputs, what these were made from. What an earlier config of a run made is
not needed, unless the run is pinned. What is at work needs its stage and its inputs, whatever the records say.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.launcher import launchers
from pipeline.workflow.artifacts import MANIFEST, ArtifactStore
from pipeline.workflow.frozen import FROZEN, FrozenStage, StageKey, read_frozen
from pipeline.workflow.in_use import commands_at_work
from pipeline.workflow.ownership import at_work
from pipeline.workflow.runs import (
    PIN,
    RunRecord,
    earlier_records,
    keys_of,
    lost_earlier_records,
    read_run,
    require_runs,
    run_directory,
    run_names,
)

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Earlier:
    """The run that needed a stage before its config was changed, and when that was (seconds since the epoch)."""

    run: str
    replaced_at: float


@dataclass(frozen=True)
class References:
    """Who needs which stages. `busy` and `busy_runs` say in words why a stage or a run is not to be touched now.

    `code` are the digests of the snapshots that runs were started with, and that something may yet run.
    """

    records: Mapping[str, RunRecord]
    users: Mapping[StageKey, tuple[str, ...]]
    busy: Mapping[StageKey, str]
    busy_runs: Mapping[str, str]
    earlier: Mapping[StageKey, Earlier]
    pinned: Collection[str]
    code: Collection[str]

    @cached_property
    def of_runs(self) -> Mapping[str, frozenset[StageKey]]:
        """All that each run needs."""
        found: dict[str, set[StageKey]] = {name: set() for name in self.records}
        for key, names in self.users.items():
            for name in names:
                found[name].add(key)
        return {name: frozenset(keys) for name, keys in found.items()}


def read_references(outputs: Path, jobs: Mapping[Path, str], without: Collection[str] = ()) -> References:
    """Read all records of the store, but for those of the runs `without`; `jobs` is what `jobs_at_work` gave.

    Raises `DamagedRunError` where a run's record cannot be read: what that run needs is not known; and `UserError`
    where there are artifacts, and no folder of runs.
    """
    names = run_names(outputs)
    require_runs(outputs)
    inputs, commands = _Inputs(outputs), commands_at_work(outputs)
    records = {name: read_run(outputs, name) for name in names if name not in without}
    pinned = {name for name in names if (run_directory(outputs, name) / PIN).exists()}
    users: dict[StageKey, dict[str, None]] = {}
    earlier: dict[StageKey, Earlier] = {}
    code = {digest for each in commands for digest in each.needs.code}
    for name, record in records.items():
        needed = keys_of(record)
        code.add(record.code or "")
        known = earlier_records(outputs, name)
        if name in pinned:
            for lost in lost_earlier_records(outputs, name, known):
                raise UserError(lost)
        for path, replaced in known.items():
            if name in pinned:
                needed += keys_of(replaced)
                code.add(replaced.code or "")
            for key in keys_of(replaced):
                when = Earlier(name, path.stat().st_mtime)
                earlier[key] = max(earlier.get(key, when), when, key=lambda each: each.replaced_at)
        for key in inputs.with_all(needed):
            users.setdefault(key, {})[name] = None
    works = dict(entries(outputs, "work"))
    directly = {key: why for key, path in works.items() if (why := at_work(path) or jobs.get(path))}
    planned = {key: "a command at work has planned with it" for each in commands for key in each.needs.stages}
    at_hand = planned | directly
    needed_by = {each: f"{key[0]} needs it: {why}" for key, why in at_hand.items() for each in inputs.with_all([key])}
    busy_runs = {name: each.who for each in commands for name in each.needs.runs}
    for name, record in records.items():
        for key in keys_of(record):
            if key in directly:
                busy_runs.setdefault(name, f"of its stage {key[0]}, {directly[key]}")
    busy = needed_by | at_hand
    goes_on = [key for key in works if key in busy or (key in users and not inputs.is_finished(key))]
    code |= {each.code or "" for key in goes_on for each in inputs.frozen_of(key)}
    of_keys = {key: tuple(names) for key, names in users.items()}
    return References(records, of_keys, busy, busy_runs, earlier, pinned, code)


def jobs_at_work(outputs: Path) -> dict[Path, str]:
    """The work directories that jobs of a queue work at or will, and what is to be said of them. Asks the queues."""
    works = [path for _, path in entries(outputs, "work")]
    return {path: why for each in launchers().values() for path, why in each.at_work(outputs, works).items()}


def entries(outputs: Path, tree: str) -> Iterator[tuple[StageKey, Path]]:
    """What stands under `artifacts` or `work`, by stage and fingerprint. Other names are nobody's business."""
    for path in sorted((outputs / tree).glob("*/*")):
        if _FINGERPRINT.fullmatch(path.name):
            yield (path.parent.name, path.name), path


class _Inputs:
    """What stages were made from or will be, all the way down: as the manifest says, else as the frozen stages do."""

    def __init__(self, outputs: Path) -> None:
        self._store = ArtifactStore(outputs)
        self._stage_of = {key[1]: key[0] for tree in ("work", "artifacts") for key, _ in entries(outputs, tree)}
        self._known: dict[StageKey, tuple[StageKey, ...]] = {}

    def with_all(self, keys: Iterable[StageKey]) -> list[StageKey]:
        """These stages and all of their inputs, a stage before its own."""
        found: dict[StageKey, None] = {}
        pending = list(keys)
        while pending:
            key = pending.pop()
            if key not in found:
                found[key] = None
                pending += self._of(key)
        return list(found)

    def _of(self, key: StageKey) -> tuple[StageKey, ...]:
        if key not in self._known:
            self._known[key] = tuple(self._read(key))
        return self._known[key]

    def _read(self, key: StageKey) -> Iterator[StageKey]:
        try:
            artifact = self._store.find(*key)
        except UserError:
            artifact = None
        if artifact is not None:
            fingerprints = [each for found in artifact.manifest.inputs.values() for each in found]
            yield from ((self._stage_of[each], each) for each in fingerprints if each in self._stage_of)
            return
        for frozen in self.frozen_of(key):
            yield from frozen.reads

    def frozen_of(self, key: StageKey) -> Iterator[FrozenStage]:
        """What a stage was or will be started by."""
        yield from map(read_frozen, (self._store.work(*key) / FROZEN).glob("*.json"))

    def is_finished(self, key: StageKey) -> bool:
        """Whether its artifact is there."""
        return (self._store.path(*key) / MANIFEST).exists()
