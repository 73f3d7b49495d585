"""What stages publish: `artifacts/<stage>/<fingerprint>/`, complete with its manifest or not there at all."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from pipeline.config import Settings, validate
from pipeline.errors import UserError
from pipeline.workflow.damage import REMEDY_ELSEWHERE, DamagedArtifactError, remedy_at, remember, remembered
from pipeline.workflow.digests import FileRecord, fault, size_fault
from pipeline.workflow.record import METRICS
from pipeline.workflow.sealed import (
    DamagedRecordError,
    digest_of,
    read_json,
    warn,
)

MANIFEST = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SET_ASIDE = "damaged.json"
"""The manifest's name once a file was found damaged. The files stay where they are, for those who have them open."""
VERIFIED = "verified"
"""In the work directory: what each host has verified."""
CODE_RECORD = "code.json"
SCHEMA_VERSION = 1


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

    def seen_damage(self) -> UserError | None:
        """What is wrong with it as far as sizes tell, and what is in its pictures, which this host reads once."""
        try:
            pictures = self._pictures
            found = size_fault(self.path, self.manifest.files) or (self._fault_of(pictures) if pictures else None)
        except UserError as error:
            return error
        return None if found is None else DamagedArtifactError(found, remedy_at(self.path))

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

    def own(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact that is published here, or None."""
        return _read_own(self.path(stage, fingerprint))

    def readable(self, stage: str, fingerprint: str) -> Artifact | None:
        """The same; None too where its manifest is damaged, of which `known_damage` tells."""
        with suppress(DamagedArtifactError):
            return self.own(stage, fingerprint)
        return None

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, or None. Of those in other stores it is none that is known to be damaged."""
        return self.own(stage, fingerprint) or self._elsewhere(stage, fingerprint)[0]

    def link(self, stage: str, fingerprint: str) -> None:
        """Where an artifact was found in another store, have it here too, by a link to there.

        Raises `DamagedArtifactError` where it is damaged.
        """
        found, here = self.verify_elsewhere(stage, fingerprint), self.path(stage, fingerprint)
        if found is None:
            return
        here.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another command was as fast
            if here.is_symlink():  # to what has gone since
                here.unlink(missing_ok=True)
            here.symlink_to(found.path.resolve(), target_is_directory=True)

    def verify_elsewhere(self, stage: str, fingerprint: str) -> Artifact | None:
        """What is in another store and not here, read unless this host has verified it; None without any.

        Raises `DamagedArtifactError` where it is damaged, and remembers that: it is not found any more.
        """
        found = self.find(stage, fingerprint)
        if found is None or found.path == self.path(stage, fingerprint):
            return None
        damage = fault(found.path, found.manifest.files, self.work(stage, fingerprint) / VERIFIED)
        if damage is not None:
            remember(self.work(stage, fingerprint), damage)
            raise DamagedArtifactError(damage, REMEDY_ELSEWHERE)
        return found

    def open(self, stage: str, fingerprint: str, *, anew: bool = False) -> Artifact | None:
        """The published artifact for whoever uses its files, which are what the manifest says; or None.

        What this host has verified before is not read again, unless `anew`.

        Raises:
            DamagedArtifactError: a file is damaged; the artifact is set aside, and not found any more.
        """
        directory = self.path(stage, fingerprint)
        try:
            inode = (directory / MANIFEST).lstat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None
        artifact = None
        try:
            artifact = _read_own(directory)
            found = None if artifact is None else self._fault(artifact, anew)
        except DamagedArtifactError as error:
            found = error.fault
        if found is None:
            return artifact
        remedy, is_link = remedy_at(directory), directory.is_symlink()
        if is_link:  # which is gone in a moment
            found = found.replace(str(directory), str(directory.resolve()))
        remember(self.work(stage, fingerprint), found)
        is_taken_away = _set_aside(directory, inode)
        state = "is damaged" if not is_taken_away else "is not linked to any more" if is_link else "is set aside"
        raise DamagedArtifactError(found, remedy, f": stage {stage} {state}")

    def take_back(self, stage: str, fingerprint: str) -> bool:
        """Publish an artifact again that was set aside, if its files are what the manifest says by now.

        Raises `DamagedArtifactError`, which names a file, where they are not.
        """
        directory = self.path(stage, fingerprint)
        artifact = _read_own(directory, SET_ASIDE)
        if artifact is None or (directory / MANIFEST).exists():
            return False
        found = self._fault(artifact, anew=True)
        if found is not None:
            remember(self.work(stage, fingerprint), found)
            raise DamagedArtifactError(found, remedy_at(directory), f": stage {stage} is set aside")
        with suppress(FileNotFoundError):  # another process was as fast
            (directory / SET_ASIDE).rename(directory / MANIFEST)
        return True

    def known_damage(self, stage: str, fingerprint: str) -> DamagedArtifactError | None:
        """What is wrong with an artifact as far as it can be known without reading its files; a link to none is, too.

        Those in other stores are read where damage was found there before.
        """
        directory = self.path(stage, fingerprint)
        try:
            artifact = _read_own(directory)
        except DamagedArtifactError as error:
            return error
        if artifact is not None:
            found = size_fault(directory, artifact.manifest.files)
            return None if found is None else DamagedArtifactError(found, remedy_at(directory))
        if os.path.lexists(directory / SET_ASIDE):
            found = remembered(self.work(stage, fingerprint)) or f"{directory} was found damaged"
            return DamagedArtifactError(found, remedy_at(directory), f": stage {stage} is set aside")
        lost = _lost_manifest(directory)
        if lost is not None:
            return DamagedArtifactError(lost, remedy_at(directory))
        found, damage = self._elsewhere(stage, fingerprint)
        if found is None and damage is None and directory.is_symlink() and not directory.exists():
            return DamagedArtifactError(f"{directory.readlink()} is gone", remedy_at(directory))
        return damage

    def _elsewhere(self, stage: str, fingerprint: str) -> tuple[Artifact | None, DamagedArtifactError | None]:
        """The first artifact in others' stores that is not known to be damaged; or what is wrong with the first."""
        damage: str | None = None
        for place in self.also_read:
            try:
                artifact = ArtifactStore(place).own(stage, fingerprint)
                found = None if artifact is None else self._fault_elsewhere(artifact)
            except DamagedArtifactError as error:
                artifact, found = None, error.fault
            if artifact is not None and found is None:
                return artifact, None
            damage = damage or found or _lost_manifest(ArtifactStore(place).path(stage, fingerprint))
        return None, None if damage is None else DamagedArtifactError(damage, REMEDY_ELSEWHERE)

    def _fault_elsewhere(self, artifact: Artifact) -> str | None:
        """By sizes, and where it was found damaged before, by digests."""
        files, key = artifact.manifest.files, (artifact.manifest.stage, artifact.manifest.fingerprint)
        if remembered(self.work(*key)) is None:
            return size_fault(artifact.path, files)
        return fault(artifact.path, files, self.work(*key) / VERIFIED)

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
        raise DamagedArtifactError(str(error), remedy_at(directory)) from error
    version = values.get("schema_version")
    if type(version) is not int:
        raise DamagedArtifactError(f"{directory / name} cannot be read (it is no manifest)", remedy_at(directory))
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{directory} has manifest schema {version} and this code reads {SCHEMA_VERSION}; "
            f"remove it and run again, or use the version of unclip that made it ({values.get('code_version')})"
        )
    try:
        return Artifact(directory, Manifest.model_validate(values))
    except ValidationError as error:
        wrong = next((each for each in error.errors() if each["type"] != "extra_forbidden"), None)
        if wrong is not None:
            where = ".".join(map(str, wrong["loc"]))
            said = f"{directory / name} cannot be read ({where}: {wrong['msg']})"
            raise DamagedArtifactError(said, remedy_at(directory)) from error
        raise UserError(
            f"{directory / name} cannot be read; remove {directory} and run again, or use the version of unclip that "
            f"made it ({values.get('code_version')})"
        ) from error


