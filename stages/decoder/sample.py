"""Image embeddings and captions to small pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.draws import SampleDraws
from pipeline.errors import UserError
from stages.captions import NO_CAPTION, CaptionEncoder
from stages.clip.network import ClipModel, Towers
from stages.decoder.network import Decoder
from stages.diffusion.guidance import ClipGuidance, classifier_free
from stages.diffusion.sampler import ReverseProcess, sample
from stages.diffusion.schedule import NoiseSchedule
from stages.settings import DecoderSettings


@dataclass(frozen=True)
class DecoderOptions:
    """What a caller may ask for instead of the settings' own sampler; None keeps those."""

    guidance_scale: float | None = None
    clip_guidance_scale: float | None = None
    steps: int | None = None


class DecoderSampler:
    """Draws pictures with classifier-free guidance and, where asked, CLIP guidance (which needs the image tower)."""

    def __init__(self, decoder: Decoder, settings: DecoderSettings, clip: ClipModel) -> None:
        self._decoder = decoder
        self._settings = settings
        self._clip = clip
        self._captions = CaptionEncoder(clip)
        self._schedule = NoiseSchedule(settings.schedule).to(next(decoder.parameters()).device)
        self._process = ReverseProcess(self._schedule, settings.objective.prediction_type, clip_range=1.0)

    def sample(
        self, captions: Sequence[str], condition_embed: Tensor, draws: SampleDraws, options: DecoderOptions
    ) -> Tensor:
        """Pictures float32 [B, 3, S, S] in [-1, 1] for captions and CLIP embeddings [B, E] (not normalised)."""
        sampler = self._settings.sampler
        scale = sampler.guidance_scale if options.guidance_scale is None else options.guidance_scale
        text = self._captions.encode(captions)
        none = self._captions.encode([NO_CAPTION] * len(captions)) if scale != 1.0 else None
        drop_all = torch.ones(len(captions), dtype=torch.bool, device=condition_embed.device)
        shape = (3, self._settings.image_size, self._settings.image_size)

        def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
            conditional = self._decoder(x_t, timestep, condition_embed, text.embed, text.hidden, text.mask)
            if none is None:
                return conditional
            unconditional = self._decoder(
                x_t, timestep, condition_embed, none.embed, none.hidden, none.mask, drop_image_embed=drop_all
            )
            return classifier_free(unconditional, conditional, scale)

        return sample(
            denoise,
            draws.normal("decoder", shape),
            self._process,
            steps=options.steps or sampler.steps,
            eta=sampler.eta,
            step_noise=lambda index: draws.normal(f"decoder step {index}", shape),
            guidance=self._clip_guidance(text.embed, options),
        )

    def _clip_guidance(self, text_embed: Tensor, options: DecoderOptions) -> ClipGuidance | None:
        asked = options.clip_guidance_scale
        scale = self._settings.sampler.clip_guidance_scale if asked is None else asked
        if scale == 0.0:
            return None
        if self._clip.towers is Towers.TEXT:
            raise UserError(f"clip_guidance_scale={scale} needs CLIP's image tower, which is not loaded; use 0")
        return ClipGuidance(self._clip, text_embed, scale)
