"""`unclip verify`: reads everything that has a digest, whatever was verified before."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.artifacts import MANIFEST, SET_ASIDE, ArtifactStore, DamagedArtifactError
from pipeline.workflow.checkpoint import checkpoints
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.runs import RECORD, read_runs, require_outputs, run_directory
from pipeline.workflow.sealed import DamagedRecordError, read_json

_RECORDS = ("*.json", "frozen/*.json", "jobs/*.json", "attempts/*.json")
"""In a work directory. Those of checkpoints are read with them."""


def verify(outputs: Path, run: str | None) -> int:
    """Say of each artifact and checkpoint of a run or sweep, or of the whole store, whether it is whole.

    What is damaged is set aside, and what was set aside and is whole again is taken back. Other records are named where
    they are damaged. Raises `UserError` at the end where something is.
    """
    require_outputs(outputs)
    store = ArtifactStore(outputs)
    if run is None:
        keys = _keys(outputs)
        records = [*outputs.glob(f"runs/*/{RECORD}")]
    else:
        runs = read_runs(outputs, run)
        keys = list(dict.fromkeys((each.name, each.fingerprint) for record in runs for each in record.stages))
        records = [run_directory(outputs, record.name) / RECORD for record in runs]
    damaged = 0
    for key in keys:
        for line, is_whole in _findings(store, key):
            print(line, flush=True)
            damaged += not is_whole
        work = store.work(*key)
        records += [path for pattern in _RECORDS for path in sorted(work.glob(pattern))]
    for path in records:
        try:
            read_json(path)
        except DamagedRecordError as error:
            print(error, flush=True)
            damaged += 1
        except FileNotFoundError:
            continue
    if damaged:
        raise UserError(f"{damaged} damaged; what is done about each stands above")
    return 0


def _keys(outputs: Path) -> list[StageKey]:
    found = (path for place in ("artifacts", "work") for path in sorted(outputs.glob(f"{place}/*/[0-9a-f]*")))
    return list(dict.fromkeys((path.parent.name, path.name) for path in found))


def _findings(store: ArtifactStore, key: StageKey) -> Iterator[tuple[str, bool]]:
    """Lines about one stage, and whether each is good news."""
    name = f"{key[0]} {key[1][:12]}"
    try:
        artifact = store.open(*key, anew=True)
        if artifact is not None:
            files = artifact.manifest.files
            size = sum(file.size for file in files) / 2**20
            others = store.made_anew_since(artifact.manifest.inputs_sha256)
            yield f"{name}: whole ({len(files)} files, {size:,.1f} MiB){others and '; '}{others}", True
        elif store.take_back(*key):
            yield f"{name}: whole again, and taken back", True
        elif (store.path(*key) / SET_ASIDE).exists():
            yield f"{name}: {DamagedArtifactError(f'{store.path(*key)} is damaged, and set aside')}", False
        elif store.path(*key).is_dir():  # what is not finished lies elsewhere
            manifest = store.path(*key) / MANIFEST
            yield f"{name}: {manifest} is gone; put it back, or run again, which makes the stage anew", False
    except DamagedArtifactError as error:
        yield f"{name}: {error}", False
    for path, checkpoint in checkpoints(store.work(*key)):
        if checkpoint is not None:
            yield f"{name}: checkpoint at {checkpoint.samples_seen:,} samples is whole", True
        elif path.exists():  # a stage at work removes old ones
            yield f"{name}: {path} is damaged; the one before it is used", False
