"""Image embeddings and captions to small pictures, and pictures to the noise that they come from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.draws import SampleDraws
from pipeline.errors import UserError
from stages.captions import NO_CAPTION, CaptionEncoder
from stages.clip.network import ClipModel, Towers
from stages.decoder.network import Condition, Decoder
from stages.decoder.settings import DecoderOptions, DecoderSamplerSettings, DecoderSettings
from stages.diffusion.guidance import ClassifierFree, ClipGuidance, guided
from stages.diffusion.sampler import Constrain, Denoise, NetworkSampler

OWN_SAMPLER = DecoderOptions()


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a picture is begun from instead of drawn noise.

    Either the noise `x_T` [B, 3, S, S], or an `image` [B, 3, S, S] in so much noise that a `strength`, a share of the
    steps in (0, 1], is left. `known` puts what must stay into every x0_hat.
    """

    x_T: Tensor | None = None  # noqa: N815 (the paper's symbol)
    image: Tensor | None = None
    strength: float = 1.0
    known: Constrain | None = None


FROM_NOISE = Beginning()


class DecoderSampler(NetworkSampler[Decoder, DecoderSettings]):
    """Draws pictures with classifier-free guidance and, where asked, CLIP guidance (which needs the image tower)."""

    def __init__(self, decoder: Decoder, settings: DecoderSettings, clip: ClipModel) -> None:
        super().__init__(decoder, settings)
        self._clip = clip

    def sample(
        self,
        condition: Condition,
        draws: SampleDraws,
        options: DecoderOptions = OWN_SAMPLER,
        negative_caption: str = NO_CAPTION,
        beginning: Beginning = FROM_NOISE,
    ) -> Tensor:
        """Pictures float32 [B, 3, S, S] in [-1, 1]."""
        sampler, size = options.over(self.settings.sampler), self.settings.image_size
        return self.draw(
            self._guided(condition, sampler, negative_caption),
            draws,
            "decoder",
            (3, size, size),
            sampler,
            guidance=self._clip_guidance(condition.text.embed, sampler.clip_guidance_scale),
            constrain=beginning.known,
            x_T=beginning.x_T,
            image=beginning.image,
            strength=beginning.strength,
        )

    def invert(
        self,
        condition: Condition,
        image: Tensor,
        options: DecoderOptions = OWN_SAMPLER,
        negative_caption: str = NO_CAPTION,
    ) -> Tensor:
        """The noise x_T [B, 3, S, S] from which `sample`, under the same and with eta = 0, makes about these pictures,
        float [B, 3, S, S] in [-1, 1] (unCLIP, section 3: the part of a picture that its embedding does not tell)."""
        sampler = options.over(self.settings.sampler)
        return self.noise_of(self._guided(condition, sampler, negative_caption), image, sampler)

    def _guided(self, condition: Condition, sampler: DecoderSamplerSettings, negative_caption: str) -> Denoise:
        guidance = ClassifierFree(sampler, self.settings.schedule.timesteps)
        negative, embed = None, condition.image_embed
        if guidance.acts:
            drop_all = torch.ones(len(embed), dtype=torch.bool, device=embed.device)
            negative = Condition(
                embed, CaptionEncoder(self._clip).encode_all_as(negative_caption, len(embed)), drop_all
            )
        return guided(self.network, condition, negative, guidance)

    def _clip_guidance(self, text_embed: Tensor, scale: float) -> ClipGuidance | None:
        if scale == 0.0:
            return None
        if self._clip.towers is Towers.TEXT:
            raise UserError(f"clip_guidance_scale={scale} needs CLIP's image tower, which is not loaded; use 0")
        return ClipGuidance(self._clip, text_embed, scale)
