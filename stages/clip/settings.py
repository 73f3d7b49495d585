"""The stages `clip` and `judge_clip`: settings, what they need and give, and their rules. Imports no torch."""

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pipeline.config import RUNTIME, Positive, PositiveFloat, Settings, TrainingStageSettings
from pipeline.data.splits import check_batches_are_distinct
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, Numbers
from pipeline.workflow.batch_shape import nearest_multiples
from pipeline.workflow.declaration import Better, Input, StageDeclaration, Workflow
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.fingerprint import counted_settings
from stages.prepare.settings import split_counts


class ContrastiveLoss(StrEnum):
    """CLIP's softmax loss or SigLIP's sigmoid loss; both are open_clip's."""

    CONTRASTIVE = "contrastive"
    SIGLIP = "siglip"


class ClipNetworkSettings(Settings):
    """An open_clip ViT and its text transformer. `diffusers` needs text_width == embed_dim.

    `initial_position_gain` multiplies the positional embeddings with which open_clip begins. A short training that
    begins with weak ones learns what is in a picture long before it learns where.
    """

    embed_dim: Positive
    image_size: Positive
    patch_size: Positive
    vision_width: Positive
    vision_layers: Positive
    vision_heads: Positive
    text_width: Positive
    text_layers: Positive
    text_heads: Positive
    context_length: Positive
    quick_gelu: bool
    initial_position_gain: PositiveFloat


class ClipSettings(TrainingStageSettings):
    """CLIP, trained here, started from a local open_clip checkpoint, or (`max_samples: 0`) replaced by it."""

    network: ClipNetworkSettings
    loss: ContrastiveLoss
    checkpoint: Annotated[Path | None, RUNTIME]  # counted by its contents


class ClipNumbers(Numbers):
    """The sizes that networks on a CLIP's embeddings must have; `checkpoint` names the file that it began from."""

    embed_dim: int
    context_length: int
    image_size: int
    checkpoint: str | None = None


class OnClipNumbers(Numbers):
    """Of what works on a CLIP's embeddings: that CLIP's fingerprint and its embeddings' width."""

    clip: str
    embed_dim: int


def require_same_clip(artifact: Artifact, clip: Artifact) -> None:
    """Raise `UserError` unless `artifact`, whose numbers are `OnClipNumbers`, was made with that CLIP."""
    width, its_width = clip.numbers(ClipNumbers).embed_dim, artifact.manifest.numbers["embed_dim"]
    its_own, here = artifact.manifest.numbers["clip"], clip.manifest.fingerprint
    if its_width != width:
        raise UserError(
            f"{artifact.path} works on embeddings of width {its_width} and {clip.path} gives {width}; "
            f"train stage {artifact.manifest.stage} on that CLIP"
        )
    if its_own != here:
        raise UserError(
            f"{artifact.path} was made with the CLIP {its_own[:12]}, not with {here[:12]}; "
            f"train stage {artifact.manifest.stage} on that CLIP"
        )


def check(path: str, settings: ClipSettings, workflow: Workflow) -> None:
    """The towers can be built, and there is something to train them on, or a checkpoint in its place."""
    check_network(f"{path}.network", settings.network)
    if settings.max_samples == 0 and settings.checkpoint is None:
        raise UserError(f"{path}.max_samples=0 trains nothing; set {path}.checkpoint to replace the training")
    counts = split_counts(workflow)
    if counts is not None and settings.max_samples:
        check_batches_are_distinct(counts.training, settings.global_batch_size, f"{path}.global_batch_size")


def check_network(path: str, network: ClipNetworkSettings) -> None:
    """Raise `UserError` if the towers cannot be built; `path` is where they stand, such as "stage.clip.network"."""
    if network.image_size % network.patch_size:
        raise UserError(
            f"{path}.image_size {network.image_size} is not divisible by patch_size {network.patch_size}; "
            f"use {nearest_multiples(network.image_size, network.patch_size)}"
        )
    for tower, width, heads in (
        ("vision", network.vision_width, network.vision_heads),
        ("text", network.text_width, network.text_heads),
    ):
        if width % heads:
            raise UserError(
                f"{path}.{tower}_width {width} is not divisible by {tower}_heads {heads}; "
                f"use a width of {nearest_multiples(width, heads)}"
            )
    if network.text_width != network.embed_dim:
        raise UserError(
            f"{path}.text_width {network.text_width} must equal embed_dim {network.embed_dim}: prior and decoder "
            f"take the caption's token states at that width; set both to one value"
        )


def identity(settings: ClipSettings, stage: str = "clip") -> dict[str, Any]:
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


def origin(artifact: Artifact) -> str:
    """The checkpoint that a CLIP was started from, whose licence goes with it."""
    checkpoint = artifact.numbers(ClipNumbers).checkpoint
    if checkpoint is None:
        return ""
    return (
        f"`{artifact.manifest.stage}` was started from the open_clip checkpoint `{checkpoint}`; its licence "
        "and its training data's are not known here, and hold for all that was made from it."
    )


CLIP = StageDeclaration(
    version=2,
    settings=ClipSettings,
    run="stages.clip.train:run",
    rehearse="stages.clip.train:rehearse",
    output="clip",
    inputs=(Input("data"),),
    numbers=ClipNumbers,
    check=check,
    identity=identity,
    better={"R@*": Better.HIGH},
    origin=origin,
)
JUDGE_CLIP = replace(CLIP, output="judge_clip", identity=partial(identity, stage="judge_clip"), origin=None)
"""A second CLIP that trains and guides nothing."""
