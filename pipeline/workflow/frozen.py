"""A stage, frozen: everything that its process needs, resolved, in one JSON file that no later edit can change."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.config import (
    NotifySettings,
    Seed,
    Settings,
    TrackingSettings,
    TrainerSettings,
    TrainingStageSettings,
    validate,
)
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.batch_shape import largest_piece, shape_of_batch
from pipeline.workflow.declaration import StageDeclaration, resolve
from pipeline.workflow.sealed import DamagedRecordError, digest_of, read_record, write_json_atomically

FROZEN = "frozen"
"""In a work directory: what its stage was or will be started by."""
SMALLER = ".smaller.json"
"""Beside a frozen stage's file: the same with a smaller micro-batch."""

StageKey = tuple[str, str]
"""A stage's name and fingerprint."""


class ArtifactReference(Settings):
    """An artifact by stage and fingerprint.

    `place` says where this run keeps what the artifact refers to and does not hold.
    """

    stage: str
    fingerprint: str
    place: dict[str, Any] | None = None


class FrozenStage(Settings):
    """The entry point's only argument, locally, under Slurm and in tests alike."""

    run: str
    group: str
    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    inputs: dict[str, list[ArtifactReference]]
    catalog: str
    settings: dict[str, Any]
    seed: Seed
    outputs: Path
    trainer: TrainerSettings
    tracking: TrackingSettings
    overrides: list[str]
    initial: ArtifactReference | None = None
    code: str | None = None
    """The digest of the code that it was submitted with; None where whatever is imported runs it."""
    notify: NotifySettings | None = None  # newer than files that lack it

    @property
    def store(self) -> ArtifactStore:
        """Where this stage's inputs are and its artifact goes."""
        return ArtifactStore(self.outputs)

    @property
    def work(self) -> Path:
        """This stage's directory for what is in progress."""
        return self.store.work(self.stage, self.fingerprint)

    @property
    def key(self) -> StageKey:
        """What it makes."""
        return self.stage, self.fingerprint

    @property
    def needs(self) -> list[StageKey]:
        """The stages whose artifacts are its inputs."""
        return [(each.stage, each.fingerprint) for references in self.inputs.values() for each in references]

    @property
    def reads(self) -> list[StageKey]:
        """The stages whose artifacts it reads: its inputs, and what it starts from."""
        return [*self.needs, *((each.stage, each.fingerprint) for each in [self.initial] if each is not None)]

    @property
    def declaration(self) -> StageDeclaration:
        """The declaration of this stage's class."""
        return resolve(self.catalog).stages[self.kind]

    @property
    def tasks(self) -> "Tasks":
        """The processes that run this stage: one per device where it trains, else one."""
        if issubclass(self.declaration.settings, TrainingStageSettings):
            return Tasks(self.trainer.num_nodes, self.trainer.devices)
        return Tasks(1, 1)

    def read_settings(self) -> Settings:
        """The stage's settings, typed."""
        return validate(self.declaration.settings, self.settings, f"stage.{self.stage}")

    def find_inputs(self) -> dict[str, tuple[Artifact, ...]]:
        """The artifacts behind each input, to be told of. Raises `UserError` where one is not there."""
        return self._inputs(self.store.find)

    def open_inputs(self) -> dict[str, tuple[Artifact, ...]]:
        """The same, to be used. Raises `UserError` where one is not there, or damaged."""
        return self._inputs(self.store.open)

    def find_initial(self) -> Artifact | None:
        """The artifact whose weights it starts from, to be used; or None. Raises `UserError` as `open_inputs` does."""
        return None if self.initial is None else self._input(self.initial, self.store.open)

    def _inputs(self, find: Callable[[str, str], Artifact | None]) -> dict[str, tuple[Artifact, ...]]:
        return {name: tuple(self._input(each, find) for each in found) for name, found in self.inputs.items()}

    def _input(self, reference: ArtifactReference, find: Callable[[str, str], Artifact | None]) -> Artifact:
        artifact = find(reference.stage, reference.fingerprint)
        if artifact is None:
            damage = self.store.known_damage(reference.stage, reference.fingerprint)
            if damage is not None:  # another process has found it
                raise damage
            raise UserError(
                f"stage {self.stage} needs the artifact {reference.stage}/{reference.fingerprint[:12]}, "
                f"which is not under {self.outputs}; run the workflow again so that {reference.stage} is made first"
            )
        return artifact


_FROZEN = TypeAdapter(FrozenStage)


@dataclass(frozen=True)
class Tasks:
    """The processes of a stage: on how many nodes, and how many on each."""

    nodes: int
    per_node: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class FrozenFile:
    """A frozen stage and the file that holds it."""

    path: Path
    stage: FrozenStage


def frozen_path(stage: FrozenStage) -> Path:
    """Where the stage is written: a file named by its contents, so that a queued job's is never rewritten."""
    return _path_of(stage, stage.model_dump(mode="json"))


def _path_of(stage: FrozenStage, values: dict[str, Any]) -> Path:
    return stage.work / FROZEN / f"{digest_of(values)[:12]}.json"


def write_frozen(stage: FrozenStage, *, is_flushed: bool = True) -> FrozenFile:
    """Write the stage to its file, unless it is there."""
    values = stage.model_dump(mode="json")
    path = _path_of(stage, values)
    with suppress(UserError):
        read_frozen(path)
        return FrozenFile(path, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, values, is_flushed=is_flushed)
    return FrozenFile(path, stage)


def halve_micro_batch(path: Path) -> int | None:
    """Have what is read of that file from now on take at most half as many samples at once, which changes no result.

    The new number; None where there is nothing to halve.
    """
    frozen = read_frozen(path)
    settings = frozen.read_settings()
    if not isinstance(settings, TrainingStageSettings):
        return None
    shape = shape_of_batch(settings.global_batch_size, frozen.trainer)
    if shape.micro_batch_size == 1:
        return None
    half = largest_piece(shape.micro_batch_size * shape.accumulation, shape.micro_batch_size // 2)
    trainer = frozen.trainer.model_copy(update={"micro_batch_size": half})
    smaller = frozen.model_copy(update={"trainer": trainer})
    write_json_atomically(path.with_suffix(SMALLER), smaller.model_dump(mode="json"))
    return half


def read_frozen(path: Path) -> FrozenStage:
    """Read a frozen stage back. Raises `UserError` where the file is not there or not one."""
    smaller = path.with_suffix(SMALLER)
    path = smaller if smaller.exists() else path
    try:
        return read_record(_FROZEN, path)
    except (DamagedRecordError, OSError) as error:
        raise UserError(f"{path} is no frozen stage ({error}); start it through `unclip run`") from error
