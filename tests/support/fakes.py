"""A small world of stages for tests of the engine: real declarations and settings, no networks."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from pipeline.compose import CONFIG_DIRECTORY
from pipeline.config import (
    RUNTIME,
    OnDamage,
    PathSettings,
    Positive,
    RunConfig,
    RunSettings,
    Settings,
    StoreSettings,
    TrackedArtifacts,
    TrackingMode,
    TrackingSettings,
    TrainerSettings,
    validate,
)
from pipeline.workflow import publish as publishing
from pipeline.workflow.artifacts import SCHEMA_VERSION, Artifact, Manifest
from pipeline.workflow.declaration import Arity, Blocked, Catalog, Input, StageDeclaration
from pipeline.workflow.digests import describe_files
from pipeline.workflow.fingerprint import counted_settings
from pipeline.workflow.plan import Plan, PlannedStage, plan_run


class SourceSettings(Settings):
    pictures: Positive
    directory: Annotated[str, RUNTIME] = "here"
    is_there: Annotated[bool, RUNTIME] = True


class EncoderSettings(Settings):
    width: Positive
    batch_size: Annotated[Positive, RUNTIME] = 8


class LossSettings(Settings):
    weight: float
    shown_as: Annotated[str, RUNTIME] = "curve"


class DecoderSettings(Settings):
    channels: tuple[int, ...]
    loss: LossSettings
    note: str | None = None


class EnlargerSettings(Settings):
    size: Positive


class JudgeSettings(Settings):
    samples: Positive


def source_identity(settings: SourceSettings) -> dict[str, Any]:
    if not settings.is_there:
        raise Blocked("the pictures are not there; fetch them")
    return counted_settings(settings)


STAGES = {
    "source": StageDeclaration(
        version=1,
        settings=SourceSettings,
        run=f"{__name__}:nothing",
        output="data",
        computes=False,
        identity=source_identity,
    ),
    "encoder": StageDeclaration(
        version=1, settings=EncoderSettings, run=f"{__name__}:nothing", output="clip", inputs=(Input("data"),)
    ),
    "decoder": StageDeclaration(
        version=1,
        settings=DecoderSettings,
        run=f"{__name__}:nothing",
        output="decoder",
        inputs=(Input("data"), Input("clip"), Input("prior", Arity.OPTIONAL)),
    ),
    "enlarger": StageDeclaration(
        version=1,
        settings=EnlargerSettings,
        run=f"{__name__}:nothing",
        output="upsampler",
        inputs=(Input("data"),),
        repeatable=True,
    ),
    "judge": StageDeclaration(
        version=1,
        settings=JudgeSettings,
        run=f"{__name__}:nothing",
        output="verdict",
        inputs=(Input("clip"), Input("decoder"), Input("upsampler", Arity.ANY)),
    ),
}

CATALOG = Catalog(STAGES)


def default_trainer() -> dict[str, Any]:
    """What conf/ says of every stage's trainer."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIG_DIRECTORY / "trainer" / "auto.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


WORKFLOW: dict[str, dict[str, Any]] = {
    "prepare": {"kind": "source", "pictures": 10},
    "clip": {"kind": "encoder", "width": 4},
    "decoder": {"kind": "decoder", "channels": [1, 2], "loss": {"weight": 0.1}},
    "upsampler_1": {"kind": "enlarger", "size": 32},
    "upsampler_2": {"kind": "enlarger", "size": 64},
    "evaluate": {"kind": "judge", "samples": 3},
}

TRAINER = validate(
    TrainerSettings,
    {**default_trainer(), "accelerator": "cpu", "cpu_threads": 1, "cache_mib": 64, "log_every_steps": 1},
)


def run_config(outputs: Path, stages: dict[str, dict[str, Any]] | None = None, **changes: Any) -> RunConfig:
    config = RunConfig(
        run=RunSettings(name="trial"),
        seed=0,
        paths=PathSettings(outputs=outputs),
        catalog=f"{__name__}:CATALOG",
        data={},
        stage=WORKFLOW if stages is None else stages,
        trainer=TRAINER,
        launch={"kind": "local", "max_parallel": None},
        store=StoreSettings(on_damage=OnDamage.STOP),
        tracking=TrackingSettings(
            mode=TrackingMode.NONE, project="test", entity=None, artifacts=TrackedArtifacts.REFERENCE, tensorboard=False
        ),
    )
    return config.model_copy(update=changes)


def with_settings(stage: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {**WORKFLOW, stage: {**WORKFLOW[stage], **settings}}


def plan(outputs: Path, stages: dict[str, dict[str, Any]] | None = None, **changes: Any) -> dict[str, PlannedStage]:
    return by_name(plan_run(run_config(outputs, stages, **changes)))


def by_name(made: Plan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in made.stages}


def actions(stages: dict[str, PlannedStage]) -> dict[str, str]:
    return {name: stage.action.value for name, stage in stages.items()}


def publish(
    stage: PlannedStage,
    content: bytes = b"weights",
    finished_at: str = "2026-01-02T03:04:05+0000",
    file: str = "weights.bin",
) -> Artifact:
    """Publish what a stage of a plan would make, without running it."""
    assert stage.frozen is not None
    frozen = stage.frozen
    building = publishing.start_building(frozen.store, frozen.stage, frozen.fingerprint, 1)
    (building / file).write_bytes(content)
    return publishing.publish(
        frozen.store, building, manifest_of(frozen.stage, frozen.fingerprint, building, stage, finished_at)
    )


def manifest_of(
    name: str, fingerprint: str, building: Path, stage: PlannedStage | None = None, finished_at: str = "2026"
) -> Manifest:
    frozen = stage.frozen if stage else None
    return Manifest(
        schema_version=SCHEMA_VERSION,
        stage=name,
        kind=frozen.kind if frozen else name,
        fingerprint=fingerprint,
        identity=frozen.identity if frozen else {},
        inputs={name: [each.fingerprint for each in found] for name, found in frozen.inputs.items()} if frozen else {},
        config=frozen.settings if frozen else {},
        code_version="0",
        made_by_run="trial",
        finished_at=finished_at,
        duration_s=1.25,
        samples_seen=0,
        numbers={},
        metrics={"loss": 0.5},
        files=describe_files(building),
    )


def publish_all(stages: dict[str, PlannedStage]) -> None:
    for stage in stages.values():
        publish(stage)


def replace_version(kind: str, version: int) -> StageDeclaration:
    return replace(STAGES[kind], version=version)
