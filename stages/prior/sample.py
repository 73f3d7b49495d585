"""Captions to image embeddings."""

from functools import partial

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.captions import NO_CAPTION, CaptionEncoder
from stages.clip.network import TextEncoding
from stages.diffusion.guidance import ClassifierFree, guided
from stages.diffusion.sampler import NetworkSampler
from stages.prior.network import denoise_prior, get_whitening
from stages.prior.settings import PriorOptions, PriorSettings

OWN_SAMPLER = PriorOptions()


class PriorSampler(NetworkSampler[PriorTransformer, PriorSettings]):
    """Draws image embeddings for captions (unCLIP, section 2.2: several are drawn and the best match is kept)."""

    def __init__(self, prior: PriorTransformer, settings: PriorSettings, captions: CaptionEncoder) -> None:
        super().__init__(prior, settings)
        self._captions = captions

    def sample(
        self,
        text: TextEncoding,
        draws: SampleDraws,
        options: PriorOptions = OWN_SAMPLER,
        negative_caption: str = NO_CAPTION,
    ) -> Tensor:
        """Image embeddings float32 [B, E] as CLIP's projection gives them; of the candidates, the one with the highest
        dot product with the caption's embedding. Guidance leads away from the negative caption."""
        sampler, whitening = options.over(self.settings.sampler), get_whitening(self.network)
        guidance = ClassifierFree(sampler, self.settings.schedule.timesteps)
        negative = self._captions.encode([negative_caption] * len(text.embed)) if guidance.acts else None
        drawn = []
        for candidate in range(sampler.candidates):
            whitened = self.draw(
                guided(partial(denoise_prior, self.network), text, negative, guidance),
                draws,
                f"prior {candidate}",
                (text.embed.shape[1],),
                sampler,
                clip_range=sampler.clip_sample_range,
            )
            drawn.append(whitening.unwhiten(whitened))
        scores = torch.stack([(z_i * text.embed).sum(1) for z_i in drawn])
        best = scores.argmax(0)
        return torch.stack(drawn)[best, torch.arange(len(best), device=best.device)]
