"""The stage `prior`: from a caption to the image embedding that it calls for (unCLIP, section 2.2)."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.draws import SampleDraws
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, StageModule, within
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, Towers
from stages.diffusion.process import diffusion_loss, predicted_x_0, target, timestep_weight
from stages.diffusion.schedule import NoiseSchedule
from stages.embed.embeddings import Embeddings
from stages.prior.network import build_prior, denoise_prior, set_whitening
from stages.prior.sample import PriorSampler
from stages.settings import PriorSettings
from stages.weights import clip_numbers, load_clip, load_clip_embeddings, save_weights

"""Sampling costs as much as many steps of training, and the mean cosine of one batch tells enough."""


def run(context: StageContext) -> StageResult:
    """Train the prior on cached image embeddings and the frozen text tower's states."""
    settings = context.settings_as(PriorSettings)
    clip_artifact = context.input("clip")
    clip = load_clip(clip_artifact, Towers.TEXT)
    embeddings = load_clip_embeddings(context.input("embeddings"), clip_artifact)
    prior = build_prior(settings.network, clip.settings.embed_dim, clip.settings.context_length)
    set_whitening(prior, embeddings.whitening)
    # The pictures themselves are not needed: the smallest size costs next to nothing to decode.
    images = context.images(1, context.frozen.trainer.cache_mib)
    result = fit(context, PriorModule(prior, settings, clip, embeddings), images)
    if context.is_first_process:
        save_weights(prior, context.output)
    return StageResult(clip_numbers(clip_artifact), result.metrics, result.samples_seen)


class PriorModule(StageModule):
    """Trains the prior to predict the whitened image embedding from a noised one and the caption."""

    def __init__(
        self, prior: PriorTransformer, settings: PriorSettings, clip: ClipModel, embeddings: Embeddings
    ) -> None:
        super().__init__(prior, settings, frozen_networks=(clip,))
        self.settings = settings
        self.schedule = NoiseSchedule(settings.schedule)
        self._captions = CaptionEncoder(clip)
        self._embeddings = embeddings

    @property
    def prior(self) -> PriorTransformer:
        """The network that is trained."""
        return cast(PriorTransformer, self.network)

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The diffusion loss of a batch, and the cosine of the predicted to the true embedding (no gradient)."""
        draws = SampleDraws(batch.sample_seed)
        image_embed = self._embeddings.image_embed[batch.sample.cpu()].to(self.device)
        z_i = self._embeddings.whitening.whiten(image_embed)
        text = self._captions.encode(batch.caption, dropped=draws.uniform("caption") < self.settings.caption_dropout)
        timestep = draws.integer("timestep", self.schedule.timesteps)
        noise = draws.normal("noise", z_i.shape[1:])
        noisy = self.schedule.add_noise(z_i, noise, timestep)
        prediction = denoise_prior(self.prior, noisy, timestep, text.embed, text.hidden, text.mask)
        objective = self.settings.objective
        truth = target(objective.prediction_type, self.schedule, z_i, noise, timestep)
        weight = timestep_weight(objective, self.schedule, timestep)
        x_0_hat = predicted_x_0(objective.prediction_type, self.schedule, prediction.detach(), noisy, timestep)
        return {
            LOSS: diffusion_loss(prediction, truth, weight).mean(),
            "cosine_x_0_hat": F.cosine_similarity(self._embeddings.whitening.unwhiten(x_0_hat), image_embed).mean(),
        }

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Losses, and the health of sampled embeddings: cosine to the true one, an unrelated one, and the caption's."""
        kept = list(batches)
        sampler = PriorSampler(self.prior, self.settings, self._captions)
        sampled, true, text = [], [], []
        for batch in within(kept, self.settings.global_batch_size):
            sampled.append(sampler.sample(batch.caption, SampleDraws(batch.sample_seed)))
            true.append(self._embeddings.image_embed[batch.sample.cpu()])
            text.append(self._embeddings.text_embed[batch.sample.cpu()])
        z_i = torch.cat(sampled).cpu()
        cosine_to = partial(F.cosine_similarity, z_i)
        true_embed, text_embed = torch.cat(true), torch.cat(text)
        return {
            "cosine_to_image": float(cosine_to(true_embed).mean()),
            "cosine_to_other_image": float(cosine_to(true_embed.roll(1, 0)).mean()),
            "cosine_to_caption": float(cosine_to(text_embed).mean()),
            "cosine_to_other_caption": float(cosine_to(text_embed.roll(1, 0)).mean()),
            **super().validation_metrics(kept),
        }
