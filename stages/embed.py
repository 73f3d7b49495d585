"""The stage `embed`: CLIP's image and text embeddings of every sample, not normalised, with their statistics."""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.dataset import CaptionedImages
from pipeline.data.faults import FaultTally, too_many_faults
from pipeline.data.loader import evaluation_loader
from pipeline.data.prepared import PreparedData
from pipeline.data.splits import Split
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.models.clip import ClipModel
from stages.models.embeddings import Embeddings, save_embeddings
from stages.models.prior import Whitening
from stages.settings import EmbedSettings

PARTS = "parts"


def run(context: StageContext) -> StageResult:
    """Embed all samples part by part; a part that is on disk is not made again."""
    settings = context.settings_as(EmbedSettings)
    fabric = inference_fabric(context.frozen.trainer)
    clip = ClipModel.load(context.input("clip").path).to(fabric.device).eval()
    images = CaptionedImages(context.input("data").path, clip.settings.image_size)
    (context.work / PARTS).mkdir(exist_ok=True)
    total = len(images)
    parts = []
    for first in range(0, total, settings.part_samples):
        rows = range(first, min(first + settings.part_samples, total))
        path = context.work / PARTS / f"part-{first:012}.safetensors"
        if not path.exists():
            _write_part(path, _embed_rows(context, fabric, clip, images, rows, settings.batch_size))
        parts.append(load_file(path))
        context.step(rows.stop, total)
    image_embed = torch.cat([part["image_embed"] for part in parts])
    text_embed = torch.cat([part["text_embed"] for part in parts])
    training_rows = torch.from_numpy(images.data.samples_in(Split.TRAIN))
    embeddings = Embeddings(image_embed, text_embed, Whitening.of(image_embed[training_rows]))
    save_embeddings(context.output, embeddings)
    numbers = {"embed_dim": image_embed.shape[1], "samples": total, "clip": context.input("clip").manifest.fingerprint}
    return StageResult(numbers, _similarities(embeddings, images.data), samples_seen=total)


@torch.inference_mode()
def _embed_rows(
    context: StageContext, fabric: Fabric, clip: ClipModel, images: CaptionedImages, rows: range, batch_size: int
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"image_embed": [], "text_embed": []}
    loader = evaluation_loader(
        images,
        split=None,
        batch_size=batch_size,
        first=rows.start,
        limit=len(rows),
        workers=context.frozen.trainer.loader_workers,
    )
    seen = rows.start
    tally = FaultTally()
    max_faulty_share = context.frozen.trainer.max_faulty_share
    for batch in loader:
        tally.add(len(batch), batch.faults)
        if tally.is_over(max_faulty_share):
            raise too_many_faults(tally, max_faulty_share, images.faulty_by_shard())
        with fabric.autocast():
            image_embed = clip.encode_image(batch.to(fabric.device).image_signed())
            text_embed = clip.encode_text(clip.tokenize(list(batch.caption)).to(fabric.device)).embed
        found["image_embed"].append(image_embed.float().cpu())
        found["text_embed"].append(text_embed.float().cpu())
        seen += len(batch)
        context.step(seen, len(images))
    return {name: torch.cat(embeds) for name, embeds in found.items()}


def _write_part(path: Path, embeds: dict[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(embeds, temporary)
    temporary.replace(path)


def _similarities(embeddings: Embeddings, data: PreparedData) -> dict[str, float]:
    """Mean cosine of a picture to its own caption and to another one, over the validation split."""
    rows = torch.from_numpy(data.samples_in(Split.VALIDATION))
    image_embed, text_embed = embeddings.image_embed[rows], embeddings.text_embed[rows]
    return {
        "cosine_to_own_caption": float(F.cosine_similarity(image_embed, text_embed).mean()),
        "cosine_to_other_caption": float(F.cosine_similarity(image_embed, text_embed.roll(1, 0)).mean()),
    }
