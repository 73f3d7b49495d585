"""Captions to image embeddings."""

from functools import partial

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.captions import CaptionEncoder
from stages.clip.network import TextEncoding
from stages.diffusion.guidance import guided
from stages.diffusion.sampler import NetworkSampler
from stages.prior.network import denoise_prior, get_whitening
from stages.prior.settings import PriorSettings


class PriorSampler(NetworkSampler[PriorTransformer, PriorSettings]):
    """Draws image embeddings for captions (unCLIP, section 2.2: several are drawn and the best match is kept)."""

    def __init__(self, prior: PriorTransformer, settings: PriorSettings, captions: CaptionEncoder) -> None:
        super().__init__(prior, settings)
        self._captions = captions

    def sample(
        self, text: TextEncoding, draws: SampleDraws, guidance_scale: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Image embeddings float32 [B, E] as CLIP's projection gives them; of the candidates, the one with the highest
        dot product with the caption's embedding.

        All candidates of the batch are drawn at once, with guidance 2 x candidates x B samples: without gradients the
        network holds the activations of one layer, not those of all that a training batch of B holds.
        """
        sampler, whitening = self.settings.sampler, get_whitening(self.network)
        scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
        texts = TextEncoding.stacked([text] * sampler.candidates)
        none = self._captions.encode_none(len(texts.embed)) if scale != 1.0 else None
        whitened = self.draw(
            guided(partial(denoise_prior, self.network), texts, none, scale),
            _CandidatesDraws(draws, sampler.candidates),
            "prior {candidate}",
            (text.embed.shape[1],),
            steps=steps or sampler.steps,
            eta=sampler.eta,
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
