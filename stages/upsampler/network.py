"""The upsamplers: diffusers' `UNet2DModel` on the noisy picture and the low-resolution one, enlarged."""

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from stages.settings import UNetSettings


def build_upsampler(network: UNetSettings, high_size: int) -> UNet2DModel:
    """6 channels in (noisy picture, condition), 3 out.

    Convolutional unless `attention` says otherwise, so that it runs at `high_size` pixels after training on crops.
    Check the settings with `stages.unet.check_upsampler` first.
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
        resnet_time_scale_shift="scale_shift",
    )


def upsample_condition(low: Tensor, size: int) -> Tensor:
    """Small pictures float [B, 3, s, s] enlarged to float32 [B, 3, size, size] as the stock pipeline does it."""
    return F.interpolate(low.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def denoise_upsampler(upsampler: UNet2DModel, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """The prediction float [B, 3, S, S] for noisy pictures float [B, 3, S, S] at timestep int64 [B].

    `condition` float [B, 3, S, S] in [-1, 1] comes from `upsample_condition`.
    """
    return upsampler(torch.cat([noisy, condition], dim=1), timestep, return_dict=False)[0]
