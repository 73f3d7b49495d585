"""How an artifact comes into a store: made beside its place, and renamed to it when it is complete."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pipeline.workflow.artifacts import (
    MANIFEST,
    Artifact,
    ArtifactStore,
    Manifest,
    read_artifact,
)
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.sealed import write_json_atomically


def start_building(store: ArtifactStore, stage: str, fingerprint: str, attempt: int) -> Path:
    """An empty directory beside the artifact's place, on the same file system; earlier attempts' are removed."""
    place = store.path(stage, fingerprint).parent
    for left in place.glob(f".building-{fingerprint}-*"):
        if int(left.name.rpartition("-")[2]) <= attempt:
            # Out of the way at once, and whole: who stalled over it cannot publish what is left of it.
            trash = left.rename(left.with_name(f".trash-{uuid4().hex}"))
            shutil.rmtree(trash, ignore_errors=True)
    building = place / f".building-{fingerprint}-{attempt}"
    building.mkdir(parents=True)
    return building


def publish(
    store: ArtifactStore, building: Path, manifest: Manifest, before_rename: Callable[[], None] = lambda: None
) -> Artifact:
    """Write the manifest, flush all to disk, and rename the directory to its place.

    An artifact that is already there stays, since it never changes, and the new one is dropped. `before_rename` is
    called when nothing but the rename is left to do.
    """
    write_json_atomically(building / MANIFEST, manifest.model_dump(mode="json"))
    mode = (building / MANIFEST).stat().st_mode
    for path in (*building.rglob("*"), building):
        if path.is_file():  # libraries write for their user alone; a store may be a group's
            path.chmod(mode)
        sync(path)
    before_rename()
    target = store.path(manifest.stage, manifest.fingerprint)
    try:
        building.rename(target)
    except OSError:
        with suppress(DamagedArtifactError):
            published = read_artifact(target)
            if published is not None:
                shutil.rmtree(building)
                return published
        # What is no artifact must not be in the way of one. It may be a damaged one that others have open.
        target.rename(target.with_name(f".damaged-{target.name}-{uuid4().hex}"))
        building.rename(target)
    sync(target.parent)
    return Artifact(target, manifest)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk, so that it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
