"""Image embeddings and captions to small pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.draws import SampleDraws
from pipeline.errors import UserError
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, Towers
from stages.decoder.network import Condition, Decoder
from stages.decoder.settings import DecoderSettings
from stages.diffusion.guidance import ClipGuidance, guided
from stages.diffusion.sampler import NetworkSampler


@dataclass(frozen=True)
class DecoderOptions:
    """What a caller may ask for instead of the settings' own sampler; None keeps those."""

    guidance_scale: float | None = None
    clip_guidance_scale: float | None = None
    steps: int | None = None


class DecoderSampler(NetworkSampler[Decoder, DecoderSettings]):
    """Draws pictures with classifier-free guidance and, where asked, CLIP guidance (which needs the image tower)."""

    def __init__(self, decoder: Decoder, settings: DecoderSettings, clip: ClipModel) -> None:
        super().__init__(decoder, settings)
        self._clip = clip

    def sample(self, condition: Condition, draws: SampleDraws, options: DecoderOptions) -> Tensor:
        """Pictures float32 [B, 3, S, S] in [-1, 1]."""
        sampler, size = self.settings.sampler, self.settings.image_size
        scale = sampler.guidance_scale if options.guidance_scale is None else options.guidance_scale
        unconditional, embed = None, condition.image_embed
        if scale != 1.0:
            drop_all = torch.ones(len(embed), dtype=torch.bool, device=embed.device)
            unconditional = Condition(embed, CaptionEncoder(self._clip).encode_none(len(embed)), drop_all)
        return self.draw(
            guided(self.network, condition, unconditional, scale),
            draws,
            "decoder",
            (3, size, size),
            steps=options.steps or sampler.steps,
            eta=sampler.eta,
            guidance=self._clip_guidance(condition.text.embed, options),
        )

    def _clip_guidance(self, text_embed: Tensor, options: DecoderOptions) -> ClipGuidance | None:
        asked = options.clip_guidance_scale
        scale = self.settings.sampler.clip_guidance_scale if asked is None else asked
        if scale == 0.0:
            return None
        if self._clip.towers is Towers.TEXT:
            raise UserError(f"clip_guidance_scale={scale} needs CLIP's image tower, which is not loaded; use 0")
        return ClipGuidance(self._clip, text_embed, scale)
