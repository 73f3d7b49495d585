"""The stage `clip`: image and text towers, trained together from the first weight (arXiv 2103.00020, 2303.15343)."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2.functional import rgb_to_grayscale

from pipeline.data.batch import ImageBatch, signed
from pipeline.data.dataset import CaptionedImages, MadeAhead
from pipeline.data.order import epoch_samples
from pipeline.data.splits import Split, check_batches_are_distinct
from pipeline.errors import UserError
from pipeline.forecast.rehearsal import Passes, Rehearsal, Training
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, StageModule
from stages.blocks import BLOCKS
from stages.clip.layers import layers_above
from stages.clip.network import MAX_LOGIT_SCALE, ClipModel, contrastive_loss, load_clip_source
from stages.clip.retrieval import retrieval_recall
from stages.clip.settings import FOREIGN, ClipNumbers, ClipSettings, ContrastiveLoss
from stages.clip.sources import clip_source
from stages.weights import bytes_of

RETRIEVAL_POOL = 64


def run(context: StageContext) -> StageResult:
    """Train CLIP, or take a checkpoint in; publish `clip.safetensors`."""
    settings = context.settings_as(ClipSettings)
    with context.building():
        clip = _initial_clip(context, settings)
    metrics, samples_seen = {}, 0
    if settings.max_samples > 0:
        images = context.images(settings.network.image_size, ahead=MadeAhead(clip.training_tokenizer))
        _check_batches(images, settings.global_batch_size, f"stage.{context.frozen.stage}.global_batch_size")
        result = fit(context, ClipModule(clip, settings), images)
        metrics, samples_seen = result.metrics, result.samples_seen
    if context.is_first_process:
        clip.save(context.output)
    network = settings.network
    numbers = ClipNumbers(
        embed_dim=network.embed_dim,
        context_length=network.context_length,
        image_size=network.image_size,
        checkpoint=_name_of_source(context, settings),
    )
    return StageResult(numbers, metrics, samples_seen)


def _name_of_source(context: StageContext, settings: ClipSettings) -> str | None:
    """What the card calls the weights that others made, whose licence goes with them, through whatever runs."""
    if context.initial is not None:
        return context.initial.numbers(ClipNumbers).checkpoint
    if settings.checkpoint is not None:
        return settings.checkpoint.name
    scheme, _, address = (settings.initial or "").partition(":")
    return Path(address).name if scheme in FOREIGN else None


def rehearse(rehearsal: Rehearsal) -> Training | Passes:
    """The towers, for a forecast. A checkpoint that replaces the training is copied."""
    settings = rehearsal.settings_as(ClipSettings)
    with rehearsal.building():
        clip = ClipModel(settings.network, settings.loss)
    if settings.max_samples == 0:
        return Passes((), bytes_of(clip))
    return Training(ClipModule(clip, settings), settings.network.image_size, clip.training_tokenizer)


def _check_batches(images: CaptionedImages, global_batch_size: int, key: str) -> None:
    """Raise `UserError` where the loss would take a picture for its own negative."""
    data = images.data
    samples = epoch_samples(data.samples_in(Split.TRAIN), data.index.shard, data.mixture)
    check_batches_are_distinct(samples, global_batch_size, key)


def _initial_clip(context: StageContext, settings: ClipSettings) -> ClipModel:
    """The CLIP to train: an artifact's, one that others made, or a new one."""
    key = f"stage.{context.frozen.stage}"
    if context.initial is not None:
        return ClipModel.load(context.initial.path, device=context.device)
    if settings.checkpoint is not None:
        return load_clip_source(clip_source(settings.checkpoint, f"{key}.checkpoint"), settings.network, settings.loss)
    if settings.initial is not None:
        folder = Path(settings.initial.partition(":")[2])
        return load_clip_source(clip_source(folder, f"{key}.initial"), settings.network, settings.loss)
    clip = ClipModel(settings.network, settings.loss)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in clip.modules()):
        raise UserError(
            f"{key}.model={settings.model} has batch normalisation, whose statistics are not trained here; give its "
            f"weights as {key}.checkpoint, or take a ViT"
        )
    if settings.initial_logit_scale is not None and settings.loss is ContrastiveLoss.CONTRASTIVE:
        nn.init.constant_(clip.network.logit_scale, math.log(settings.initial_logit_scale))
    return clip


class ClipModule(StageModule[ClipModel]):
    """Trains both towers by open_clip's contrastive or sigmoid loss over the global batch.

    A batch larger than memory is embedded in pieces whose activations are computed again when their gradients are due:
    the exact gradient of the whole batch, at the price of a second forward pass (as GradCache, arXiv 2101.06983).
    """

    needs_whole_share = True

    block_classes = BLOCKS
    weights_prefix = "network."

    def __init__(self, clip: ClipModel, settings: ClipSettings) -> None:
        super().__init__(clip, settings)
        self._kind = settings.loss
        self._gray_scale_share = settings.gray_scale_share

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The contrastive loss of a batch, and the scale on the similarities."""
        ranks = self.trainer.world_size if self.training else 1
        objective = contrastive_loss(self._kind, self.global_rank if self.training else 0, ranks)
        image_embed, text_embed = self._embed(self._in_gray(batch) if self.training else batch.image, batch.token_ids())
        loss = objective(image_embed, text_embed, self.network.logit_scale, self.network.logit_bias)
        return {LOSS: loss, "logit_scale": self.network.logit_scale.squeeze()}

    def _in_gray(self, batch: ImageBatch) -> Tensor:
        """The pictures, uint8 [B, 3, S, S], some of them without their colours (luma as of ITU-R BT.601)."""
        if self._gray_scale_share == 0:
            return batch.image
        is_gray = batch.draws().uniform("gray_scale") < self._gray_scale_share
        return torch.where(is_gray[:, None, None, None], rgb_to_grayscale(batch.image, 3), batch.image)

    def _embed(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text embeddings, float [B, E] each."""
        if not torch.is_grad_enabled() or len(image) <= self.micro_batch_size:
            return self._embed_piece(image, tokens)
        pieces = zip(image.split(self.micro_batch_size), tokens.split(self.micro_batch_size), strict=True)
        embeds = [checkpoint(self._embed_piece_of_many, *piece, use_reentrant=False) for piece in pieces]
        image_embed, text_embed = zip(*embeds, strict=True)
        return torch.cat(image_embed), torch.cat(text_embed)

    def _embed_piece(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(signed(image), tokens)

    def _embed_piece_of_many(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with self.with_cast_weights():
            return self._embed_piece(image, tokens)

    @property
    def layers_above(self) -> Mapping[str, int] | None:
        """Counted where the learning rate is to decay from layer to layer: not all towers have an order of blocks."""
        if self.stage_settings.optimizer.layer_decay is None:
            return None
        return layers_above(name for name, _ in self.network.named_parameters())

    @property
    def parameter_ranges(self) -> Mapping[str, tuple[float, float]]:
        """The scale on the similarities is kept in [1, 100] after every step, as in CLIP's training."""
        return {"network.logit_scale": (0.0, MAX_LOGIT_SCALE)}

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Recall of text-to-image and image-to-text retrieval among 64, and over all that are given."""
        pairs = [self._embed(batch.image, batch.token_ids()) for batch in batches]
        image_embed = F.normalize(torch.cat([image for image, _ in pairs]).float(), dim=-1)
        text_embed = F.normalize(torch.cat([text for _, text in pairs]).float(), dim=-1)
        return retrieval_recall(image_embed, text_embed, RETRIEVAL_POOL)
