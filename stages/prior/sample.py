"""Captions to image embeddings."""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.captions import NO_CAPTION, CaptionEncoder
from stages.diffusion.guidance import classifier_free
from stages.diffusion.sampler import ReverseProcess, sample
from stages.diffusion.schedule import NoiseSchedule
from stages.prior.network import denoise_prior, get_whitening
from stages.settings import PriorSettings


class PriorSampler:
    """Draws image embeddings for captions (unCLIP, section 2.2: several are drawn and the best match is kept)."""

    def __init__(self, prior: PriorTransformer, settings: PriorSettings, captions: CaptionEncoder) -> None:
        self._prior = prior
        self._settings = settings
        self._captions = captions
        self._whitening = get_whitening(prior)
        schedule = NoiseSchedule(settings.schedule).to(next(prior.parameters()).device)
        clip_range = settings.sampler.clip_sample_range
        self._process = ReverseProcess(schedule, settings.objective.prediction_type, clip_range)

    def sample(
        self,
        captions: Sequence[str],
        draws: SampleDraws,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Image embeddings float32 [B, E] as CLIP's projection gives them; of the candidates, the one with the highest
        dot product with the caption's embedding."""
        text_embed = self._captions.encode(captions).embed
        best, best_score = None, None
        for candidate in range(self._settings.sampler.candidates):
            z_i = self._sample_one(captions, draws, f"prior {candidate}", guidance_scale, steps)
            score = (z_i * text_embed).sum(1)
            if best is None or best_score is None:
                best, best_score = z_i, score
            else:
                best = torch.where((score > best_score)[:, None], z_i, best)
                best_score = torch.maximum(score, best_score)
        assert best is not None, "settings give at least one candidate"
        return best

    def _sample_one(
        self, captions: Sequence[str], draws: SampleDraws, purpose: str, guidance_scale: float | None, steps: int | None
    ) -> Tensor:
        sampler = self._settings.sampler
        scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
        text = self._captions.encode(captions)
        none = self._captions.encode([NO_CAPTION] * len(captions)) if scale != 1.0 else None
        shape = (text.embed.shape[1],)

        def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
            conditional = denoise_prior(self._prior, x_t, timestep, text.embed, text.hidden, text.mask)
            if none is None:
                return conditional
            unconditional = denoise_prior(self._prior, x_t, timestep, none.embed, none.hidden, none.mask)
            return classifier_free(unconditional, conditional, scale)

        whitened = sample(
            denoise,
            draws.normal(purpose, shape),
            self._process,
            steps=steps or sampler.steps,
            eta=sampler.eta,
            step_noise=lambda index: draws.normal(f"{purpose} step {index}", shape),
        )
        return self._whitening.unwhiten(whitened)
