"""What stages publish: `artifacts/<stage>/<fingerprint>/`, complete with its manifest or not there at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import Field, ValidationError

from pipeline.config import Settings, validate
from pipeline.errors import UserError

MANIFEST = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SCHEMA_VERSION = 1


class FileRecord(Settings):
    """A file of an artifact: POSIX path inside it, bytes, SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


class Numbers(Settings):
    """What an artifact's consumers are told of it: widths, sizes, statistics. A kind of stages has its own class."""


N = TypeVar("N", bound=Numbers)
S = TypeVar("S", bound=Settings)


class Manifest(Settings):
    """What an artifact is, what it was made from, and the numbers that its consumers need."""

    schema_version: int
    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    inputs: dict[str, list[str]]
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

    def verify(self) -> None:
        """Compare every file with the manifest's size and digest. Raises `UserError` for a damaged artifact."""
        for record in self.manifest.files:
            file = self.path / record.path
            if not file.is_file() or file.stat().st_size != record.size or file_sha256(file) != record.sha256:
                raise UserError(f"{file} does not match its manifest; remove {self.path} and run again")


@dataclass(frozen=True)
class ArtifactStore:
    """All artifacts under one `paths.outputs`."""

    outputs: Path

    def path(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact of that stage and fingerprint is or will be."""
        return self.outputs / "artifacts" / stage / fingerprint

    def work(self, stage: str, fingerprint: str) -> Path:
        """Where what is in progress is kept: checkpoints, logs, tracking."""
        return self.outputs / "work" / stage / fingerprint

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, or None."""
        return read_artifact(self.path(stage, fingerprint))

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
        """Write the manifest last, flush it to disk and rename the directory to its place.

        An artifact that is already there stays, since it never changes, and the new one is dropped. `before_rename` is
        called when nothing but the rename is left to do.
        """
        write_json_atomically(building / MANIFEST, manifest.model_dump(mode="json"))
        before_rename()
        target = self.path(manifest.stage, manifest.fingerprint)
        try:
            building.rename(target)
        except OSError:
            published = read_artifact(target)
            if published is not None:
                shutil.rmtree(building)
                return published
            # A directory without a manifest is no artifact, and must not be in the way of one.
            shutil.rmtree(target)
            building.rename(target)
        sync_directory(target.parent)
        return Artifact(target, manifest)


def read_artifact(directory: Path) -> Artifact | None:
    """The artifact in that directory; None without a manifest. A manifest of another schema is a `UserError`."""
    try:
        raw = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{directory / MANIFEST} cannot be read; remove {directory} and run again") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{directory} has manifest schema {manifest.schema_version} and this code reads {SCHEMA_VERSION}; "
            f"remove it and run again, or use the version of unclip that made it ({manifest.code_version})"
        )
    return Artifact(directory, manifest)


def describe_files(directory: Path) -> list[FileRecord]:
    """Every file below `directory` with its size and digest, sorted by path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        FileRecord(path=file.relative_to(directory).as_posix(), size=file.stat().st_size, sha256=file_sha256(file))
        for file in files
    ]


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_atomically(path: Path, value: Any) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half of one.

    The directory must exist.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
