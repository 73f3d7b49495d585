"""Every class of stages: its inputs, output, version and settings. Imports no torch, so that planning is quick."""

from functools import partial
from typing import Any

from pipeline.data.place import ShardPlace
from pipeline.errors import UserError
from pipeline.workflow.artifacts import file_sha256
from pipeline.workflow.declaration import Arity, Better, Blocked, Catalog, Input, StageDeclaration
from pipeline.workflow.fingerprint import counted_settings
from stages.prepare.sources import webdataset
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
from stages.unet import check_workflow


def prepare_identity(settings: PrepareSettings) -> dict[str, Any]:
    """Made data is its settings; the user's own shards are what is read of them, wherever they are."""
    counted = counted_settings(settings)
    if isinstance(settings.data, WebDatasetSettings):
        try:
            summary = webdataset.summary(settings.data)
        except UserError as error:
            raise Blocked(str(error)) from error
        counted["data"] = {
            "source": settings.data.source,
            "split_key": settings.data.split_key,
            "validation_fraction": settings.data.validation_fraction,
            **webdataset.identity(settings.data, summary),
        }
    return counted


def prepare_place(settings: PrepareSettings) -> ShardPlace | None:
    """Where this run finds the user's own shards, which the artifact refers to and does not hold."""
    return webdataset.place_of(settings.data) if isinstance(settings.data, WebDatasetSettings) else None


def clip_identity(settings: ClipSettings, stage: str = "clip") -> dict[str, Any]:
    """A checkpoint to start from counts by its contents, not by its path."""
    counted: dict[str, Any] = {**counted_settings(settings), "checkpoint": None}
    if settings.checkpoint is not None:
        try:
            counted["checkpoint"] = file_sha256(settings.checkpoint)
        except OSError as error:
            raise UserError(
                f"stage.{stage}.checkpoint={settings.checkpoint} cannot be read ({error.strerror}); "
                "give the path of a local open_clip checkpoint"
            ) from error
    return counted


_RETRIEVAL = {"R@*": Better.HIGH}

CATALOG = Catalog(
    stages={
        "prepare": StageDeclaration(
            version=3,
            settings=PrepareSettings,
            run="stages.prepare.run:run",
            output="data",
            computes=False,
            identity=prepare_identity,
            place=prepare_place,
        ),
        "clip": StageDeclaration(
            version=2,
            settings=ClipSettings,
            run="stages.clip.train:run",
            output="clip",
            inputs=(Input("data"),),
            identity=clip_identity,
            better=_RETRIEVAL,
            origin="stages.usage:clip_origin",
        ),
        "embed": StageDeclaration(
            version=1,
            settings=EmbedSettings,
            run="stages.embed.run:run",
            output="embeddings",
            inputs=(Input("data"), Input("clip")),
        ),
        "prior": StageDeclaration(
            version=1,
            settings=PriorSettings,
            run="stages.prior.train:run",
            output="prior",
            inputs=(Input("data"), Input("clip"), Input("embeddings")),
            better={"cosine_to_image": Better.HIGH},
        ),
        "decoder": StageDeclaration(
            version=3,
            settings=DecoderSettings,
            run="stages.decoder.train:run",
            output="decoder",
            inputs=(Input("data"), Input("clip"), Input("embeddings", Arity.OPTIONAL)),
            # Not the whole loss: it depends on the CLIP loss's weight.
            better={"diffusion": Better.LOW, "clip": Better.LOW},
            usage="stages.usage:sampling",
        ),
        "upsampler": StageDeclaration(
            version=1,
            settings=UpsamplerSettings,
            run="stages.upsampler.train:run",
            output="upsampler",
            inputs=(Input("data"),),
            repeatable=True,
            better={"psnr_db": Better.HIGH, "loss": Better.LOW},
        ),
        "judge": StageDeclaration(
            version=1,
            settings=JudgeSettings,
            run="stages.judge.train:run",
            output="judge",
            better={"*_at_*": Better.HIGH},
        ),
        "judge_clip": StageDeclaration(
            version=2,
            settings=ClipSettings,
            run="stages.clip.train:run",
            output="judge_clip",
            inputs=(Input("data"),),
            identity=partial(clip_identity, stage="judge_clip"),
            better=_RETRIEVAL,
        ),
        "evaluate": StageDeclaration(
            version=3,
            settings=EvaluateSettings,
            run="stages.evaluate.run:run",
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
            better={
                **{f"{pairs}/{size}/*": Better.HIGH for pairs in ("seen", "unseen") for size in ("base", "final")},
                **{
                    f"{clip}{metric}": Better.HIGH
                    for clip in ("", "judge_clip/")
                    for metric in ("sample_to_caption", "sample_to_real", "sample_R@*")
                },
                "judge_clip/frechet": Better.LOW,
                "prior/to_image": Better.HIGH,
                "clip/R@*": Better.HIGH,
                "upsampler/psnr_db": Better.HIGH,
            },
        ),
        "export": StageDeclaration(
            version=1,
            settings=ExportSettings,
            run="stages.export.run:run",
            output="model",
            inputs=(
                Input("clip"),
                Input("prior", Arity.OPTIONAL),
                Input("decoder"),
                Input("upsampler", Arity.ANY),
            ),
            usage="stages.usage:exported",
        ),
    },
    check=check_workflow,
)