def _read_own(directory: Path, name: str = MANIFEST) -> Artifact | None:
    """The same at an artifact's place in a store, where another's manifest is damage too."""
    artifact = read_artifact(directory, name)
    own = f"{directory.parent.name}/{directory.name}"
    if artifact is not None and artifact.name != own:
        raise DamagedArtifactError(f"{directory / name} is the one of {artifact.name}", remedy_at(directory))
    return artifact


@lru_cache(maxsize=4096)
def _content_at(directory: Path, _inode: int, _mtime_ns: int) -> str | None:
    """Of the artifact there, whose manifest is that one."""
    try:
        artifact = read_artifact(directory)
    except UserError:
        return None
    return None if artifact is None else artifact.content_sha256


def _lost_manifest(directory: Path) -> str | None:
    """In words, that an artifact's directory has no manifest of any name: what is made lies beside it until it has."""
    is_lost = directory.is_dir() and not any(os.path.lexists(directory / name) for name in (MANIFEST, SET_ASIDE))
    return f"{directory / MANIFEST} is gone" if is_lost else None


def _set_aside(directory: Path, inode: int) -> bool:
    """Give the manifest that was read another name; whether it has none of its own any more."""
    manifest, aside = directory / MANIFEST, directory / SET_ASIDE
    if directory.is_symlink():  # to a store of others', which is theirs to mend
        directory.unlink(missing_ok=True)
        return True
    try:
        manifest.rename(aside)
        if aside.lstat().st_ino != inode:  # meanwhile another process has set it aside and made it anew
            aside.rename(manifest)
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:  # a store of others'
        return False
    return True
