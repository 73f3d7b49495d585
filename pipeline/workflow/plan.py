"""What a run will do with each stage: reuse, resume, run or blocked, and why. Imports no torch, writes nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.config import (
    OnDamage,
    RunConfig,
    Settings,
    TrainerSettings,
    TrainingStageSettings,
    stage_trainer,
    validate,
)
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.batch_shape import check_batch
from pipeline.workflow.code import Code, current_code, read_record
from pipeline.workflow.declaration import Blocked, Catalog, StageDeclaration, StageSettings, Workflow, resolve
from pipeline.workflow.fingerprint import counted_settings, differences, fingerprint
from pipeline.workflow.frozen import ArtifactReference, FrozenStage
from pipeline.workflow.graph import Node, build_graph, declaration_of
from pipeline.workflow.initial import Initial, find_initial, require_as_typed, with_dictated
from pipeline.workflow.inputs_read import inputs_read
from pipeline.workflow.ownership import was_published
from pipeline.workflow.progress import CHECKPOINTS, latest_checkpoint_samples, read_failure
from pipeline.workflow.sealed import warn

MAX_DIFFERENCES_SHOWN = 3
_DIGEST = re.compile("[0-9a-f]{64}")


class Action(StrEnum):
    """What happens to a stage."""

    REUSE = "reuse"
    RESUME = "resume"
    RUN = "run"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan. A blocked stage has no fingerprint and no frozen form.

    `place` says where this run keeps what the stage's output refers to and does not hold, `notice` is a line on what
    its settings cannot give, `other_code` are the files that changed since the checkpoint it would go on from.
    """

    name: str
    kind: str
    action: Action
    reason: str
    upstream: tuple[str, ...]
    frozen: FrozenStage | None = None
    place: dict[str, Any] | None = None
    notice: str | None = None
    other_code: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of what the stage makes, once it can be known."""
        return self.frozen.fingerprint if self.frozen else None


@dataclass(frozen=True)
class Plan:
    """A run's stages in an order that can be followed."""

    config: RunConfig
    store: ArtifactStore
    stages: tuple[PlannedStage, ...]
    code: Code
    overrides: tuple[str, ...] = field(default=())

    @property
    def blocked(self) -> list[PlannedStage]:
        """The stages that cannot run yet."""
        return [stage for stage in self.stages if stage.action is Action.BLOCKED]

    def with_code(self) -> "Plan":
        """The same stages, frozen to run the code that they were planned with, from its snapshot alone."""
        update = {"code": self.code.digest}
        frozen = [stage.frozen and stage.frozen.model_copy(update=update) for stage in self.stages]
        stages = [replace(stage, frozen=each) for stage, each in zip(self.stages, frozen, strict=True)]
        return replace(self, stages=tuple(stages))


def require_unblocked(plans: Sequence[Plan]) -> None:
    """Raise `UserError` with the first reason why one of these plans cannot run."""
    for plan in plans:
        if plan.blocked:
            first = plan.blocked[0]
            raise UserError(f"stage {first.name} is blocked: {first.reason}")


@dataclass(frozen=True)
class _ValidStage:
    """`unmet` says why the weights that it is to start from are not there yet."""

    stage: StageSettings
    trainer: TrainerSettings
    initial: Initial | None
    unmet: str | None


def plan_run(config: RunConfig, overrides: tuple[str, ...] = ()) -> Plan:
    """Validate a composed config, connect its stages, and decide what happens to each.

    Raises `UserError` for whatever can be known to be wrong before anything runs.
    """
    catalog: Catalog = resolve(config.catalog)
    for place in config.paths.also_read:
        if not place.is_dir():
            warn(f"paths.also_read has {place}, which is no directory: nothing is taken from there")
    if config.paths.outputs.exists() and not config.paths.outputs.is_dir():
        raise UserError(f"paths.outputs={config.paths.outputs} is a file; give a directory")
    store = ArtifactStore(config.paths.outputs.absolute(), tuple(each.absolute() for each in config.paths.also_read))
    valid = {
        name: _validate_stage(name, values, config, catalog, store, overrides) for name, values in config.stage.items()
    }
    stages = {name: each.stage for name, each in valid.items()}
    graph = build_graph(stages, catalog)
    workflow = Workflow(stages, {name: each.initial.numbers for name, each in valid.items() if each.initial})
    catalog.check(workflow)
    code = current_code(config.catalog)
    planned: dict[str, PlannedStage] = {}
    for node in graph:
        stage = _plan_stage(node, valid[node.name], planned, config, store, overrides, code)
        notice = node.declaration.notice
        said = notice(node.stage.settings, workflow) if notice is not None else None
        planned[node.name] = replace(stage, notice=said)
    return Plan(config, store, tuple(planned.values()), code, overrides)


