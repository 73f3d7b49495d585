"""A run on disk: `runs/<run.name>/run.json` says which artifact stands for each of its stages."""

import errno
import os
import re
import shlex
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, field_validator

from pipeline.config import Settings
from pipeline.errors import UserError, typed
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.plan import Plan
from pipeline.workflow.progress import LOG
from pipeline.workflow.sealed import (
    DamagedRecordError,
    digest_of,
    read_or_none,
    read_record,
    warn,
    write_json_atomically,
)

BUILDING = "."
"""Before the name of a run's folder that is not there yet."""
RECORD = "run.json"
PIN = "pinned"
"""The file in a run's folder that keeps what its earlier configs made, its checkpoints, and the run."""
EARLIER = "earlier"
"""Beside the record: those that later configs of the same run replaced, for the jobs that were queued with them."""
PICTURES = "pictures"


class DamagedRunError(UserError):
    """The record of a run is there and cannot be read; `run` is its name."""

    def __init__(self, run: str, message: str) -> None:
        super().__init__(message)
        self.run = run


class RunStage(Settings):
    """One stage of a recorded run."""

    name: str
    kind: str
    fingerprint: str
    upstream: list[str]


class RunRecord(Settings):
    """One workflow with one config."""

    name: str
    group: str
    overrides: list[str]
    config: dict[str, Any]
    stages: list[RunStage]
    started_at: str
    code: str | None = None
    """The digest of the code that it was started with, which is kept under `paths.outputs`."""

    @field_validator("config")
    @classmethod
    def _has_groups(cls, config: dict[str, Any]) -> dict[str, Any]:
        groups = [config.get(name, {}) for name in ("run", "launch", "trainer", "paths", "stage")]
        stages = groups[-1].values() if isinstance(groups[-1], dict) else ()
        if not all(isinstance(each, dict) for each in (*groups, *stages)):
            raise ValueError("a group of settings is none")
        return config

    def fingerprint_of(self, stage: str) -> str | None:
        """The fingerprint behind a stage's name, or None."""
        return next((each.fingerprint for each in self.stages if each.name == stage), None)


_RECORD = TypeAdapter(RunRecord)
_PLACES = TypeAdapter(tuple[Path, ...])


def run_directory(outputs: Path, name: str) -> Path:
    """`runs/<name>/`."""
    return outputs / "runs" / name


def record_run(plan: Plan, *, is_flushed: bool = True) -> Path:
    """Write a plan down as a run and return its directory."""
    directory = run_directory(plan.store.outputs, plan.config.run.name)
    record = RunRecord(
        name=plan.config.run.name,
        group=plan.config.run.group or plan.config.run.name,
        overrides=list(plan.overrides),
        config=plan.config.model_dump(mode="json"),
        stages=[
            RunStage(name=stage.name, kind=stage.kind, fingerprint=stage.fingerprint, upstream=list(stage.upstream))
            for stage in plan.stages
            if stage.fingerprint is not None
        ],
        started_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        code=plan.code.digest,
    )
    _keep_earlier(directory, record)
    write_run(directory, record, is_flushed=is_flushed)
    return directory


def write_run(directory: Path, record: RunRecord, *, is_flushed: bool = True) -> None:
    """Write a run's record. Its folder is never there without one, whoever is killed; the store's lock is held."""
    values = record.model_dump(mode="json")
    if directory.is_dir():
        write_json_atomically(directory / RECORD, values, is_flushed=is_flushed)
        return
    if os.path.lexists(directory):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(directory))
    building = directory.with_name(f"{BUILDING}{directory.name}.{os.getpid()}")
    building.mkdir(parents=True, exist_ok=True)
    write_json_atomically(building / RECORD, values, is_flushed=is_flushed)
    building.rename(directory)


