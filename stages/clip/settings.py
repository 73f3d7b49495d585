"""The stages `clip` and `judge_clip`: settings, what they need and give, and their rules. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.config import (
    ADDED_LATER,
    RUNTIME,
    Fraction,
    Positive,
    PositiveFloat,
    Settings,
    TrainingStageSettings,
    one_of,
    validate,
)
from pipeline.data.splits import check_batches_are_distinct
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, Numbers
from pipeline.workflow.batch_shape import nearest_multiples
from pipeline.workflow.declaration import Better, ForeignWeights, Input, StageDeclaration, Workflow
from pipeline.workflow.fingerprint import counted_settings
from pipeline.workflow.weights import require_fit
from stages.clip.names import MAY_EXCEED, vit_shapes
from stages.clip.sources import BPE_VOCABULARY, PIPELINE_TOWERS, SET_SIZES, Layout, clip_source, network_of_model
from stages.diffusers_folder import DIFFUSERS
from stages.prepare.settings import split_counts


class ContrastiveLoss(StrEnum):
    """CLIP's softmax loss or SigLIP's sigmoid loss; both are open_clip's."""

    CONTRASTIVE = "contrastive"
    SIGLIP = "siglip"


class ClipSizes(Settings):
    """What all CLIPs have. Where `text_width` is not `embed_dim`, token states are projected as the embedding is."""

    embed_dim: Positive
    image_size: Positive
    context_length: Positive
    text_width: Positive
    quick_gelu: bool


class ClipNetworkSettings(ClipSizes):
    """An open_clip ViT and its text transformer.

    `initial_position_gain` multiplies the positional embeddings with which open_clip begins. A short training that
    begins with weak ones learns what is in a picture long before it learns where.
    """

    kind: Annotated[Literal["vit"], ADDED_LATER] = "vit"
    patch_size: Positive
    vision_width: Positive
    vision_layers: Positive
    vision_heads: Positive
    vision_mlp_ratio: Annotated[PositiveFloat, ADDED_LATER] = 4.0
    text_layers: Positive
    text_heads: Positive
    initial_position_gain: PositiveFloat


class OpenClipNetworkSettings(ClipSizes):
    """Any other towers that open_clip builds: `vision` and `text` are its own `vision_cfg` and `text_cfg`.

    Pixels in [0, 1] are normalised by `image_mean` and `image_std`, one number per channel.
    """

    kind: Literal["open_clip"]
    image_mean: tuple[float, float, float]
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    vision: dict[str, Any]
    text: dict[str, Any]


ClipNetwork = ClipNetworkSettings | OpenClipNetworkSettings

if TYPE_CHECKING:
    _Network = ClipNetwork
else:
    _Network = one_of([ClipNetworkSettings, OpenClipNetworkSettings], "kind")


def clip_network(values: Mapping[str, Any]) -> ClipNetwork:
    """The settings of a network that were written as JSON."""
    schema = OpenClipNetworkSettings if values.get("kind") == "open_clip" else ClipNetworkSettings
    return validate(schema, dict(values), "network")


LogitScale = Annotated[float, Field(ge=1.0, le=100.0, strict=True, allow_inf_nan=False)]


class ClipSettings(TrainingStageSettings):
    """CLIP, trained here, started from a local checkpoint, or (`max_samples: 0`) replaced by it.

    `model` is open_clip's name of a model, whose sizes take the place of those of `network`, as those of a folder do.
    `gray_scale_share` of the pictures are shown to the training without their colours (open_clip's `gray_scale_prob`):
    what a caption says beside colours has to be told by them, and what a shape is does not depend on its colour.
    `initial_logit_scale`, in [1, 100], is the inverse temperature with which the contrastive loss of a new CLIP begins;
    null: 1 / 0.07. A short training that begins with a high one learns more from captions that nearly fit. SigLIP's
    loss begins as its authors say.
    """

    network: _Network
    loss: ContrastiveLoss
    gray_scale_share: Annotated[Fraction, ADDED_LATER] = 0.0
    initial_logit_scale: Annotated[LogitScale | None, ADDED_LATER] = None
    model: Annotated[str | None, RUNTIME] = None  # counted as `network`
    checkpoint: Annotated[Path | None, RUNTIME]  # counted by its contents

    @field_validator("network", mode="before")
    @classmethod
    def _is_a_vit_unless_it_says_so(cls, network: Any) -> Any:
        return {"kind": "vit", **network} if isinstance(network, Mapping) else network


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


def check_initial(path: str, settings: TrainingStageSettings, workflow: Workflow) -> None:
    """Raise `UserError` where a stage neither trains nor starts from weights, or these were made for another CLIP."""
    if settings.max_samples == 0 and settings.initial is None:
        raise UserError(f"{path}.max_samples=0 trains nothing; set {path}.initial to take weights that are there")
    clip = next((each.settings for each in workflow.stages.values() if each.kind == "clip"), None)
    sizes = workflow.initial.get(path.removeprefix("stage."), {})
    for name in ("embed_dim", "context_length"):
        own = getattr(clip.network, name) if isinstance(clip, ClipSettings) else None
        if own is not None and sizes.get(name, own) != own:
            raise UserError(
                f"{path}.initial={settings.initial} works on a CLIP of {name} {sizes[name]}, and this workflow's has "
                f"{own}; take the same CLIP by stage.clip.initial or stage.clip.checkpoint"
            )


