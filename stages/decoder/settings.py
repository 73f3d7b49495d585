"""The stage `decoder`: settings, what it needs and gives, and its rules. Imports no torch."""

import shlex
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pipeline.config import Fraction, NotNegativeFloat, Positive, Settings, one_of
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.declaration import Arity, Better, ForeignWeights, Input, StageDeclaration, Workflow, modules_in
from stages.clip.settings import ClipSettings, OnClipNumbers, check_initial
from stages.decoder.choice import DecoderNetwork
from stages.diffusers_folder import (
    DIFFUSERS,
    labelled,
    network_folder,
    of_scheduler,
    origin,
    read_config,
    unet_settings,
    unet_shapes,
)
from stages.diffusion.settings import (
    ClipLossSettings,
    DiffusionStageSettings,
    SamplerOptions,
    SamplerSettings,
    check_diffusion,
)

NETWORKS: dict[str, DecoderNetwork] = {
    name: module.NETWORK for name, module in modules_in("stages.decoder.networks").items()
}

if TYPE_CHECKING:
    NetworkSettings = Settings
else:
    NetworkSettings = one_of([each.settings for each in NETWORKS.values()], "kind")


class DecoderCondition(StrEnum):
    """Which CLIP embedding conditions the decoder: the image's (unCLIP) or the caption's (GLIDE-like, no prior)."""

    IMAGE_EMBED = "image_embed"
    TEXT_EMBED = "text_embed"


class DecoderSamplerSettings(SamplerSettings):
    """`clip_guidance_scale` scales the gradient of sim(x0_hat, caption) at every step; 0 is off."""

    clip_guidance_scale: NotNegativeFloat


class DecoderOptions(SamplerOptions):
    """What may be asked for instead of `DecoderSamplerSettings`; None keeps those."""

    clip_guidance_scale: NotNegativeFloat | None = None


class DecoderSettings(DiffusionStageSettings):
    """L = L_diffusion + lambda L_clip on CLIP's embedding and the caption's tokens."""

    image_size: Positive
    condition: DecoderCondition
    network: NetworkSettings
    clip_loss: ClipLossSettings
    caption_dropout: Fraction
    image_embed_dropout: Fraction
    sampler: DecoderSamplerSettings

    @field_validator("network", mode="before")
    @classmethod
    def _is_one_of_the_networks(cls, network: Any) -> Any:
        """Decoders that were made before there was a choice name no kind: they are U-Nets."""
        if not isinstance(network, Mapping):
            return network
        kind = network.get("kind", "unet")
        if kind not in NETWORKS:
            raise ValueError(f"kind={kind!r} is no network of the decoder; there are {', '.join(NETWORKS)}")
        return {**network, "kind": kind}

    @property
    def network_choice(self) -> DecoderNetwork:
        """What builds and checks its network."""
        return next(each for each in NETWORKS.values() if type(self.network) is each.settings)


class DecoderNumbers(OnClipNumbers):
    """Which CLIP it works on, and the size of its pictures in pixels."""

    image_size: int


def check(path: str, settings: DecoderSettings, workflow: Workflow) -> None:
    """Diffusion and network can work, and the workflow has what the condition needs."""
    check_diffusion(path, settings, settings.sampler)
    check_initial(path, settings, workflow)
    clip = next((each.settings for each in workflow.stages.values() if each.kind == "clip"), None)
    context_length = clip.network.context_length if isinstance(clip, ClipSettings) else None
    settings.network_choice.check(path, settings.network, settings.image_size, context_length)
    if settings.condition is DecoderCondition.IMAGE_EMBED and not {"embed", "prior"} <= workflow.kinds:
        raise UserError(
            f"{path}.condition=image_embed needs the stages embed and prior; use workflow=unclip, or "
            f"{path}.condition=text_embed"
        )
    if settings.condition is DecoderCondition.TEXT_EMBED and "prior" in workflow.kinds:
        raise UserError(
            f"{path}.condition=text_embed leaves the prior of this workflow without use; use workflow=glide, or "
            f"{path}.condition=image_embed"
        )


def usage(run: str, artifact: Artifact, caption: str) -> str:
    """Pictures by this project's own command, which needs no export and takes the run's own guidance."""
    del artifact
    return (
        "Pictures from captions, by this project:\n\n"
        f"    unclip sample {shlex.quote(run)} {shlex.quote(caption)} --count 4"
    )


def decoder_folders(folder: Path, key: str) -> dict[str, Path]:
    """Where a diffusers pipeline has the two networks that are one here."""
    return {
        "unet": network_folder(folder, ("decoder",), "UNet2DConditionModel", key),
        "text_proj": network_folder(folder, ("text_proj",), "UnCLIPTextProjModel", key),
    }


def in_folder(folder: Path, key: str) -> ForeignWeights:
    """The decoder of a diffusers folder. Of one that learned its variance the mean is taken."""
    folders = decoder_folders(folder, key)
    unet, text_proj = (read_config(each) for each in folders.values())
    width, embed_dim = unet["cross_attention_dim"], text_proj.get("clip_embeddings_dim", 768)
    network = {
        "kind": "unet",
        **unet_settings(unet, "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", key),
        "cross_attention_dim": None if width == embed_dim else width,
    }
    dictated = {"network": network, "image_size": unet["sample_size"], **of_scheduler(folder, "decoder_scheduler")}
    tokens = text_proj.get("clip_extra_context_tokens", 4)
    shapes = {**unet_shapes(unet), "clip_extra_context_tokens_proj.weight": (tokens * width, embed_dim)}
    return ForeignWeights(labelled(folders), dictated, {"embed_dim": embed_dim}, shapes)


DECODER = StageDeclaration(
    version=4,
    settings=DecoderSettings,
    run="stages.decoder.train:run",
    rehearse="stages.decoder.train:rehearse",
    output="decoder",
    inputs=(Input("data"), Input("clip"), Input("embeddings", Arity.OPTIONAL)),
    numbers=DecoderNumbers,
    check=check,
    # Not the whole loss: it depends on the CLIP loss's weight.
    better={"diffusion": Better.LOW, "clip": Better.LOW},
    usage=usage,
    inherits=("network", "objective.prediction_type", "schedule"),
    foreign={DIFFUSERS: in_folder},
    origin=origin,
)
