"""The stage `upsampler`: settings, what it needs and gives, and its rules. Imports no torch."""

import math
from enum import StrEnum
from pathlib import Path

from pipeline.config import Positive
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.batch_shape import nearest_multiples
from pipeline.workflow.declaration import Better, ForeignWeights, Input, StageDeclaration, Workflow
from stages.decoder.settings import DecoderSettings
from stages.diffusers_folder import (
    CONFIG_FILE,
    DIFFUSERS,
    labelled,
    network_folder,
    of_scheduler,
    origin,
    read_config,
    unet_settings,
    unet_shapes,
)
from stages.diffusion.settings import DiffusionStageSettings, SamplerSettings, check_diffusion
from stages.unet import UNetSettings, check_unet


class Degradation(StrEnum):
    """How training degrades the condition: blur as for unCLIP's first upsampler, BSR-style for its second."""

    NONE = "none"
    BLUR = "blur"
    BSR = "bsr"


class UpsamplerSettings(DiffusionStageSettings):
    """Diffusion from `low_size` to `high_size`, trained on random crops of `crop_size` at the high resolution."""

    low_size: Positive
    high_size: Positive
    crop_size: Positive
    degradation: Degradation
    network: UNetSettings
    sampler: SamplerSettings


class UpsamplerNumbers(Numbers):
    """The sizes of the pictures that it takes and makes, in pixels."""

    low_size: int
    high_size: int


def check(path: str, settings: UpsamplerSettings, workflow: Workflow) -> None:
    """Diffusion and network can work, and the sizes follow from those of the decoder or the upsampler before."""
    check_diffusion(path, settings, settings.sampler)
    if settings.max_samples == 0 and settings.initial is None:
        raise UserError(f"{path}.max_samples=0 trains nothing; set {path}.initial to take weights that are there")
    check_sizes(path, settings)
    sizes = {f"{name}.image_size": each.image_size for name, each in workflow.of(DecoderSettings).items()}
    for name, each in workflow.of(UpsamplerSettings).items():
        if name == path:
            break
        sizes[f"{name}.high_size"] = each.high_size
    before = next(reversed(sizes), None)
    if before is not None and settings.low_size != sizes[before]:
        raise UserError(
            f"{path}.low_size={settings.low_size} does not continue {before}={sizes[before]}; make them equal"
        )


def check_sizes(path: str, settings: UpsamplerSettings) -> None:
    """Raise `UserError` unless the network runs on both the crops and the whole picture, and the sizes go upwards."""
    if settings.low_size >= settings.high_size:
        raise UserError(
            f"{path}.low_size {settings.low_size} must be below high_size {settings.high_size}; "
            f"use for example {settings.high_size // 4} and {settings.high_size}"
        )
    if settings.crop_size > settings.high_size:
        raise UserError(
            f"{path}.crop_size {settings.crop_size} is larger than high_size {settings.high_size}; "
            f"use at most {settings.high_size}"
        )
    if (settings.crop_size * settings.low_size) % settings.high_size:
        step = settings.high_size // math.gcd(settings.high_size, settings.low_size)
        raise UserError(
            f"{path}.crop_size {settings.crop_size} is no whole number of low-resolution pixels at "
            f"{settings.low_size} -> {settings.high_size}; use {nearest_multiples(settings.crop_size, step)}"
        )
    check_unet(settings.network, settings.high_size, f"{path}.network", f"{path}.high_size")
    check_unet(settings.network, settings.crop_size, f"{path}.network", f"{path}.crop_size")


def upsampler_folder(folder: Path, key: str) -> Path:
    """Where a diffusers pipeline has its upsampler: the one of all steps but the last."""
    return network_folder(folder, ("super_res_first",), "UNet2DModel", key)


def in_folder(folder: Path, key: str) -> ForeignWeights:
    """The upsampler of a diffusers folder, between the sizes that it has there."""
    found = upsampler_folder(folder, key)
    unet = read_config(found)
    dictated = {
        "network": unet_settings(unet, "ResnetDownsampleBlock2D", "AttnDownBlock2D", key),
        "high_size": unet["sample_size"],
        **of_scheduler(folder, "super_res_scheduler"),
    }
    if (folder / "decoder" / CONFIG_FILE).is_file():
        dictated["low_size"] = read_config(folder / "decoder")["sample_size"]
    return ForeignWeights(labelled({"upsampler": found}), dictated, shapes=unet_shapes(unet))


UPSAMPLER = StageDeclaration(
    version=1,
    settings=UpsamplerSettings,
    run="stages.upsampler.train:run",
    rehearse="stages.upsampler.train:rehearse",
    output="upsampler",
    inputs=(Input("data"),),
    repeatable=True,
    numbers=UpsamplerNumbers,
    check=check,
    inherits=("network", "objective.prediction_type", "schedule"),
    foreign={DIFFUSERS: in_folder},
    origin=origin,
    better={"psnr_db": Better.HIGH, "loss": Better.LOW},
)
