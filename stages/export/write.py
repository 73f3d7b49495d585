"""What `unclip export` and the stage `export` write: networks, their configs, and a card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact
from stages.clip.network import ClipModel, load_clip
from stages.clip.settings import OpenClipNetworkSettings
from stages.export.card import Card, write_card
from stages.export.destination import RECORD
from stages.export.obstacle import obstacle
from stages.export.open_clip_directory import save_open_clip
from stages.export.settings import CONFIGS, EXPORT, Dtype, ExportFormat
from stages.export.stock_pipeline import in_dtype, save_stock_pipeline
from stages.export.transformers_clip import save_transformers_clip, text_to_transformers, vision_to_transformers
from stages.generation.text_to_image import TextToImage, chain_of_inputs
from stages.weights import CPU

_TORCH_DTYPES = {Dtype.FP32: torch.float32, Dtype.FP16: torch.float16, Dtype.BF16: torch.bfloat16}


@torch.no_grad()
def write_export(
    directory: Path, run: str, kind: ExportFormat, dtype: Dtype, sources: Sequence[Artifact], whole: Sequence[Artifact]
) -> None:
    """Write `sources`, artifacts of a run, as the format asks; `whole` are all that the run has finished, for the card.

    Raises:
        UserError: the networks do not fit each other, or their weights do not fit the type.
    """
    torch_dtype = _TORCH_DTYPES[dtype]
    disable_progress_bar()
    match kind:
        case ExportFormat.DIFFUSERS:
            inputs = {each.name: tuple(a for a in sources if a.manifest.kind == each.name) for each in EXPORT.inputs}
            write_chain(directory, chain_of_inputs(inputs, CPU), torch_dtype)
        case ExportFormat.OPEN_CLIP:
            save_open_clip(directory, load_clip(sources[0]), torch_dtype)
        case ExportFormat.TRANSFORMERS:
            save_transformers_clip(directory, load_clip(sources[0]), torch_dtype)
    _require_finite(directory, dtype)
    write_configs(directory, sources)
    write_card(directory, Card(run, kind, dtype, tuple(sources), tuple(whole)))
    stages = {each.manifest.stage: each.manifest.fingerprint for each in sources}
    _write_json(directory / RECORD, {"run": run, "format": kind.value, "dtype": dtype.value, "stages": stages})


@torch.no_grad()
def write_chain(
    directory: Path, chain: TextToImage, dtype: torch.dtype = torch.float32, *, with_image_tower: bool = True
) -> str | None:
    """Write for diffusers' stock pipelines where the networks fit them, and each network by itself where they do not.

    Further upsamplers go to `upsampler_<size>/`. Returns what was in the way of the stock pipelines, or None.
    """
    prior, decoder, upsamplers = chain.prior, chain.decoder, list(chain.upsamplers)
    settings = [each.settings for each in upsamplers]
    in_the_way = obstacle(prior.settings if prior else None, decoder.settings, settings, chain.clip.settings)
    if in_the_way is None:
        assert prior is not None, "as `obstacle` checked"
        first = upsamplers.pop(0)
        save_stock_pipeline(
            directory, chain.clip, prior, decoder, first, dtype=dtype, with_image_tower=with_image_tower
        )
    else:
        _write_towers(directory, chain.clip, with_image_tower=with_image_tower)
        decoder.network.save_parts(directory)
        if prior is not None:
            prior.network.save_pretrained(directory / "prior")
    for upsampler in upsamplers:
        network = cast(UNet2DModel, in_dtype(upsampler.network, dtype))
        network.save_pretrained(directory / f"upsampler_{upsampler.settings.high_size}")
    return in_the_way


def _write_towers(directory: Path, clip: ClipModel, *, with_image_tower: bool) -> None:
    """CLIP as transformers' classes, or as open_clip's directory `clip/` where these have no such towers."""
    if isinstance(clip.settings, OpenClipNetworkSettings):
        (directory / "clip").mkdir()
        save_open_clip(directory / "clip", clip, torch.float32)
        return
    text_to_transformers(clip).save_pretrained(directory / "text_encoder")
    if with_image_tower:
        vision_to_transformers(clip).save_pretrained(directory / "image_encoder")


def write_configs(directory: Path, artifacts: Sequence[Artifact]) -> None:
    """Every stage's settings, and which artifact they belong to."""
    (directory / CONFIGS).mkdir()
    for artifact in artifacts:
        manifest = artifact.manifest
        settings = _without_directories(manifest.config)
        content = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "settings": settings}
        _write_json(directory / CONFIGS / f"{manifest.stage}.json", content)


def _without_directories(value: Any) -> Any:
    """Settings in which absolute paths are file names: an export is handed on, and its maker's folders are not."""
    if isinstance(value, dict):
        return {name: _without_directories(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_directories(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _require_finite(directory: Path, dtype: Dtype) -> None:
    for path in sorted(directory.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if not file.get_tensor(name).isfinite().all():
                    raise UserError(f"{name} of {path.parent.name} is not finite in {dtype}; use --dtype bf16 or fp32")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