def _validate_stage(
    name: str,
    values: Mapping[str, Any],
    config: RunConfig,
    catalog: Catalog,
    store: ArtifactStore,
    overrides: tuple[str, ...],
) -> _ValidStage:
    own = dict(values)
    kind = own.pop("kind", None)
    if kind is None:
        raise UserError(
            f"stage.{name} has no `kind`, so it is no stage of this workflow; remove what sets it, or add "
            f"'~stage.{name}' where an experiment sets it"
        )
    trainer_overrides = own.pop("trainer", None) or {}
    declaration = declaration_of(name, kind, catalog)
    path, initial, unmet = f"stage.{name}", None, None
    dictated = dict(declaration.dictated(path, own)) if declaration.dictated is not None else {}
    source = f"the model that {path} names"
    if isinstance(own.get("initial"), str):
        try:
            initial = find_initial(own["initial"], name, kind, declaration, config.run.name, store)
        except Blocked as reason:
            unmet = str(reason)
        else:
            dictated, source = {**dictated, **initial.dictated}, initial.source
    settings = _validate_settings(declaration, own, path)
    if dictated:
        configured, settings = settings, _validate_settings(declaration, with_dictated(own, dictated), path)
        require_as_typed(configured, settings, dictated, path, source, overrides)
    trainer = stage_trainer(config, trainer_overrides, f"stage.{name}.trainer")
    if isinstance(settings, TrainingStageSettings):
        check_batch(settings.global_batch_size, trainer, f"stage.{name}")
    return _ValidStage(StageSettings(kind, settings), trainer, initial, unmet)


def _validate_settings(declaration: StageDeclaration, values: Mapping[str, Any], path: str) -> Settings:
    try:
        return validate(declaration.settings, values, path)
    except UserError as error:
        # A stage takes the group `data` in by interpolation: its keys are typed without the stage.
        message = str(error).removeprefix(f"{path}.data: ")
        typed = message.removeprefix(f"{path}.") if message.startswith(f"{path}.data.") else message
        raise UserError(typed) from error


def _plan_stage(
    node: Node,
    valid: _ValidStage,
    planned: Mapping[str, PlannedStage],
    config: RunConfig,
    store: ArtifactStore,
    overrides: tuple[str, ...],
    code: Code,
) -> PlannedStage:
    upstream = tuple(node.upstream)

    def blocked(reason: str) -> PlannedStage:
        return PlannedStage(node.name, node.stage.kind, Action.BLOCKED, reason, upstream)

    waiting_for = [name for name in upstream if planned[name].action is Action.BLOCKED]
    if waiting_for:
        return blocked(f"needs {', '.join(waiting_for)}")
    if valid.unmet is not None:
        return blocked(valid.unmet)
    try:
        identity = _identity(node, valid, config)
    except Blocked as reason:
        return blocked(str(reason))
    references = {
        name: [
            ArtifactReference(stage=each, fingerprint=planned[each].fingerprint or "", place=planned[each].place)
            for each in producers
        ]
        for name, producers in node.inputs.items()
    }
    input_fingerprints = {name: [each.fingerprint for each in found] for name, found in references.items()}
    frozen = FrozenStage(
        run=config.run.name,
        group=config.run.group or config.run.name,
        stage=node.name,
        kind=node.stage.kind,
        fingerprint=fingerprint(identity, input_fingerprints),
        identity=identity,
        inputs=references,
        catalog=config.catalog,
        settings=node.stage.settings.model_dump(mode="json"),
        seed=config.seed,
        outputs=store.outputs,
        trainer=valid.trainer,
        tracking=config.tracking,
        overrides=list(overrides),
        notify=config.notify,
        initial=_reference(valid.initial),
    )
    damage = store.known_damage(node.name, frozen.fingerprint)
    if damage is not None and config.store.on_damage is OnDamage.STOP:
        return blocked(str(damage))
    action, reason = _decide(node, frozen, planned, store, damage and damage.fault)
    if valid.initial is not None and action is Action.RUN:
        others = _other_inputs(valid.initial, input_fingerprints)
        reason = f"{reason}; starts from {valid.initial.source}, {valid.initial.weights} weights{others}"
    place = node.declaration.place(node.stage.settings) if node.declaration.place else None
    other_code: list[str] = []
    if action is Action.RESUME:
        other_code = code.changed_since(read_record(frozen.work))
        reason += f"; other code than then: {several(other_code)}; run it with --accept-code" if other_code else ""
    elif action is Action.REUSE:
        own = node.declaration.run.partition(":")[0].rpartition(".")[0].replace(".", "/")
        changed = code.changed_since(read_record(store.path(node.name, frozen.fingerprint)), f"{own}/")
        unraised = f"{several(changed)} changed since: if it makes something else now, raise the stage's version"
        reason += f"; {unraised}" if changed else ""
    return PlannedStage(
        node.name, node.stage.kind, action, reason, upstream, frozen,
        place.model_dump(mode="json") if place else None, other_code=tuple(other_code),
    )  # fmt: skip


