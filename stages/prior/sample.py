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
        dot product with the caption's embedding. Guidance leads away from the negative caption.

        All candidates of the batch are drawn at once, with guidance 2 x candidates x B samples: without gradients the
        network holds the activations of one layer, not those of all that a training batch of B holds.
        """
        sampler, whitening = options.over(self.settings.sampler), get_whitening(self.network)
        guidance = ClassifierFree(sampler, self.settings.schedule.timesteps)
        texts = TextEncoding.stacked([text] * sampler.candidates)
        negative = self._captions.encode_all_as(negative_caption, len(texts.embed)) if guidance.acts else None
        whitened = self.draw(
            guided(partial(denoise_prior, self.network), texts, negative, guidance),
            _CandidatesDraws(draws, sampler.candidates),
            "prior {candidate}",
            (text.embed.shape[1],),
            sampler,
            clip_range=sampler.clip_sample_range,
        )
        drawn = whitening.unwhiten(whitened).unflatten(0, (sampler.candidates, -1))
        best = (drawn * text.embed).sum(2).argmax(0)
        return drawn[best, torch.arange(len(best), device=best.device)]


class _CandidatesDraws(SampleDraws):
    """The draws of all candidates [candidates * B, ...], one after the other; a purpose has `{candidate}` in it."""

    def __init__(self, draws: SampleDraws, candidates: int) -> None:
        super().__init__(draws.sample_seed.repeat(candidates))
        self._draws = draws
        self._candidates = candidates

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """As `SampleDraws.normal`."""
        drawn = [self._draws.normal(purpose.format(candidate=each), shape) for each in range(self._candidates)]
        return torch.cat(drawn)
