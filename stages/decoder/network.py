"""The decoder's networks, conditioned on CLIP's embeddings and the caption's tokens (unCLIP, section 2.1)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.workflow.artifacts import Artifact
from stages.clip.network import TextEncoding
from stages.clip.settings import ClipNumbers, require_same_clip
from stages.decoder.decorrelation import Decorrelation
from stages.decoder.settings import DecoderSettings, decoder_folders
from stages.decoder.text_proj import TextProjection
from stages.initial import folder_weights
from stages.unet import CLIP_EXTRA_CONTEXT_TOKENS, UNetSettings
from stages.weights import CPU, load_weights


@dataclass(frozen=True, eq=False)
class Condition:
    """What B pictures are made from: CLIP's embeddings [B, E], not normalised, and captions; either may be dropped.

    A dropped caption is the encoding of "". Where `drop_image_embed` bool [B] is true, the network does as if it had no
    `image_embed`; None drops none.
    """

    image_embed: Tensor
    text: TextEncoding
    drop_image_embed: Tensor | None = None

    @classmethod
    def stacked(cls, parts: "Sequence[Condition]") -> "Condition":
        """The conditions of all parts, one part after the other."""
        return cls(
            torch.cat([each.image_embed for each in parts]),
            TextEncoding.stacked([each.text for each in parts]),
            torch.cat([each.is_dropped for each in parts]),
        )

    @property
    def is_dropped(self) -> Tensor:
        """`drop_image_embed`, bool [B], where it is None too."""
        if self.drop_image_embed is not None:
            return self.drop_image_embed
        return torch.zeros(len(self.image_embed), dtype=torch.bool, device=self.image_embed.device)


class Decoder(nn.Module, ABC):
    """What every network of the decoder has: both CLIP embeddings are to be decorrelated before it works on them."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.image_decorrelation = Decorrelation(embed_dim)
        self.text_decorrelation = Decorrelation(embed_dim)

    @abstractmethod
    def forward(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The prediction float [B, 3, S, S] for noisy pictures float [B, 3, S, S] at timestep int64 [B]."""

    def save_parts(self, directory: Path) -> None:
        """Write the network for use without this project, below `directory`: its weights, unless it knows better."""
        (directory / "decoder").mkdir()
        save_file(self.state_dict(), directory / "decoder" / "weights.safetensors")


class UNetDecoder(Decoder):
    """`unet` and `text_proj` are the two networks that diffusers' `UnCLIPPipeline` calls `decoder` and `text_proj`.

    Both CLIP embeddings are decorrelated before `text_proj`; `plain_text_proj` has that folded in, for export.

    The U-Net has 3 output channels; the stock pipeline's 6 are made at export. Check the settings with
    `stages.unet.check_unet` first.
    """

    def __init__(
        self, network: UNetSettings, image_size: int, embed_dim: int, cross_attention_dim: int | None = None
    ) -> None:
        """Tokens are brought to `cross_attention_dim`, that of the embeddings where it is None."""
        super().__init__(embed_dim)
        cross_attention_dim = cross_attention_dim or embed_dim
        self.unet = UNet2DConditionModel(
            sample_size=image_size,
            in_channels=3,
            out_channels=3,
            block_out_channels=network.channels,
            down_block_types=_block_types(network.attention, "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=_block_types(network.attention[::-1], "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            layers_per_block=network.layers_per_block,
            attention_head_dim=network.attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=network.norm_groups,
            dropout=network.dropout,
            class_embed_type="identity",
            resnet_time_scale_shift=network.resnet_time_scale_shift,
        )
        self.text_proj = TextProjection(
            embed_dim, 4 * network.channels[0], cross_attention_dim, extra_tokens=CLIP_EXTRA_CONTEXT_TOKENS
        )

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """As `Decoder.forward`. A learned null embedding stands for a dropped `image_embed`."""
        text, null_embed = condition.text, self.text_proj.learned_classifier_free_guidance_embeddings
        # Through `where` in every case, so that the null embedding has a gradient on every rank in every step.
        decorrelated = self.image_decorrelation(condition.image_embed)
        hidden, time_embed = self.text_proj(
            torch.where(condition.is_dropped[:, None], null_embed.to(decorrelated), decorrelated),
            self.text_decorrelation(text.embed),
            text.hidden,
        )
        mask = F.pad(text.mask, (CLIP_EXTRA_CONTEXT_TOKENS, 0), value=True)
        # diffusers' unCLIP blocks take the mask of the conditioning tokens as `attention_mask`.
        return self.unet(
            noisy,
            timestep,
            encoder_hidden_states=hidden,
            class_labels=time_embed,
            attention_mask=mask,
            return_dict=False,
        )[0]

    def plain_text_proj(self) -> TextProjection:
        """`text_proj` with the decorrelation folded in: on CLIP's embeddings as they are it gives the same results."""
        ours = self.text_proj
        plain = deepcopy(ours)
        plain.embedding_proj = self.text_decorrelation.folded_into(ours.embedding_proj)
        image = self.image_decorrelation
        plain.clip_image_embeddings_project_to_time_embeddings = image.folded_into(
            ours.clip_image_embeddings_project_to_time_embeddings
        )
        plain.clip_extra_context_tokens_proj = image.folded_into(ours.clip_extra_context_tokens_proj)
        with torch.no_grad():
            null_embed = plain.learned_classifier_free_guidance_embeddings
            null_embed.copy_(image.inverse(ours.learned_classifier_free_guidance_embeddings))
        return plain.eval()

    def save_parts(self, directory: Path) -> None:
        """Write both networks in diffusers' format, below `directory`."""
        self.unet.save_pretrained(directory / "decoder")
        self.plain_text_proj().save(directory / "text_proj")


def build_decoder(settings: DecoderSettings, embed_dim: int) -> Decoder:
    """A decoder of the network that the settings choose, with new weights, on embeddings of width `embed_dim`."""
    return settings.network_choice.build(settings.network, settings.image_size, embed_dim)


def read_decoder_folder(decoder: Decoder, folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder's decoder, for `decoder`; embeddings are taken as they are, undecorrelated.

    Of an output that learned its variance the mean's channels are taken: variance is fixed here.
    """
    assert isinstance(decoder, UNetDecoder), "as the settings of the folder say"
    folders = decoder_folders(folder, str(folder))
    channels = decoder.unet.config["out_channels"]
    unet = folder_weights(folders["unet"], decoder.unet, mean_of=channels)
    text_proj = folder_weights(folders["text_proj"], decoder.text_proj)
    return {
        **{name: each for name, each in decoder.state_dict().items() if "decorrelation." in name},
        **{f"unet.{name}": each for name, each in unet.items()},
        **{f"text_proj.{name}": each for name, each in text_proj.items()},
    }


def load_decoder(artifact: Artifact, clip: Artifact, device: torch.device = CPU) -> Decoder:
    """The decoder of an artifact."""
    require_same_clip(artifact, clip)
    settings, embed_dim = artifact.settings(DecoderSettings), clip.numbers(ClipNumbers).embed_dim
    return load_weights(lambda: build_decoder(settings, embed_dim), artifact, device)


def _block_types(attention: Sequence[bool], plain: str, attending: str) -> tuple[str, ...]:
    return tuple(attending if attends else plain for attends in attention)