def _keep_earlier(directory: Path, record: RunRecord) -> None:
    """Keep what stands there if it has another config."""
    earlier = read_or_none(_RECORD, directory / RECORD, "it is replaced")
    if earlier is not None and earlier.config != record.model_dump(mode="json")["config"]:
        (directory / EARLIER).mkdir(exist_ok=True)
        path = directory / EARLIER / f"{digest_of(earlier.config)[:12]}.json"
        write_json_atomically(path, earlier.model_dump(mode="json"))


def keys_of(record: RunRecord) -> list[StageKey]:
    """The stages of a run as keys of the store."""
    return [(stage.name, stage.fingerprint) for stage in record.stages]


def stages_with_members(records: Sequence[RunRecord]) -> list[tuple[RunStage, tuple[str, ...]]]:
    """Every stage of some runs once, with the names of those that have it."""
    found: dict[StageKey, tuple[RunStage, list[str]]] = {}
    for record in records:
        for stage in record.stages:
            found.setdefault((stage.name, stage.fingerprint), (stage, []))[1].append(record.name)
    return [(stage, tuple(members)) for stage, members in found.values()]


def earlier_paths(outputs: Path, name: str) -> list[Path]:
    """Where the records stand that later configs of the run replaced; or what is in their folder's place."""
    folder = run_directory(outputs, name) / EARLIER
    if os.path.lexists(folder) and not folder.is_dir():
        return [folder]
    return sorted(folder.glob("*.json"))


def lost_earlier_records(outputs: Path, name: str, known: Collection[Path]) -> list[str]:
    """What is to be said of those that are not among the `known`, which could be read."""
    remedy = "it is left out, and can be removed"
    if (run_directory(outputs, name) / PIN).exists():
        unpin = typed(outputs, "gc", "--unpin", name)
        remedy = f"what pinned run {name} keeps is not known: put an intact copy there, or unpin it: {unpin}"
    return [f"{path} cannot be read; {remedy}" for path in earlier_paths(outputs, name) if path not in known]


def earlier_records(outputs: Path, name: str) -> dict[Path, RunRecord]:
    """Those that later configs of the run replaced, the latest first; what cannot be read as one is left out."""
    found = {}
    for path in sorted(earlier_paths(outputs, name), key=lambda path: path.lstat().st_mtime, reverse=True):
        record = read_or_none(_RECORD, path, "it is left out")
        if record is not None:
            found[path] = record
    return found


def config_with(outputs: Path, name: str, stage: str, fingerprint: str) -> dict[str, Any] | None:
    """The whole config of a run as it was given with that stage, though another may have been given since; or None."""
    latest = read_or_none(_RECORD, run_directory(outputs, name) / RECORD, "it is left out")
    records = [*([] if latest is None else [renamed(latest, name)]), *earlier_records(outputs, name).values()]
    return next((record.config for record in records if record.fingerprint_of(stage) == fingerprint), None)


def read_run(outputs: Path, name: str) -> RunRecord:
    """A recorded run. Raises `UserError` that lists the runs there are, and `DamagedRunError`."""
    _require_directories(outputs)
    path = run_directory(outputs, name) / RECORD
    try:
        return renamed(read_record(_RECORD, path), name)
    except (FileNotFoundError, NotADirectoryError) as error:
        names = run_names(outputs)
        require_runs(outputs)
        if name in names and not path.parent.is_dir():
            mended = f"bring that back, or remove this: {typed(outputs, 'rm', name, '--delete')}"
            raise DamagedRunError(name, f"{path.parent} is no folder of a run; {mended}") from error
        if name in names:
            raise DamagedRunError(name, f"{path} is gone; {_mended(outputs, name)}") from error
        known = f"runs there: {', '.join(names)}" if names else "there is no run yet: start one with `unclip run`"
        raise UserError(f"no run {name!r} under {outputs}; {known}") from error
    except DamagedRecordError as error:
        raise DamagedRunError(name, f"{error}; {_mended(outputs, name)}") from error
    except OSError as error:
        raise DamagedRunError(name, f"{path} cannot be read ({error.strerror}); ask whose it is") from error


