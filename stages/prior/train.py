"""The stage `prior`: from a caption to the image embedding that it calls for (unCLIP, section 2.2)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import MadeAhead
from pipeline.forecast.rehearsal import ROWS, Rehearsal, Training
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, StageModule, within
from stages.blocks import BLOCKS
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, Towers, load_clip
from stages.clip.settings import ClipSettings, OnClipNumbers
from stages.diffusion.process import NOISE, DiffusionProcess
from stages.embed.embeddings import Embeddings, blank_embeddings, load_clip_embeddings
from stages.initial import load_initial
from stages.prior.network import build_prior, denoise_prior, get_whitening, read_prior_folder, set_whitening
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorSettings


def run(context: StageContext) -> StageResult:
    """Train the prior on cached image embeddings and the frozen text tower's states."""
    settings = context.settings_as(PriorSettings)
    clip_artifact = context.input("clip")
    clip = load_clip(clip_artifact, Towers.TEXT, context.device)
    embeddings = load_clip_embeddings(context.input("embeddings"), clip_artifact)
    with context.building():
        prior = build_prior(settings.network, clip.settings.embed_dim, clip.settings.context_length)
    if load_initial(context, prior, partial(read_prior_folder, prior)):
        # In the coordinates that it was trained in, which are in its weights.
        embeddings = replace(embeddings, whitening=get_whitening(prior))
    else:
        set_whitening(prior, embeddings.whitening)
    # The pictures themselves are not needed: the smallest size costs next to nothing to decode.
    ahead = MadeAhead(clip.tokenize, {NOISE: (clip.settings.embed_dim,)})
    images = context.images(1, ahead=ahead)
    result = fit(context, PriorModule(prior, settings, clip, embeddings), images)
    context.save(prior)
    numbers = OnClipNumbers(clip=clip_artifact.manifest.fingerprint, embed_dim=clip.settings.embed_dim)
    return StageResult(numbers, result.metrics, result.samples_seen)


def rehearse(rehearsal: Rehearsal) -> Training:
    """The prior and the frozen text tower, for a forecast."""
    settings, towers = rehearsal.settings_as(PriorSettings), rehearsal.input("clip").settings_as(ClipSettings).network
    with rehearsal.building():
        clip = ClipModel(towers, towers=Towers.TEXT)
        prior = build_prior(settings.network, towers.embed_dim, towers.context_length)
    return Training(PriorModule(prior, settings, clip, blank_embeddings(ROWS, towers.embed_dim)), 1, clip.tokenize)


class PriorModule(StageModule[PriorTransformer]):
    """Trains the prior to predict the whitened image embedding from a noised one and the caption."""

    block_classes = BLOCKS

    def __init__(
        self, prior: PriorTransformer, settings: PriorSettings, clip: ClipModel, embeddings: Embeddings
    ) -> None:
        super().__init__(prior, settings, frozen_networks=(clip,))
        self.settings = settings
        self.process = DiffusionProcess(settings.schedule, settings.objective)
        self._captions = CaptionEncoder(clip)
        self._embeddings = embeddings

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The diffusion loss of a batch, and the cosine of the predicted to the true embedding (no gradient)."""
        draws = batch.draws()
        image_embed = self._embeddings.image_embed[batch.sample].to(self.device, non_blocking=True)
        noised = self.process.noise(self._embeddings.whitening.whiten(image_embed), draws)
        is_dropped = draws.uniform("caption") < self.settings.caption_dropout
        _, text = self._captions.encode_dropping(batch.token_ids(), is_dropped)
        prediction = denoise_prior(self.network, noised.x_t, noised.timestep, text)
        z_i_hat = self._embeddings.whitening.unwhiten(self.process.x_0(prediction.detach(), noised))
        loss = self.process.loss(prediction, noised)
        return {
            LOSS: loss.mean(),
            "cosine_x_0_hat": F.cosine_similarity(z_i_hat, image_embed).mean(),
            **self.process.loss_by_timestep(loss, noised),
        }

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Losses, and the health of sampled embeddings: cosine to the true one, an unrelated one, and the caption's."""
        kept = list(batches)
        sampler = PriorSampler(self.network, self.settings, self._captions)
        sampled, true, text = [], [], []
        # Sampling costs as much as many steps of training, and the mean cosine of one batch tells enough.
        for batch in within(kept, self.settings.global_batch_size):
            sampled.append(sampler.sample(self._captions.encode_tokens(batch.token_ids()), batch.draws()))
            true.append(self._embeddings.image_embed[batch.sample])
            text.append(self._embeddings.text_embed[batch.sample])
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
