"""`unclip verify`: reads everything that has a digest, whatever was verified before."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.artifacts import SET_ASIDE, ArtifactStore
from pipeline.workflow.checkpoint import checkpoints, said_of_damaged
from pipeline.workflow.code import DIRECTORY as CODE
from pipeline.workflow.code import fault_of
from pipeline.workflow.frozen import FROZEN, StageKey
from pipeline.workflow.ownership import TAKEN_AWAY, was_published
from pipeline.workflow.runs import (
    RunRecord,
    earlier_records,
    keys_of,
    lost_earlier_records,
    read_readable,
    read_runs,
    require_outputs,
    require_runs,
    run_names,
    store_of,
)
from pipeline.workflow.sealed import DamagedRecordError, read_json

_RECORDS = ("*.json", f"{FROZEN}/*.json", "jobs/*.json", "attempts/*.json")
"""In a work directory. Those of checkpoints are read with them."""


def verify(outputs: Path, run: str | None) -> int:
    """Say of each artifact and checkpoint of a run or sweep, or of the whole store, whether it is whole.

    What is damaged is set aside, and what was set aside and is whole again is taken back. Other records are named where
    they are damaged. Raises `UserError` at the end where something is.
    """
    require_outputs(outputs)
    require_runs(outputs)
    unreadable = []
    if run is None:
        runs, unreadable = read_readable(outputs, run_names(outputs))
        keys = _keys(outputs)
    else:
        runs = read_runs(outputs, run)
        keys = list(dict.fromkeys(key for record in runs for key in keys_of(record)))
    store = store_of(outputs, runs)
    records: list[Path] = []
    earlier = ((each.name, earlier_records(outputs, each.name)) for each in runs)
    lost = [line for name, known in earlier for line in lost_earlier_records(outputs, name, known)]
    faults = [*map(str, unreadable), *lost, *_faults_of_code(outputs, None if run is None else runs)]
    damaged = len(faults)
    for fault in faults:
        print(fault, flush=True)
    needed = {key for record in runs for key in keys_of(record)}
    made_from = _inputs_of(store, needed)
    for key in [*keys, *sorted(needed.difference(keys))]:
        was_there = key in needed and (key[1] in made_from or was_published(store.work(*key)))
        for line, is_whole in _findings(store, key, was_there=was_there):
            print(line, flush=True)
            damaged += not is_whole
        work = store.work(*key)
        records += [path for pattern in _RECORDS for path in sorted(work.glob(pattern))]
    for path in records:
        try:
            read_json(path)
        except DamagedRecordError as error:
            is_needed = path.parent.name == FROZEN and store.readable(*path.parts[-4:-2]) is None
            remedy = "run it again, which writes it anew" if is_needed else "it is left out, and can be removed"
            print(f"{error}; {remedy}", flush=True)
            damaged += 1
        except FileNotFoundError:
            continue
    if damaged:
        raise UserError(f"{damaged} damaged; what is done about each stands above")
    return 0


def _faults_of_code(outputs: Path, runs: Sequence[RunRecord] | None) -> Iterator[str]:
    """Of the snapshots of these runs' code, or of all."""
    for place in sorted((outputs / CODE).glob("[0-9a-f]*")):
        is_asked_for = runs is None or any(record.code == place.name for record in runs)
        if is_asked_for and (fault := fault_of(place)) is not None:
            yield fault


def _keys(outputs: Path) -> list[StageKey]:
    found = (path for place in ("artifacts", "work") for path in sorted(outputs.glob(f"{place}/*/[0-9a-f]*")))
    return list(dict.fromkeys((path.parent.name, path.name) for path in found))


def _inputs_of(store: ArtifactStore, keys: Iterable[StageKey]) -> set[str]:
    """The fingerprints that these stages were made from, as far as they are here."""
    artifacts = filter(None, (store.readable(*key) for key in keys))
    return {each for artifact in artifacts for found in artifact.manifest.inputs.values() for each in found}


def _findings(store: ArtifactStore, key: StageKey, *, was_there: bool) -> Iterator[tuple[str, bool]]:
    """Lines about one stage, and whether each is good news."""
    name = f"{key[0]} {key[1][:12]}"
    try:
        artifact = store.open(*key, anew=True)
        if artifact is not None:
            files = artifact.manifest.files
            size = sum(file.size for file in files) / 2**20
            others = store.made_anew_since(artifact.manifest.inputs_sha256)
            with suppress(OSError):  # whoever put its manifest back has left the one that was set aside
                (artifact.path / SET_ASIDE).unlink()
            yield f"{name}: whole ({len(files)} files, {size:,.1f} MiB){others and '; '}{others}", True
        elif store.take_back(*key):
            yield f"{name}: whole again, and taken back", True
        elif (damage := store.known_damage(*key)) is not None:
            yield f"{name}: {damage}", False
        elif was_there and store.find(*key) is None:
            yield f"{name}: {store.path(*key)} {TAKEN_AWAY}", False
    except UserError as error:
        yield f"{name}: {error}", False
    found = list(checkpoints(store.work(*key)))
    for place, (path, checkpoint) in enumerate(found):
        if checkpoint is not None:
            yield f"{name}: checkpoint at {checkpoint.samples_seen:,} samples is whole", True
        elif path.exists():  # a stage at work removes old ones
            instead = next((each for _, each in found[place:] if each is not None), None)
            is_finished = store.readable(*key) is not None
            yield f"{name}: {said_of_damaged(path, instead, is_finished=is_finished)}", False