def _reference(initial: Initial | None) -> ArtifactReference | None:
    if initial is None or initial.artifact is None:
        return None
    manifest = initial.artifact.manifest
    return ArtifactReference(stage=manifest.stage, fingerprint=manifest.fingerprint)


def _other_inputs(initial: Initial, inputs: Mapping[str, list[str]]) -> str:
    """Which inputs the weights were made with others of, in half a sentence; "" for none."""
    made_with = initial.artifact.manifest.inputs if initial.artifact is not None else inputs
    others = [name for name, found in inputs.items() if made_with.get(name) != found]
    return f", made with other {' and '.join(others)}" if others else ""


def _identity(node: Node, valid: _ValidStage, config: RunConfig) -> dict[str, Any]:
    declaration = node.declaration
    describe = declaration.identity or counted_settings
    identity: dict[str, Any] = {
        "stage": node.name,
        "version": declaration.version,
        "settings": describe(node.stage.settings),
    }
    if valid.initial is not None:
        # By its contents, whatever it is called now.
        identity["settings"] = {**identity["settings"], "initial": valid.initial.counted}
    if declaration.computes:
        identity |= {"seed": config.seed, "precision": valid.trainer.precision.value}
    return identity


def _decide(
    node: Node, frozen: FrozenStage, planned: Mapping[str, PlannedStage], store: ArtifactStore, damage: str | None
) -> tuple[Action, str]:
    artifact = None if damage is not None else store.find(node.name, frozen.fingerprint)
    if artifact is not None:
        manifest = artifact.manifest
        where = "" if artifact.path.is_relative_to(store.outputs) else f", in {artifact.path.parents[2]}"
        finished_at = manifest.finished_at[:16].replace("T", " ")
        others = _unless_removed(store.made_anew_since(manifest.inputs_sha256), artifact.path)
        return Action.REUSE, f"finished {finished_at} in {manifest.duration_s:.0f} s{where}{others}"
    work = store.work(node.name, frozen.fingerprint)
    failure = read_failure(work)
    after_failure = f"; the last attempt failed: {failure.message}" if failure else ""
    if damage is not None:
        after_failure = f", as {damage}"
    samples_seen = latest_checkpoint_samples(work)
    if samples_seen is not None:
        others = _unless_removed(store.made_anew_since(inputs_read(work)), work / CHECKPOINTS)
        return Action.RESUME, f"from the checkpoint at {samples_seen:,} samples{others}{after_failure}"
    if damage is not None:
        return Action.RUN, f"anew{after_failure}"
    if was_published(work):
        return Action.RUN, f"anew, as {store.path(node.name, frozen.fingerprint)} is gone"
    changed_inputs = [name for name in node.upstream if planned[name].action is not Action.REUSE]
    nearest = _nearest(frozen, store)
    if nearest is None:
        return Action.RUN, f"new{after_failure}"
    found = differences(nearest.manifest.identity, frozen.identity)
    changes = [_change(_setting_key(node.name, key), old, new) for key, old, new in found]
    if changes:
        return Action.RUN, f"changed {several(changes)}{after_failure}"
    if changed_inputs:
        return Action.RUN, f"because {', '.join(changed_inputs)} will be new{after_failure}"
    return Action.RUN, f"its inputs are others than before{after_failure}"


def _unless_removed(others: str, path: Path) -> str:
    return f"; {others}: remove {path} to begin with these" if others else ""


def several(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - MAX_DIFFERENCES_SHOWN
    return ", ".join([*names[:MAX_DIFFERENCES_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _nearest(frozen: FrozenStage, store: ArtifactStore) -> Artifact | None:
    """The artifact of this stage that differs least, the newest first among equals."""
    found = sorted(store.all_of(frozen.stage), key=lambda each: each.manifest.finished_at, reverse=True)
    return min(found, key=lambda each: _distance(each, frozen), default=None)


def _distance(artifact: Artifact, frozen: FrozenStage) -> tuple[int, bool]:
    inputs = {name: [each.fingerprint for each in found] for name, found in frozen.inputs.items()}
    return len(list(differences(artifact.manifest.identity, frozen.identity))), artifact.manifest.inputs != inputs


def _setting_key(stage: str, key: str) -> str:
    """The key as the user would type it."""
    if key.startswith("settings.data."):
        return key.removeprefix("settings.")
    if key.startswith("settings."):
        return f"stage.{stage}.{key.removeprefix('settings.')}"
    return {"precision": "trainer.precision", "version": f"the version of stage {stage}"}.get(key, key)


def _change(key: str, old: object, new: object) -> str:
    # A digest says nothing to a reader; what weights are called is said elsewhere.
    return key if _DIGEST.search(f"{old} {new}") else f"{key}: {_short(old)} -> {_short(new)}"


def _short(value: object, limit: int = 40) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
