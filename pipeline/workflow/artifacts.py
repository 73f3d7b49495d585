"""What stages publish: `artifacts/<stage>/<fingerprint>/`, complete with its manifest or not there at all."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import Field, ValidationError

from pipeline.config import Settings, validate
from pipeline.errors import UserError
from pipeline.workflow.digests import FileRecord, fault, size_fault
from pipeline.workflow.record import METRICS
from pipeline.workflow.sealed import DamagedRecordError, digest_of, read_json, warn, write_json_atomically

MANIFEST = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SET_ASIDE = "damaged.json"
"""The manifest's name once a file was found damaged. The files stay where they are, for those who have them open."""
VERIFIED = "verified"
"""In the work directory: what each host has verified."""
CODE_RECORD = "code.json"
SCHEMA_VERSION = 1
REMEDY = (
    "run it again with store.on_damage=rebuild to make it anew, or put an intact copy of the file there and "
    "`unclip verify` takes it back"
)


class DamagedArtifactError(UserError):
    """A file of an artifact is not what its manifest says; `fault` says which, and how it differs."""

    def __init__(self, fault: str, consequence: str = "") -> None:
        super().__init__(f"{fault}{consequence}; {REMEDY}")
        self.fault = fault


class Numbers(Settings):
    """What an artifact's consumers are told of it: widths, sizes, statistics. A kind of stages has its own class."""


N = TypeVar("N", bound=Numbers)
S = TypeVar("S", bound=Settings)


class Manifest(Settings):
    """What an artifact is, what it was made from, and the numbers that its consumers need.

    `inputs` are fingerprints; `inputs_sha256` is of the contents of each `stage/fingerprint` that was read.
    """

    schema_version: int
    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    inputs: dict[str, list[str]]
    inputs_sha256: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any]
    code_version: str
    made_by_run: str
    finished_at: str
    duration_s: float
    device_s: float | None = None
    samples_seen: int
    numbers: dict[str, Any]
    metrics: dict[str, Any]
    hardware: dict[str, Any] = Field(default_factory=dict)
    tracking: dict[str, Any] = Field(default_factory=dict)
    files: list[FileRecord]


@dataclass(frozen=True)
class Artifact:
    """A published artifact."""

    path: Path
    manifest: Manifest

    def numbers(self, schema: type[N]) -> N:
        """What a consumer is told of it, typed as its kind's own class."""
        return validate(schema, self.manifest.numbers, str(self.path))

    def settings(self, schema: type[S]) -> S:
        """The settings that it was made with, typed as its kind's own class."""
        return validate(schema, self.manifest.config, str(self.path))

    @property
    def name(self) -> str:
        """`stage/fingerprint`."""
        return f"{self.manifest.stage}/{self.manifest.fingerprint}"

    @property
    def content_sha256(self) -> str:
        """Of its result: made anew on other hardware it may be another one under the same fingerprint."""
        files = (each for each in self.manifest.files if each.path not in (METRICS, CODE_RECORD))  # times, surroundings
        return digest_of([[each.path, each.sha256] for each in files])

    def pictures(self) -> list[Path]:
        """The PNGs at its top level, to be looked at. A damaged one is left out, and said."""
        whole = []
        for record in self._pictures:
            damage = self._fault_of([record])
            if damage is None:
                whole.append(self.path / record.path)
            else:
                warn(f"{damage}; it is not shown")
        return whole

    def seen_damage(self) -> str | None:
        """What is wrong with it as far as sizes tell, and what is in its pictures, which this host reads once."""
        try:
            pictures = self._pictures
            return size_fault(self.path, self.manifest.files) or (self._fault_of(pictures) if pictures else None)
        except UserError as error:
            return str(error)

    def opened(self) -> "Artifact":
        """The same for whoever uses its files. Raises `UserError` where one is damaged: see `ArtifactStore.open`."""
        store, manifest = ArtifactStore(self.path.parents[2]), self.manifest
        found = store.open(manifest.stage, manifest.fingerprint)
        if found is None:
            raise UserError(f"{self.path} is not there any more; run the workflow again")
        return found

    @property
    def _pictures(self) -> list[FileRecord]:
        return [each for each in self.manifest.files if re.fullmatch(r"[^/]+\.png", each.path)]

    def _fault_of(self, files: Sequence[FileRecord]) -> str | None:
        memory = ArtifactStore(self.path.parents[2]).work(self.manifest.stage, self.manifest.fingerprint) / VERIFIED
        return fault(self.path, files, memory)


