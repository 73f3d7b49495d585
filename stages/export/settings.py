"""The stage `export`: settings, what it needs and gives, and how its output is used. Imports no torch."""

import json
from enum import StrEnum
from typing import Any

from pipeline.config import Settings
from pipeline.workflow.artifacts import Artifact, Numbers
from pipeline.workflow.declaration import Arity, Input, StageDeclaration, Workflow
from stages.export.obstacle import obstacle_of

CONFIGS = "configs"


class ExportFormat(StrEnum):
    """Whose loader reads what `unclip export` writes."""

    DIFFUSERS = "diffusers"
    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"


class Dtype(StrEnum):
    """The floating-point type of exported weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class ExportSettings(Settings):
    """Gathers a run's weights and configs in one directory; unCLIP runs load in diffusers' stock pipelines."""

    include_clip_image_tower: bool


class ExportNumbers(Numbers):
    """Whether diffusers' stock pipelines hold the run, and if not, why."""

    stock_pipeline: bool
    not_stock_because: str | None = None


def usage(run: str, artifact: Artifact, caption: str) -> str:
    """Stock diffusers where the export fits it, with the run's own guidance, else why it does not."""
    del run
    numbers = artifact.numbers(ExportNumbers)
    if not numbers.stock_pipeline:
        return (
            f"The stock `UnCLIPPipeline` of diffusers cannot hold this run ({numbers.not_stock_because}); "
            f"each network is in diffusers' format below `{artifact.path}`."
        )
    scales = {f"{kind}_guidance_scale": _guidance(artifact, kind) for kind in ("prior", "decoder")}
    asked = "".join(f", {name}={scale:g}" for name, scale in scales.items() if scale is not None)
    return (
        "By stock `diffusers`, which needs nothing of this project:\n\n"
        "    from diffusers import UnCLIPPipeline\n"
        f"    pipeline = UnCLIPPipeline.from_pretrained({str(artifact.path)!r})\n"
        f"    pipeline({caption!r}{asked}).images[0]\n\n"
        "The scales are those that this run was sampled with; 1 is without classifier-free guidance, and the "
        "pipeline's own defaults are 4 and 8."
    )


def _guidance(artifact: Artifact, kind: str) -> float | None:
    """The guidance scale of the sampler of the exported stage of that kind."""
    for path in sorted((artifact.path / CONFIGS).glob("*.json")):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["kind"] == kind:
            return float(config["settings"]["sampler"]["guidance_scale"])
    return None


def notice(_settings: ExportSettings, workflow: Workflow) -> str | None:
    """What a plan says where the stock pipelines will not hold the run."""
    in_the_way = obstacle_of(workflow)
    if in_the_way is None:
        return None
    return (
        f"diffusers' stock UnCLIPPipeline will not hold this run ({in_the_way}); each network is exported by itself, "
        "and unclip export --format diffusers will refuse"
    )


EXPORT = StageDeclaration(
    version=2,
    settings=ExportSettings,
    run="stages.export.run:run",
    rehearse="stages.export.run:rehearse",
    output="model",
    inputs=(Input("clip"), Input("prior", Arity.OPTIONAL), Input("decoder"), Input("upsampler", Arity.ANY)),
    numbers=ExportNumbers,
    usage=usage,
    notice=notice,
)
