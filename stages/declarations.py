"""Every class of stages: its inputs, output, version and settings. Imports no torch, so that planning is quick."""

from functools import partial
from typing import Any

from pipeline.data.summary import index_identity
from pipeline.errors import UserError
from pipeline.workflow.artifacts import file_sha256
from pipeline.workflow.declaration import Arity, Blocked, Catalog, Input, StageDeclaration
from pipeline.workflow.fingerprint import counted_settings
from stages.checks import check_workflow
from stages.settings import (
    ClipSettings,
    DecoderSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    JudgeSettings,
    PrepareSettings,
    PriorSettings,
    UpsamplerSettings,
    WebDatasetSettings,
)
from stages.sources import webdataset


def prepare_identity(settings: PrepareSettings) -> dict[str, Any]:
    """Made data is its settings; the user's own shards are their index (names, sizes, counts), wherever they are."""
    counted = counted_settings(settings)
    if isinstance(settings.data, WebDatasetSettings):
        try:
            summary = webdataset.summary(settings.data, settings.data.cache_dir)
        except UserError as error:
            raise Blocked(str(error)) from error
        counted["data"] |= {"shards": index_identity(summary)}
    return counted


def clip_identity(settings: ClipSettings, stage: str = "clip") -> dict[str, Any]:
    """A checkpoint to start from counts by its contents, not by its path."""
    counted = counted_settings(settings)
    if settings.checkpoint is not None:
        try:
            counted["checkpoint"] = file_sha256(settings.checkpoint)
        except OSError as error:
            raise UserError(
                f"stage.{stage}.checkpoint={settings.checkpoint} cannot be read ({error.strerror}); "
                "give the path of a local open_clip checkpoint"
            ) from error
    return counted


CATALOG = Catalog(
    stages={
        "prepare": StageDeclaration(
            version=2, settings=PrepareSettings, run="stages.prepare:run", output="data", identity=prepare_identity
        ),
        "clip": StageDeclaration(
            version=2,
            settings=ClipSettings,
            run="stages.clip:run",
            output="clip",
            inputs=(Input("data"),),
            identity=clip_identity,
        ),
        "embed": StageDeclaration(
            version=1,
            settings=EmbedSettings,
            run="stages.embed:run",
            output="embeddings",
            inputs=(Input("data"), Input("clip")),
        ),
        "prior": StageDeclaration(
            version=1,
            settings=PriorSettings,
            run="stages.prior:run",
            output="prior",
            inputs=(Input("data"), Input("clip"), Input("embeddings")),
        ),
        "decoder": StageDeclaration(
            version=3,
            settings=DecoderSettings,
            run="stages.decoder:run",
            output="decoder",
            inputs=(Input("data"), Input("clip"), Input("embeddings", Arity.OPTIONAL)),
        ),
        "upsampler": StageDeclaration(
            version=1,
            settings=UpsamplerSettings,
            run="stages.upsampler:run",
            output="upsampler",
            inputs=(Input("data"),),
            repeatable=True,
        ),
        "judge": StageDeclaration(version=1, settings=JudgeSettings, run="stages.judge:run", output="judge"),
        "judge_clip": StageDeclaration(
            version=2,
            settings=ClipSettings,
            run="stages.clip:run",
            output="judge_clip",
            inputs=(Input("data"),),
            identity=partial(clip_identity, stage="judge_clip"),
        ),
        "evaluate": StageDeclaration(
            version=2,
            settings=EvaluateSettings,
            run="stages.evaluate:run",
            output="evaluation",
            inputs=(
                Input("data"),
                Input("clip"),
                Input("prior", Arity.OPTIONAL),
                Input("decoder"),
                Input("upsampler", Arity.ANY),
                Input("judge", Arity.OPTIONAL),
                Input("judge_clip", Arity.OPTIONAL),
            ),
        ),
        "export": StageDeclaration(
            version=1,
            settings=ExportSettings,
            run="stages.export:run",
            output="model",
            inputs=(
                Input("clip"),
                Input("prior", Arity.OPTIONAL),
                Input("decoder"),
                Input("upsampler", Arity.ANY),
            ),
        ),
    },
    check=check_workflow,
)