def check(path: str, settings: ClipSettings, workflow: Workflow) -> None:
    """The towers can be built, and there is something to train them on, or a checkpoint in its place."""
    check_network(f"{path}.network", settings.network)
    if settings.checkpoint is not None and settings.initial is not None:
        raise UserError(f"{path}.checkpoint and {path}.initial both name weights to start from; leave one of them null")
    if settings.max_samples == 0 and settings.checkpoint is None and settings.initial is None:
        raise UserError(
            f"{path}.max_samples=0 trains nothing; set {path}.checkpoint or {path}.initial to replace the training"
        )
    if settings.checkpoint is not None:
        weights_of_checkpoint(path, settings)
    counts = split_counts(workflow)
    if counts is not None and settings.max_samples:
        check_batches_are_distinct(counts.training, settings.global_batch_size, f"{path}.global_batch_size")


def weights_of_checkpoint(path: str, settings: ClipSettings) -> str:
    """What a plan says of the checkpoint's weights. Raises `UserError` where they can be known to be others."""
    assert settings.checkpoint is not None
    said = f"{path}.checkpoint={settings.checkpoint}"
    source = clip_source(settings.checkpoint, f"{path}.checkpoint")
    found = source.shapes()
    if source.layout is Layout.OPEN_CLIP and isinstance(settings.network, ClipNetworkSettings):
        own = vit_shapes(settings.network.model_dump(), BPE_VOCABULARY)
        require_fit(own, found, said, SET_SIZES, may_exceed=MAY_EXCEED)
        return f"all {len(own)} weights fit"
    return f"{len(found)} weights"


def notice(settings: ClipSettings, _workflow: Workflow) -> str | None:
    """What a plan says of a checkpoint to start from."""
    if settings.checkpoint is None:
        return None
    return f"starts from {settings.checkpoint}, {weights_of_checkpoint('stage.clip', settings)}"


def check_network(path: str, network: ClipNetwork) -> None:
    """Raise `UserError` if the towers cannot be built; `path` is where they stand, such as "stage.clip.network"."""
    if isinstance(network, OpenClipNetworkSettings):
        return
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


def tower_configs(network: ClipNetwork) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's `vision_cfg` and `text_cfg` of a network."""
    if isinstance(network, OpenClipNetworkSettings):
        return dict(network.vision), dict(network.text)
    vision = {
        "image_size": network.image_size,
        "layers": network.vision_layers,
        "width": network.vision_width,
        "head_width": network.vision_width // network.vision_heads,
        "mlp_ratio": network.vision_mlp_ratio,
        "patch_size": network.patch_size,
    }
    text = {
        "context_length": network.context_length,
        "width": network.text_width,
        "heads": network.text_heads,
        "layers": network.text_layers,
    }
    return vision, text


def dictated(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The network's settings, where open_clip's name of a model or a folder with a config says them."""
    model, checkpoint = values.get("model"), values.get("checkpoint")
    source = None if checkpoint is None else clip_source(Path(str(checkpoint)), f"{path}.checkpoint")
    if model is None:
        return {"network": dict(source.network)} if source is not None and source.network is not None else {}
    if source is not None and source.network is not None:
        raise UserError(f"{path}.model={model} is not needed: {checkpoint} has a config of its own; leave model out")
    return {"network": network_of_model(str(model), f"{path}.model")}


def identity(settings: ClipSettings, stage: str = "clip") -> dict[str, Any]:
    """A checkpoint to start from counts by its contents, not by its path."""
    counted: dict[str, Any] = {**counted_settings(settings), "checkpoint": None}
    if settings.checkpoint is not None:
        key = f"stage.{stage}.checkpoint"
        try:
            counted["checkpoint"] = clip_source(settings.checkpoint, key).digest()
        except OSError as error:
            raise UserError(
                f"{key}={settings.checkpoint} cannot be read ({error.strerror}); "
                "give the path of a local open_clip checkpoint"
            ) from error
    return counted


def origin(artifact: Artifact) -> str:
    """The checkpoint that a CLIP was started from, whose licence goes with it."""
    checkpoint = artifact.numbers(ClipNumbers).checkpoint
    if checkpoint is None:
        return ""
    return (
        f"`{artifact.manifest.stage}` was started from the checkpoint `{checkpoint}`; its licence "
        "and its training data's are not known here, and hold for all that was made from it."
    )


def pipeline_towers(folder: Path, key: str) -> ForeignWeights:
    """The text encoder and the image encoder of a diffusers pipeline."""
    source = clip_source(folder, key)
    if source.layout is not Layout.TRANSFORMERS or len(source.files) != len(PIPELINE_TOWERS):
        raise UserError(f"{key} is no folder of a diffusers pipeline; give others as stage.clip.checkpoint")
    return ForeignWeights(dict(zip(PIPELINE_TOWERS, source.files, strict=True)), {"network": source.network})


FOREIGN = {DIFFUSERS: pipeline_towers}
"""What else than runs a CLIP's `initial` can name."""

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
    dictated=dictated,
    inherits=("network", "loss"),
    foreign=FOREIGN,
    notice=notice,
    better={"R@*": Better.HIGH},
    origin=origin,
)
JUDGE_CLIP = replace(CLIP, output="judge_clip", identity=partial(identity, stage="judge_clip"), origin=None)
"""A second CLIP that trains and guides nothing."""
