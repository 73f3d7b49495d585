"""Captions to image embeddings."""

from functools import partial

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.captions import CaptionEncoder
from stages.clip.network import TextEncoding
from stages.diffusion.guidance import guided
from stages.diffusion.process import DiffusionProcess
from stages.diffusion.sampler import drawn_noise, sample
from stages.prior.network import denoise_prior, get_whitening
from stages.prior.settings import PriorSettings


class PriorSampler:
    """Draws image embeddings for captions (unCLIP, section 2.2: several are drawn and the best match is kept)."""

    def __init__(self, prior: PriorTransformer, settings: PriorSettings, captions: CaptionEncoder) -> None:
        self._prior = prior
        self._settings = settings
        self._captions = captions
        self._whitening = get_whitening(prior)
        self._process = DiffusionProcess(settings.schedule, settings.objective).to(next(prior.parameters()).device)

    def sample(
        self, text: TextEncoding, draws: SampleDraws, guidance_scale: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Image embeddings float32 [B, E] as CLIP's projection gives them; of the candidates, the one with the highest
        dot product with the caption's embedding."""
        sampler = self._settings.sampler
        scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
        none = self._captions.encode_none(len(text.embed)) if scale != 1.0 else None
        denoise = guided(partial(denoise_prior, self._prior), text, none, scale)
        best, best_score = None, None
        for candidate in range(sampler.candidates):
            x_T, step_noise = drawn_noise(draws, f"prior {candidate}", (text.embed.shape[1],))  # noqa: N806
            whitened = sample(
                denoise,
                x_T,
                self._process,
                steps or sampler.steps,
                clip_range=sampler.clip_sample_range,
                eta=sampler.eta,
                step_noise=step_noise,
            )
            z_i = self._whitening.unwhiten(whitened)
            score = (z_i * text.embed).sum(1)
            if best is None or best_score is None:
                best, best_score = z_i, score
            else:
                best = torch.where((score > best_score)[:, None], z_i, best)
                best_score = torch.maximum(score, best_score)
        assert best is not None, "settings give at least one candidate"
        return best
