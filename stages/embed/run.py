"""The stage `embed`: CLIP's image and text embeddings of every sample, not normalised, with their statistics."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.decode import DecodeFault
from pipeline.data.faults import FaultTally, too_many_faults
from pipeline.data.loader import evaluation_loader
from pipeline.data.prepared import PreparedData
from pipeline.data.splits import Split
from pipeline.forecast.ahead import Ahead, Pass, Passes
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.clip.network import ClipModel, load_clip
from stages.clip.settings import ClipSettings
from stages.embed.embeddings import Embeddings, Whitening, save_embeddings
from stages.embed.settings import EmbedNumbers, EmbedSettings
from stages.weights import bytes_of

PARTS = "parts"


def run(context: StageContext) -> StageResult:
    """Embed all samples part by part; a part that is on disk is not made again."""
    settings = context.settings_as(EmbedSettings)
    fabric = inference_fabric(context.frozen.trainer)
    clip = load_clip(context.input("clip"), device=fabric.device)
    images = context.images(clip.settings.image_size, cache_mib=0)
    (context.work / PARTS).mkdir(exist_ok=True)
    total = len(images)
    parts, tally = [], FaultTally()
    for first in range(0, total, settings.part_samples):
        rows = range(first, min(first + settings.part_samples, total))
        path = context.work / PARTS / f"part-{first:012}.safetensors"
        part = _read_part(path)
        if part is None:
            part = _embed_rows(context, fabric, clip, images, rows, settings.batch_size)
            context.ownership.require()
            _write_part(path, part)
        parts.append(part)
        tally.add(len(rows), part.faults)
        if tally.is_over(context.frozen.trainer.max_faulty_share):
            raise too_many_faults(tally, context.frozen.trainer.max_faulty_share, images.faulty_by_shard())
        context.step(rows.stop, total)
    image_embed = torch.cat([part.image_embed for part in parts])
    text_embed = torch.cat([part.text_embed for part in parts])
    training_rows = torch.from_numpy(images.data.samples_in(Split.TRAIN))
    embeddings = Embeddings(image_embed, text_embed, Whitening.of(image_embed[training_rows]))
    save_embeddings(context.output, embeddings)
    clip_fingerprint = context.input("clip").manifest.fingerprint
    numbers = EmbedNumbers(clip=clip_fingerprint, embed_dim=image_embed.shape[1], samples=total)
    return StageResult(numbers, _similarities(embeddings, images.data) | tally.metrics(), samples_seen=total)


def rehearse(ahead: Ahead) -> Passes:
    """Both towers over all samples, for a forecast; the parts stay beside the artifact."""
    towers, samples = ahead.input("clip").settings_as(ClipSettings).network, ahead.data.samples
    with ahead.building():
        clip = ClipModel(towers).eval()
    embeds_bytes = None if samples is None else 2 * samples * towers.embed_dim * torch.float32.itemsize
    batch_size = ahead.settings_as(EmbedSettings).batch_size
    once = Pass(lambda batch: _embed(clip, batch), samples, batch_size, towers.image_size)
    return Passes((once,), embeds_bytes, embeds_bytes, bytes_of(clip))


def _embed(clip: ClipModel, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Image and text embeddings of a batch, float [B, E] each."""
    device = batch.image.device
    return clip.encode_image(batch.image_signed()), clip.encode_text(
        clip.tokenize(list(batch.caption)).to(device)
    ).embed


@dataclass(frozen=True)
class Part:
    """The embeddings of consecutive rows, float32 [n, E] each, and how many rows were shown others in their place."""

    image_embed: Tensor
    text_embed: Tensor
    faults: Counter[DecodeFault]


@torch.inference_mode()
def _embed_rows(
    context: StageContext, fabric: Fabric, clip: ClipModel, images: CaptionedImages, rows: range, batch_size: int
) -> Part:
    image_embeds, text_embeds = [], []
    faults: Counter[DecodeFault] = Counter()
    loader = evaluation_loader(
        images,
        split=None,
        batch_size=batch_size,
        first=rows.start,
        limit=len(rows),
        workers=context.frozen.trainer.loader_workers,
    )
    seen = rows.start
    for batch in loader:
        with fabric.autocast():
            image_embed, text_embed = _embed(clip, batch.to(fabric.device))
        image_embeds.append(image_embed.float().cpu())
        text_embeds.append(text_embed.float().cpu())
        faults.update(batch.faults)
        seen += len(batch)
        context.step(seen, len(images))
    return Part(torch.cat(image_embeds), torch.cat(text_embeds), faults)


def _write_part(path: Path, part: Part) -> None:
    temporary = path.with_suffix(f".tmp-{uuid4().hex}")
    embeds = {"image_embed": part.image_embed, "text_embed": part.text_embed}
    save_file(embeds, temporary, metadata={"faults": json.dumps(part.faults)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_part(path: Path) -> Part | None:
    """A part that was made before; None if there is none, or a power cut tore it."""
    try:
        with safe_open(path, "pt") as file:
            faults = json.loads(file.metadata()["faults"])
            image_embed, text_embed = file.get_tensor("image_embed"), file.get_tensor("text_embed")
    except (FileNotFoundError, SafetensorError):
        return None
    return Part(image_embed, text_embed, Counter({DecodeFault(name): count for name, count in faults.items()}))


def _similarities(embeddings: Embeddings, data: PreparedData) -> dict[str, float]:
    """Mean cosine of a picture to its own caption and to another one, over the validation split."""
    rows = torch.from_numpy(data.samples_in(Split.VALIDATION))
    image_embed, text_embed = embeddings.image_embed[rows], embeddings.text_embed[rows]
    return {
        "cosine_to_own_caption": float(F.cosine_similarity(image_embed, text_embed).mean()),
        "cosine_to_other_caption": float(F.cosine_similarity(image_embed, text_embed.roll(1, 0)).mean()),
    }
