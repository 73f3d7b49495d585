"""What planning needs to know of a stage, said where no torch is imported."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline.config import Settings
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, Numbers
from pipeline.workflow.weights import Shape

S = TypeVar("S", bound=Settings)


class Arity(StrEnum):
    """How many stages may stand behind an input."""

    ONE = "one"
    OPTIONAL = "optional"
    ANY = "any"


@dataclass(frozen=True)
class Input:
    """A named input; it takes the output of the same name."""

    name: str
    arity: Arity = Arity.ONE


class Better(StrEnum):
    """Which way a metric improves."""

    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True)
class StageSettings:
    """One stage of a composed workflow: its class and its validated settings."""

    kind: str
    settings: Settings


@dataclass(frozen=True, eq=False)
class Workflow:
    """The stages of one workflow, by name, and by the same names the numbers of the weights that some start from."""

    stages: Mapping[str, StageSettings]
    initial: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """The kinds of its stages."""
        return {stage.kind for stage in self.stages.values()}

    def of(self, schema: type[S]) -> dict[str, S]:
        """The settings of that class, by where they stand, such as "stage.clip", in the workflow's order."""
        return {
            f"stage.{name}": stage.settings for name, stage in self.stages.items() if isinstance(stage.settings, schema)
        }


@dataclass(frozen=True)
class ForeignWeights:
    """Weights on disk that no run made: their files by name, and the settings that go with them, by dotted key.

    `numbers` are those that an artifact of the same kind would have, as far as they are known, `shapes` those that some
    of the weights must have by what the settings say.
    """

    files: Mapping[str, Path]
    dictated: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class StageDeclaration:
    """A class of stages. `version` goes up whenever the same settings would make something else.

    `run` names the function that does the work ("module:function"); it is imported in the process that runs the stage.
    `numbers` is what the output's consumers are told of it.
    `check` raises `UserError` where settings contradict each other or other stages of the workflow; it is given the
    path of the settings, such as "stage.clip", the settings, and the workflow.
    `identity` turns settings into what counts in the fingerprint, for settings that point to files outside the project.
    A stage that `computes` makes something else under another seed or precision: both are in its fingerprint. One that
    only gathers what is there (files, shards drawn from a seed of their own) does not, and is shared between them.
    A `repeatable` output may have several producers in a workflow (two upsamplers).
    `better` says which way final metrics improve, by shell patterns of their names; a report marks the best of those.
    `place` turns settings into what a consumer must be told of where this run keeps what the output refers to and does
    not hold, such as the user's own shards; it is no part of what the output is.
    `usage` is a function (run's name, artifact, a caption) -> Markdown that tells a model card's reader how to use
    the output, `origin` one (artifact) -> Markdown that says what of others' work it was made from, "" for none.
    `dictated` is given the path of the settings and these as the config has them, and returns those that names and
    files among them dictate, by dotted key, such as the sizes of a network.
    `inherits` are the settings, by dotted key, that go with the weights of an artifact when a stage starts from it by
    `initial`; a stage of a class without any cannot. `foreign` finds other weights than runs' to start from: by scheme,
    a function (path, the key that it was given as) -> `ForeignWeights`.
    `notice` gives a line, or None, that a plan says of the stage's settings in the workflow, and that blocks nothing.
    `rehearse` names a function ("module:function") that gives a forecast what the stage would work with; it is imported
    when a forecast is asked for. Of a stage without one a forecast knows nothing.
    """

    version: int
    settings: type[Settings]
    run: str
    output: str
    inputs: tuple[Input, ...] = ()
    computes: bool = True
    repeatable: bool = False
    numbers: type[Numbers] = Numbers
    check: Callable[[str, Any, Workflow], None] | None = None
    identity: Callable[[Any], dict[str, Any]] | None = None
    better: Mapping[str, Better] = field(default_factory=dict)
    place: Callable[[Any], Settings | None] | None = None
    usage: Callable[[str, Artifact, str], str] | None = None
    origin: Callable[[Artifact], str] | None = None
    dictated: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None
    inherits: tuple[str, ...] | None = None
    foreign: Mapping[str, Callable[[Path, str], ForeignWeights]] = field(default_factory=dict)
    notice: Callable[[Any, Workflow], str | None] | None = None
    rehearse: str | None = None


@dataclass(frozen=True)
class Catalog:
    """Every class of stages, by its kind."""

    stages: Mapping[str, StageDeclaration]

    def check(self, workflow: Workflow) -> None:
        """Raise `UserError` for whatever can be known to be wrong within and between stages before any runs."""
        for name, stage in workflow.stages.items():
            check = self.stages[stage.kind].check
            if check is not None:
                check(f"stage.{name}", stage.settings, workflow)


class Blocked(Exception):  # noqa: N818 - a state of a plan, not a fault
    """Raised by a declaration's `identity` when a stage cannot be planned yet; the message says why and the remedy."""


def resolve(reference: str) -> Any:
    """Import "module:name". Raises `UserError` where it does not exist."""
    module_name, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise UserError(f"{reference!r} names nothing that can be imported ({error}); use module:name") from error


def modules_in(package: str) -> dict[str, ModuleType]:
    """The modules of a package by their names: what stands in its folder is found, and is written down nowhere else."""
    found = sorted(each.name for each in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return {name: importlib.import_module(f"{package}.{name}") for name in found}