@dataclass(frozen=True)
class ArtifactStore:
    """All artifacts under one `paths.outputs`. Those under `also_read` are found where it has none of its own."""

    outputs: Path
    also_read: tuple[Path, ...] = ()

    def path(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact of that stage and fingerprint is or will be."""
        return self.outputs / "artifacts" / stage / fingerprint

    def work(self, stage: str, fingerprint: str) -> Path:
        """Where what is in progress is kept: checkpoints, logs, tracking."""
        return self.outputs / "work" / stage / fingerprint

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, or None."""
        stores = (self, *map(ArtifactStore, self.also_read))
        found = (read_artifact(store.path(stage, fingerprint)) for store in stores)
        return next((artifact for artifact in found if artifact is not None), None)

    def link(self, stage: str, fingerprint: str) -> None:
        """Where an artifact was found in another store, have it here too, by a link to there.

        Raises `UserError` where it is damaged.
        """
        found, here = self.find(stage, fingerprint), self.path(stage, fingerprint)
        if found is None or found.path == here:
            return
        damage = fault(found.path, found.manifest.files, self.work(stage, fingerprint) / VERIFIED)
        if damage is not None:
            remedy = "its owner can mend that; leave its store out of paths.also_read until then"
            raise UserError(f"{damage}; {remedy}")
        here.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another command was as fast
            if here.is_symlink():  # to what has gone since
                here.unlink(missing_ok=True)
            here.symlink_to(found.path.resolve(), target_is_directory=True)

    def open(self, stage: str, fingerprint: str, *, anew: bool = False) -> Artifact | None:
        """The published artifact for whoever uses its files, which are what the manifest says; or None.

        What this host has verified before is not read again, unless `anew`.

        Raises:
            DamagedArtifactError: a file is damaged; the artifact is set aside, and not found any more.
        """
        directory = self.path(stage, fingerprint)
        try:
            inode = (directory / MANIFEST).stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None
        artifact = None
        try:
            artifact = read_artifact(directory)
            found = None if artifact is None else self._fault(artifact, anew)
        except DamagedArtifactError as error:
            found = error.fault
        if found is None:
            return artifact
        state = "is set aside" if _set_aside(directory, inode) else "is damaged"
        raise DamagedArtifactError(found, f": stage {stage} {state}")

    def take_back(self, stage: str, fingerprint: str) -> bool:
        """Publish an artifact again that was set aside, if its files are what the manifest says by now."""
        directory = self.path(stage, fingerprint)
        try:
            artifact = read_artifact(directory, SET_ASIDE)
            if artifact is None or (directory / MANIFEST).exists() or self._fault(artifact, anew=True) is not None:
                return False
            (directory / SET_ASIDE).rename(directory / MANIFEST)
        except (DamagedArtifactError, FileNotFoundError):
            return False
        return True

    def known_damage(self, stage: str, fingerprint: str) -> str | None:
        """What is wrong with an artifact as far as it can be known without reading its files."""
        directory = self.path(stage, fingerprint)
        try:
            artifact = read_artifact(directory)
        except DamagedArtifactError as error:
            return error.fault
        if artifact is not None:
            return size_fault(directory, artifact.manifest.files)
        return f"{directory} was found damaged and set aside" if (directory / SET_ASIDE).exists() else None

    def made_anew_since(self, inputs_sha256: Mapping[str, str]) -> str:
        """In words, which of these contents are not those of the artifacts there are now; "" where all are."""
        others = [key for key, sha256 in inputs_sha256.items() if self._content_of(key) not in (sha256, None)]
        names = ", ".join(dict.fromkeys(key.partition("/")[0] for key in others))
        return names and f"{names} made anew since, with other bytes than this was made from"

    def _content_of(self, key: str) -> str | None:
        for store in (self, *map(ArtifactStore, self.also_read)):
            directory = store.path(*key.split("/"))
            with suppress(OSError):
                status = (directory / MANIFEST).stat()
                return _content_at(directory, status.st_ino, status.st_mtime_ns)
        return None

    def _fault(self, artifact: Artifact, anew: bool) -> str | None:
        manifest = artifact.manifest
        memory = self.work(manifest.stage, manifest.fingerprint) / VERIFIED
        return fault(artifact.path, manifest.files, None if anew else memory)

    def all_of(self, stage: str) -> Iterator[Artifact]:
        """Every artifact of that stage that this code can read, whatever its settings."""
        for directory in sorted((self.outputs / "artifacts" / stage).glob("[0-9a-f]*")):
            with suppress(UserError):
                artifact = read_artifact(directory)
                if artifact is not None:
                    yield artifact

    def start_building(self, stage: str, fingerprint: str, attempt: int) -> Path:
        """An empty directory beside the artifact's place, on the same file system; earlier attempts' are removed."""
        place = self.path(stage, fingerprint).parent
        for left in place.glob(f".building-{fingerprint}-*"):
            if int(left.name.rpartition("-")[2]) <= attempt:
                # Out of the way at once, and whole: who stalled over it cannot publish what is left of it.
                trash = left.rename(left.with_name(f".trash-{uuid4().hex}"))
                shutil.rmtree(trash, ignore_errors=True)
        building = place / f".building-{fingerprint}-{attempt}"
        building.mkdir(parents=True)
        return building

    def publish(self, building: Path, manifest: Manifest, before_rename: Callable[[], None] = lambda: None) -> Artifact:
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
        target = self.path(manifest.stage, manifest.fingerprint)
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


def read_artifact(directory: Path, name: str = MANIFEST) -> Artifact | None:
    """The artifact in that directory; None without a manifest.

    Raises:
        DamagedArtifactError: the manifest is not what was written.
        UserError: it is another version's.
    """
    try:
        values = read_json(directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedRecordError as error:
        raise DamagedArtifactError(str(error)) from error
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{directory} has manifest schema {version} and this code reads {SCHEMA_VERSION}; "
            f"remove it and run again, or use the version of unclip that made it ({values.get('code_version')})"
        )
    try:
        return Artifact(directory, Manifest.model_validate(values))
    except ValidationError as error:
        raise UserError(
            f"{directory / name} cannot be read; remove {directory} and run again, or use the version of unclip that "
            f"made it ({values.get('code_version')})"
        ) from error


@lru_cache(maxsize=4096)
def _content_at(directory: Path, _inode: int, _mtime_ns: int) -> str | None:
    """Of the artifact there, whose manifest is that one."""
    try:
        artifact = read_artifact(directory)
    except UserError:
        return None
    return None if artifact is None else artifact.content_sha256


def _set_aside(directory: Path, inode: int) -> bool:
    """Give the manifest that was read another name; whether it has none of its own any more."""
    manifest, aside = directory / MANIFEST, directory / SET_ASIDE
    if directory.is_symlink():  # to a store of others', which is theirs to mend
        directory.unlink(missing_ok=True)
        return True
    try:
        manifest.rename(aside)
        if aside.stat().st_ino != inode:  # meanwhile another process has set it aside and made it anew
            aside.rename(manifest)
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:  # a store of others'
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk, so that it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