def _mended(outputs: Path, name: str) -> str:
    return f"run {name} again, or remove it: {typed(outputs, 'rm', name, '--delete')}"


def read_readable(outputs: Path, names: Iterable[str]) -> tuple[list[RunRecord], list[DamagedRunError]]:
    """The records of these runs, and what is wrong with others: one broken run must not stand in the way of all."""
    records, damaged = [], []
    for name in names:
        try:
            records.append(read_run(outputs, name))
        except DamagedRunError as error:
            damaged.append(error)
        except UserError:  # it was removed meanwhile
            continue
    return records, damaged


def renamed(record: RunRecord, name: str) -> RunRecord:
    """The record of a run whose folder has that name now; a folder's name is the run's.

    A sweep's member that keeps its number is one of the sweep of the new name.
    """
    if record.name == name:
        return record
    (sweep, _, number), (new_sweep, _, new_number) = record.name.rpartition("."), name.rpartition(".")
    is_member = sweep != "" and record.group == sweep and number == new_number
    group = new_sweep if is_member else name if record.group == record.name else record.group
    given = f"run.name={new_sweep if is_member else name}"
    others = [each for each in record.overrides if each.partition("=")[0] != "run.name"]
    run = {**record.config.get("run", {}), "name": name, **({"group": group} if group != name else {})}
    changes = {"name": name, "group": group, "overrides": [*others, given], "config": {**record.config, "run": run}}
    return record.model_copy(update=changes)


def read_runs(outputs: Path, name: str) -> list[RunRecord]:
    """The run of that name, or the members of the sweep of that name, in their order."""
    if (run_directory(outputs, name) / RECORD).exists():
        return [read_run(outputs, name)]
    numbered = [each for each in run_names(outputs) if is_member(each, name)]
    found = [record for record in (read_run(outputs, each) for each in numbered) if record.group == name]
    return sorted(found, key=lambda record: int(record.name.rpartition(".")[2])) or [read_run(outputs, name)]


def is_member(name: str, sweep: str) -> bool:
    """Whether a run is called as the members of that sweep are."""
    return re.fullmatch(rf"{re.escape(sweep)}\.\d+", name) is not None


def require_outputs(outputs: Path) -> None:
    """Raise `UserError` where no directory is: what looks at a whole store would find nothing wrong with it."""
    if not outputs.is_dir():
        raise UserError(f"there is nothing at {outputs}; give the --outputs of your runs")
    _require_directories(outputs)


def _require_directories(outputs: Path) -> None:
    for path in (run_directory(outputs, ""), outputs / "artifacts", outputs / "work"):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path} is no directory; bring that back, or move this away if there was none")


def run_names(outputs: Path) -> list[str]:
    """Names of all runs under `outputs`, the latest first; of those too whose record is lost.

    Raises `UserError` where `runs` is no directory: nothing is known of any run.
    """
    _require_directories(outputs)
    runs = run_directory(outputs, "")
    found = [(each, path) for path in runs.glob("[!.]*") if (each := _changed_at(path)) is not None]
    return [path.name for _, path in sorted(found, reverse=True)]


def _changed_at(run: Path) -> float | None:
    """When a run's record was written, or what stands there without one; None where nothing does any more."""
    for path in (run / RECORD, run):
        with suppress(OSError):
            return path.lstat().st_mtime
    return None


def require_runs(outputs: Path) -> None:
    """Raise `UserError` where there are artifacts and no folder of runs: what those need is not known."""
    runs = run_directory(outputs, "")
    if not runs.is_dir() and any(outputs.glob("artifacts/*/[0-9a-f]*")):
        raise UserError(
            f"{runs} is gone, so that what the runs need is not known; bring it back, or if no run is left: "
            f"{shlex.join(['mkdir', str(runs)])}"
        )


def make_runs(outputs: Path) -> None:
    """Have a folder of runs, before there is any artifact; a warning where it was lost, or artifacts alone are here."""
    try:
        require_runs(outputs)
    except UserError:
        gc = typed(outputs, "gc")
        warn(f"{run_directory(outputs, '')} is made anew: what is here is needed by no run now, see {gc}")
    run_directory(outputs, "").mkdir(parents=True, exist_ok=True)


