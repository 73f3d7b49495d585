"""The stage `embed`: CLIP's image and text embeddings of every sample, not normalised, with their statistics."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import MadeAhead
from pipeline.data.decode import DecodeFault
from pipeline.data.faults import FaultTally, too_many_faults
from pipeline.data.loader import rows_loader
from pipeline.data.prepared import PreparedData
from pipeline.data.splits import Split
from pipeline.forecast.rehearsal import Pass, Passes, Rehearsal
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from pipeline.workflow.progress import CHECKPOINTS
from stages.clip.network import ClipModel, load_clip
from stages.clip.settings import ClipSettings
from stages.embed.embeddings import Embeddings, Whitening, save_embeddings
from stages.embed.settings import EmbedNumbers, EmbedSettings
from stages.weights import bytes_of

PARTS = f"{CHECKPOINTS}/parts"


def run(context: StageContext) -> StageResult:
    """Embed all samples part by part; a part that is on disk is not made again."""
    settings = context.settings_as(EmbedSettings)
    fabric = inference_fabric(context.frozen.trainer)
    clip = load_clip(context.input("clip"), device=fabric.device)
    images = context.images(clip.settings.image_size, cache_mib=0, ahead=MadeAhead(clip.tokenize))
    (context.work / PARTS).mkdir(parents=True, exist_ok=True)
    total = len(images)
    row = np.arange(total)
    rows_of_part = {
        context.work / PARTS / f"part-{first:012}.safetensors": row[first : first + settings.part_samples]
        for first in range(0, total, settings.part_samples)
    }
    found = {path: part for path in rows_of_part if (part := _read_part(path)) is not None}
    # One loader for all parts: its workers start once, and read on while a part is written.
    loader = rows_loader(
        images,
        [rows for path, rows in rows_of_part.items() if path not in found],
        batch_size=settings.batch_size,
        workers=context.frozen.trainer.loader_workers,
        pin_memory=fabric.device.type == "cuda",
    )
    batches = iter(loader)
    parts, tally = [], FaultTally()
    for path, rows in rows_of_part.items():
        part = found.get(path)
        if part is None:
            part = _embed_rows(context, fabric, clip, batches, rows, total)
            context.ownership.require()
            _write_part(path, part)
        parts.append(part)
        tally.add(len(rows), part.faults)
        if tally.is_over(context.frozen.trainer.max_faulty_share):
            raise too_many_faults(tally, context.frozen.trainer.max_faulty_share, images.faulty_by_shard())
        context.step(int(rows[-1]) + 1, total)
    image_embed = torch.cat([part.image_embed for part in parts])
    text_embed = torch.cat([part.text_embed for part in parts])
    training_rows = torch.from_numpy(images.data.samples_in(Split.TRAIN))
    embeddings = Embeddings(image_embed, text_embed, Whitening.of(image_embed[training_rows]))
    save_embeddings(context.output, embeddings)
    clip_fingerprint = context.input("clip").manifest.fingerprint
    numbers = EmbedNumbers(clip=clip_fingerprint, embed_dim=image_embed.shape[1], samples=total)
    return StageResult(numbers, _similarities(embeddings, images.data) | tally.metrics(), samples_seen=total)


def rehearse(rehearsal: Rehearsal) -> Passes:
    """Both towers over all samples, for a forecast; the parts stay beside the artifact."""
    towers, samples = rehearsal.input("clip").settings_as(ClipSettings).network, rehearsal.data.samples
    with rehearsal.building():
        clip = ClipModel(towers).eval()
    embeds_bytes = None if samples is None else 2 * samples * towers.embed_dim * torch.float32.itemsize
    batch_size = rehearsal.settings_as(EmbedSettings).batch_size
    once = Pass(lambda batch: _embed(clip, batch), samples, batch_size, towers.image_size, clip.tokenize)
    return Passes((once,), embeds_bytes, embeds_bytes, bytes_of(clip))


def _embed(clip: ClipModel, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Image and text embeddings of a batch, float [B, E] each."""
    return clip.encode_image(batch.image_signed()), clip.encode_text(batch.token_ids()).embed


@dataclass(frozen=True)
class Part:
    """The embeddings of consecutive rows, float32 [n, E] each, and how many rows were shown others in their place."""

    image_embed: Tensor
    text_embed: Tensor
    faults: Counter[DecodeFault]


@torch.inference_mode()
def _embed_rows(
    context: StageContext,
    fabric: Fabric,
    clip: ClipModel,
    batches: Iterator[ImageBatch],
    rows: NDArray[np.int64],
    total: int,
) -> Part:
    """The part of these rows, which are the next that `batches` gives."""
    image_embeds, text_embeds = [], []
    faults: Counter[DecodeFault] = Counter()
    seen = int(rows[0])
    while seen <= rows[-1]:
        batch = next(batches).to(fabric.device, non_blocking=True)
        with fabric.autocast():
            image_embed, text_embed = _embed(clip, batch)
        image_embeds.append(image_embed.float())
        text_embeds.append(text_embed.float())
        faults.update(batch.faults)
        seen += len(batch)
        context.step(seen, total)
    # Left on the device until here: each copy from it would wait for the batch.
    return Part(torch.cat(image_embeds).cpu(), torch.cat(text_embeds).cpu(), faults)


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
