"""The stage `decoder`: from a CLIP embedding and a caption to a picture, with L = L_diffusion + lambda L_clip."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import MadeAhead
from pipeline.data.draws import SampleDraws
from pipeline.data.loader import evaluation_loader
from pipeline.data.prepared import PreparedData
from pipeline.data.splits import Split
from pipeline.forecast.rehearsal import ROWS, Rehearsal, Training
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, SampleGrid, StageModule
from stages.blocks import BLOCKS
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, TextEncoding, Towers, load_clip
from stages.clip.settings import ClipSettings
from stages.decoder.network import Condition, Decoder, build_decoder, read_decoder_folder
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderCondition, DecoderNumbers, DecoderSettings
from stages.diffusion.clip_loss import clip_loss, output_gradient_norms
from stages.diffusion.process import NOISE, DiffusionProcess
from stages.embed.embeddings import Embeddings, blank_embeddings, load_clip_embeddings
from stages.evaluate.distances import frechet_distance
from stages.evaluate.estimate import mean
from stages.generation.grid import captioned_grid
from stages.initial import load_initial

GRID_PICTURES = 16
DECORRELATION_SAMPLES = 4096


def run(context: StageContext) -> StageResult:
    """Train the decoder on pictures, their CLIP embeddings and captions. With lambda = 0 no image tower is loaded."""
    settings = context.settings_as(DecoderSettings)
    clip_artifact = context.input("clip")
    clip = load_clip(clip_artifact, _towers(settings), context.device)
    if clip.towers is Towers.BOTH and context.device.type == "cpu":
        # A decoder's first weights are drawn after a CLIP's, which were once drawn to be replaced: the decoder of a
        # fingerprint is to stay the same.
        ClipModel(clip.settings, clip.loss)
    embeddings = None
    if settings.condition is DecoderCondition.IMAGE_EMBED:
        embeddings = load_clip_embeddings(context.input("embeddings"), clip_artifact)
    ahead = MadeAhead(clip.tokenize, {NOISE: (3, settings.image_size, settings.image_size)})
    images = context.images(settings.image_size, ahead=ahead)
    with context.building():
        decoder = build_decoder(settings, clip.settings.embed_dim)
    if not load_initial(context, decoder, partial(read_decoder_folder, decoder)):
        _fit_decorrelation(decoder, images.data, CaptionEncoder(clip), embeddings)
    shown = next(iter(evaluation_loader(images, split=Split.VALIDATION, batch_size=GRID_PICTURES, limit=GRID_PICTURES)))
    module = DecoderModule(
        decoder, settings, clip, embeddings, shown, log_every_steps=context.frozen.trainer.log_every_steps
    )
    result = fit(context, module, images)
    context.save(decoder)
    numbers = DecoderNumbers(
        clip=clip_artifact.manifest.fingerprint, embed_dim=clip.settings.embed_dim, image_size=settings.image_size
    )
    return StageResult(numbers, result.metrics, result.samples_seen)


def rehearse(rehearsal: Rehearsal) -> Training:
    """The decoder and what it needs of CLIP, for a forecast."""
    settings, towers = rehearsal.settings_as(DecoderSettings), rehearsal.input("clip").settings_as(ClipSettings).network
    with rehearsal.building():
        clip = ClipModel(towers, towers=_towers(settings))
        decoder = build_decoder(settings, towers.embed_dim)
    embeddings = None
    if settings.condition is DecoderCondition.IMAGE_EMBED:
        embeddings = blank_embeddings(ROWS, towers.embed_dim)
    shown = rehearsal.batch(GRID_PICTURES, settings.image_size, clip.tokenize)
    # Of a step that writes no row: the norms of the losses' gradients are for rows.
    module = DecoderModule(decoder, settings, clip, embeddings, shown, log_every_steps=settings.max_steps + 1)
    return Training(module, settings.image_size, clip.tokenize)


def _towers(settings: DecoderSettings) -> Towers:
    """The image tower too, where the loss or the sampler needs it."""
    needs_image_tower = settings.clip_loss.weight > 0 or settings.sampler.clip_guidance_scale > 0
    return Towers.BOTH if needs_image_tower else Towers.TEXT


def _fit_decorrelation(
    decoder: Decoder, data: PreparedData, captions: CaptionEncoder, embeddings: Embeddings | None
) -> None:
    """Take the statistics of what will condition the decoder, from the first samples of the training split."""
    rows = data.samples_in(Split.TRAIN)[:DECORRELATION_SAMPLES]
    if embeddings is not None:
        decoder.image_decorrelation.fit(embeddings.image_embed[torch.from_numpy(rows)])
        decoder.text_decorrelation.fit(embeddings.text_embed[torch.from_numpy(rows)])
        return
    text_embed = captions.encode([data.caption(int(row)) for row in rows]).embed
    decoder.image_decorrelation.fit(text_embed)
    decoder.text_decorrelation.fit(text_embed)


class DecoderModule(StageModule[Decoder]):
    """Trains the decoder; the CLIP and the embeddings are frozen."""

    block_classes = BLOCKS

    def __init__(
        self,
        decoder: Decoder,
        settings: DecoderSettings,
        clip: ClipModel,
        embeddings: Embeddings | None,
        shown: ImageBatch,
        log_every_steps: int,
    ) -> None:
        super().__init__(decoder, settings, frozen_networks=(clip,))
        self.settings = settings
        self.process = DiffusionProcess(settings.schedule, settings.objective)
        self._captions = CaptionEncoder(clip)
        self._embeddings = embeddings
        self._shown = shown
        self._log_every_steps = log_every_steps

    @property
    def clip(self) -> ClipModel:
        """The frozen CLIP; without its image tower where nothing needs it."""
        return cast(ClipModel, self.frozen_networks[0])

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """L_diffusion, L_clip and their sum; at logged steps the norms of their gradients at the network's output."""
        settings, draws = self.settings, batch.draws()
        noised = self.process.noise(batch.image_signed(), draws)
        is_dropped = draws.uniform("caption") < settings.caption_dropout
        whole_text, text = self._captions.encode_dropping(batch.token_ids(), is_dropped)
        drop_image_embed = draws.uniform("image_embed") < settings.image_embed_dropout
        condition = Condition(self._embed(batch, whole_text), text, drop_image_embed)
        prediction = self.network(noised.x_t, noised.timestep, condition)
        loss_of_each = self.process.loss(prediction, noised)
        loss_diffusion = loss_of_each.mean()
        diffusion = {"diffusion": loss_diffusion.detach(), **self.process.loss_by_timestep(loss_of_each, noised)}
        if settings.clip_loss.weight == 0:
            return {LOSS: loss_diffusion, **diffusion}
        loss_clip = clip_loss(
            self.clip,
            self.process.x_0(prediction, noised),
            whole_text.embed,
            self.process.schedule.sqrt_alpha_bar[noised.timestep] ** 2,
            SampleDraws(batch.sample_seed).uniform("clip_loss"),
            settings.clip_loss,
        ).mean()
        loss = loss_diffusion + settings.clip_loss.weight * loss_clip
        losses = {LOSS: loss, **diffusion, "clip": loss_clip.detach()}
        return losses | self._gradient_norms(loss_diffusion, settings.clip_loss.weight * loss_clip, prediction)

    def _embed(self, batch: ImageBatch, text: TextEncoding) -> Tensor:
        """The CLIP embedding that stands for the picture: its own from the cache, or that of its caption."""
        if self._embeddings is None:
            return text.embed
        return self._embeddings.image_embed[batch.sample].to(self.device, non_blocking=True)

    def _gradient_norms(self, loss_diffusion: Tensor, loss_clip: Tensor, prediction: Tensor) -> dict[str, Tensor]:
        is_logged = self.training and (self.global_step + 1) % self._log_every_steps == 0
        if not is_logged:
            return {}
        diffusion_norm, clip_norm = output_gradient_norms(loss_diffusion, loss_clip, prediction)
        return {"gradient_norm_diffusion": diffusion_norm, "gradient_norm_clip": clip_norm}

    def evaluation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Of pictures drawn from their own embeddings and captions, in the run's CLIP: cosines to the caption and to
        the real picture, and the Fréchet distance from the real ones, which flatters a decoder that the CLIP guided.

        None where nothing needs CLIP's image tower, which is then not loaded.
        """
        if self.clip.towers is Towers.TEXT:
            return {}
        texts, made, real = [], [], []
        for batch in batches:
            drawn, text = self._drawn(batch)
            for found, embed in (
                (texts, text.embed), (made, self.clip.encode_image(drawn)),
                (real, self.clip.encode_image(batch.image_signed())),
            ):  # fmt: skip
                found.append(F.normalize(embed.float(), dim=-1))
        text_embed, made_embed, real_embed = map(torch.cat, (texts, made, real))
        metrics = mean((made_embed * text_embed).sum(1)).named("sample_to_caption")
        metrics |= mean((made_embed * real_embed).sum(1)).named("sample_to_real")
        return metrics | ({"frechet": frechet_distance(made_embed, real_embed)} if len(real_embed) > 1 else {})

    def _drawn(self, batch: ImageBatch) -> tuple[Tensor, TextEncoding]:
        """Pictures [B, 3, S, S] from the samples' own embeddings and captions, and the captions' encoding."""
        text = self._captions.encode_tokens(batch.token_ids())
        sampler = DecoderSampler(self.network, self.settings, self.clip)
        return sampler.sample(Condition(self._embed(batch, text), text), batch.draws()), text

    def sample_grid(self) -> SampleGrid:
        """Validation pictures, each beside a sample from its own embedding and caption."""
        batch = self._shown.to(self.device)
        drawn = [self._drawn(piece)[0] for piece in batch.split(self.micro_batch_size)]
        pictures = {"real": batch.image_signed(), "sample": torch.cat(drawn)}
        return captioned_grid(pictures, batch.caption, batch.sample_seed.tolist(), columns=4)