def store_of(outputs: Path, records: Sequence[RunRecord]) -> ArtifactStore:
    """The store of some runs, with those that they also read, as far as their records tell."""
    places: dict[Path, None] = {}
    for record in records:
        given = record.config.get("paths", {}).get("also_read", ())
        with suppress(ValidationError):  # an earlier version's record, or one that holds something else
            places |= dict.fromkeys(each.absolute() for each in _PLACES.validate_python(given))
    return ArtifactStore(outputs, tuple(places))


def latest_run(outputs: Path) -> str:
    """The name of the latest run whose record can be read; the demo's where there is none."""
    names = run_names(outputs)
    damaged: list[DamagedRunError] = []
    for name in names:
        try:
            found = read_run(outputs, name).name
        except DamagedRunError as error:
            damaged.append(error)
            continue
        for error in damaged:
            warn(str(error))
        return found
    return next(iter(names), "demo")


def run_artifacts(outputs: Path, record: RunRecord) -> dict[str, Artifact]:
    """The finished stages of a run, by name, in workflow order, but for those whose manifest is damaged."""
    store = ArtifactStore(outputs)
    found = {stage.name: store.readable(stage.name, stage.fingerprint) for stage in record.stages}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def finished_artifacts(
    outputs: Path, record: RunRecord, kinds: Collection[str], then: str, also: Collection[str] = ()
) -> dict[str, Artifact]:
    """As `run_artifacts`. Raises `UserError`, which says what `then` can be done, where a stage of `kinds` is not.

    Stages of the kinds `also` are used where they are. Of one of either that was finished and is damaged it is a
    `DamagedArtifactError`.
    """
    found = run_artifacts(outputs, record)
    missing = [stage for stage in record.stages if stage.name not in found and stage.kind in kinds]
    for stage in (each for each in record.stages if each.name not in found and each.kind in (*kinds, *also)):
        damage = store_of(outputs, [record]).known_damage(stage.name, stage.fingerprint)
        if damage is not None:
            raise damage
    if missing:
        unfinished = [stage.name for stage in missing]
        raise UserError(f"run {record.name} lacks {', '.join(unfinished)}; finish it with unclip run, then {then}")
    return found


def stage_log(outputs: Path, record: RunRecord, stage: str) -> Path:
    """Where the log of a run's stage is. Raises `UserError` for an unknown stage, and where nothing is logged yet."""
    fingerprint = record.fingerprint_of(stage)
    if fingerprint is None:
        names = [each.name for each in record.stages]
        close = get_close_matches(stage, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"run {record.name} has no stage {stage!r}; {hint}its stages are {', '.join(names)}")
    log = ArtifactStore(outputs).work(stage, fingerprint) / LOG
    if not log.exists():
        raise UserError(f"stage {stage} of run {record.name} has no log yet; it has not started: see `unclip status`")
    return log


def is_finished(outputs: Path, record: RunRecord) -> bool:
    """Whether every stage of a run has its artifact."""
    return len(run_artifacts(outputs, record)) == len(record.stages)


def gather_pictures(outputs: Path, record: RunRecord, directory: Path | None = None) -> list[Path]:
    """Copy the PNGs that a run's artifacts hold at their top level to `<directory>/<stage>-<file>`.

    The directory is `runs/<name>/pictures` unless another is given.
    """
    directory = directory or run_directory(outputs, record.name) / PICTURES
    directory.mkdir(parents=True, exist_ok=True)
    copies = []
    for stage, artifact in run_artifacts(outputs, record).items():
        for picture in artifact.pictures():
            copy = directory / f"{stage}-{picture.name}"
            if copy.is_symlink():  # not to where it leads
                copy.unlink()
            shutil.copyfile(picture, copy)
            copies.append(copy)
    return copies
