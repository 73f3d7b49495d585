"""`stage.<name>.initial`: the weights that a stage starts from, another run's or others', and what they dictate."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.declaration import Blocked, StageDeclaration
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.weights import WEIGHTS_SUFFIXES, Shape, require_fit, weight_shapes

RUN = "run"
"""The scheme of an artifact: `run:NAME`, or `run:NAME/STAGE` where the stage has another name there."""


@dataclass(frozen=True)
class Initial:
    """The weights that a stage starts from.

    `weights` is their number, `counted` what of them counts in the fingerprint, `dictated` which settings go with them,
    by dotted key.
    `numbers` are what their consumers would be told. `artifact` is None for weights that no run made.
    """

    source: str
    weights: int
    counted: dict[str, Any]
    dictated: Mapping[str, Any]
    numbers: Mapping[str, Any]
    artifact: Artifact | None = None


def find_initial(
    source: str, name: str, kind: str, declaration: StageDeclaration, run: str, store: ArtifactStore
) -> Initial:
    """What `stage.<name>.initial=<source>` stands for in a run named `run`.

    Raises `UserError` where that is nothing, and `Blocked` where it is a stage that is not finished.
    """
    key = f"stage.{name}.initial={source}"
    scheme, _, address = source.partition(":")
    schemes = [RUN, *declaration.foreign]
    if declaration.inherits is None:
        raise UserError(f"{key}: stages of kind {kind} start from no other weights; leave it null")
    if scheme not in schemes or not address:
        raise UserError(f"{key} names no weights; write {' or '.join(map(_form_of, schemes))}")
    if scheme != RUN:
        try:
            foreign = declaration.foreign[scheme](Path(address), key)
        except KeyError as error:
            raise UserError(f"{key}: its configs say no {error}; give a folder that is whole") from error
        found = _shapes_in(foreign.files.values())
        require_fit(
            foreign.shapes, found, key, "give a folder whose weights are those of its configs", may_exceed=found
        )
        digests = {label: file_sha256(file) for label, file in foreign.files.items()}
        return Initial(source, len(found), {scheme: digests}, foreign.dictated, foreign.numbers)
    artifact = _artifact_of(key, address, name, kind, run, store)
    config = artifact.manifest.config
    dictated = {each: _at(config, each) for each in declaration.inherits if _at(config, each) is not None}
    number = len(_shapes_in(artifact.path / each.path for each in artifact.manifest.files))
    counted = {RUN: artifact.manifest.fingerprint}
    return Initial(source, number, counted, dictated, artifact.manifest.numbers, artifact)


def with_dictated(values: Mapping[str, Any], dictated: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings as the config has them, with what is dictated, by dotted key, in their place."""
    adapted = deepcopy(dict(values))
    for key, value in dictated.items():
        *parents, last = key.split(".")
        target = adapted
        for parent in parents:
            target = target[parent]
        target[last] = deepcopy(value)
    return adapted


def require_as_typed(
    configured: Settings, adapted: Settings, dictated: Iterable[str], path: str, source: str, overrides: Iterable[str]
) -> None:
    """Raise `UserError` where a command line says of the stage at `path` something else than `source` dictates."""
    before, after = configured.model_dump(mode="json"), adapted.model_dump(mode="json")
    for override in overrides:
        typed = override.lstrip("+~").partition("=")[0].rpartition("@")[2].removeprefix(f"{path}.")
        for key in dictated:
            if not (f"{typed}.".startswith(f"{key}.") or key.startswith(f"{typed}.")):
                continue
            inner = max(key, typed, key=len)
            found, given = _at(after, inner), _at(before, inner)
            if found != given:
                raise UserError(
                    f"{path}.{inner}={_shown(given)} is not that of {source}, which is {_shown(found)}; leave it out"
                )


def _shapes_in(files: Iterable[Path]) -> dict[str, Shape]:
    found = [weight_shapes(file) for file in files if file.suffix in WEIGHTS_SUFFIXES]
    return {name: shape for shapes in found for name, shape in shapes.items()}


def _artifact_of(key: str, address: str, name: str, kind: str, run: str, store: ArtifactStore) -> Artifact:
    from pipeline.workflow.runs import read_run  # it imports the plan, which imports this module

    run_name, _, stage = address.partition("/")
    if run_name == run:
        raise UserError(f"{key} is this run itself; give this one another name by run.name=...")
    try:
        record = read_run(store.outputs, run_name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    of_kind = [each.name for each in record.stages if each.kind == kind]
    stage = stage or (of_kind[0] if name not in of_kind and len(of_kind) == 1 else name)
    found = next((each for each in record.stages if each.name == stage), None)
    if found is None:
        close = get_close_matches(stage, of_kind, n=1) or of_kind
        hint = f"write run:{run_name}/{close[0]}" if close else f"it has no stage of kind {kind}: name another run"
        raise UserError(f"{key}: run {run_name} has no stage {stage!r}; {hint}")
    if found.kind != kind:
        raise UserError(f"{key}: stage {stage} of run {run_name} is of kind {found.kind}, not {kind}; name another")
    artifact = store.find(found.name, found.fingerprint)
    if artifact is None:
        raise Blocked(f"{key}: stage {stage} of run {run_name} is not finished; run {run_name} again first")
    return artifact


def _form_of(scheme: str) -> str:
    return "run:NAME" if scheme == RUN else f"{scheme}:PATH"


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(each)}" for name, each in value.items()) + "}"
    return str(value)
