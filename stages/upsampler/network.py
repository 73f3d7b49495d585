"""The upsamplers: diffusers' `UNet2DModel` on the noisy picture and the low-resolution one, enlarged."""

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from pipeline.workflow.artifacts import Artifact
from stages.initial import folder_weights
from stages.unet import UNetSettings
from stages.upsampler.settings import UpsamplerSettings, upsampler_folder
from stages.weights import CPU, load_weights


def build_upsampler(network: UNetSettings, high_size: int) -> UNet2DModel:
    """6 channels in (noisy picture, condition), 3 out.

    Convolutional unless `attention` says otherwise, so that it runs at `high_size` pixels after training on crops.
    Check the settings with `stages.upsampler.settings.check_sizes` first.
    """
    return UNet2DModel(
        sample_size=high_size,
        in_channels=6,
        out_channels=3,
        block_out_channels=network.channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in network.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in network.attention[::-1]),
        add_attention=network.attention[-1],
        layers_per_block=network.layers_per_block,
        attention_head_dim=network.attention_head_dim,
        norm_num_groups=network.norm_groups,
        dropout=network.dropout,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift=network.resnet_time_scale_shift,
    )


def read_upsampler_folder(upsampler: UNet2DModel, folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder's upsampler, for `upsampler`."""
    found = upsampler_folder(folder, str(folder))
    return folder_weights(found, upsampler, mean_of=upsampler.config["out_channels"])


def load_upsampler(artifact: Artifact, device: torch.device = CPU) -> UNet2DModel:
    """The upsampler of an artifact."""
    settings = artifact.settings(UpsamplerSettings)
    return load_weights(lambda: build_upsampler(settings.network, settings.high_size), artifact, device)


def denoise_upsampler(upsampler: UNet2DModel, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """The prediction float [B, 3, S, S] for noisy pictures float [B, 3, S, S] at timestep int64 [B].

    `condition` float [B, 3, S, S] in [-1, 1] is the small picture, enlarged by `stages.pictures.resize`.
    """
    return upsampler(torch.cat([noisy, condition], dim=1), timestep, return_dict=False)[0]
