"""What a model card says of how to use a stage's output, and of where it comes from. Imports no torch."""

import json
import shlex
from typing import Any

from pipeline.workflow.artifacts import Artifact


def sampling(run: str, artifact: Artifact, caption: str) -> str:
    """Pictures by this project's own command, which needs no export and takes the run's own guidance."""
    del artifact
    return (
        "Pictures from captions, by this project:\n\n"
        f"    unclip sample {shlex.quote(run)} {shlex.quote(caption)} --count 4"
    )


def exported(run: str, artifact: Artifact, caption: str) -> str:
    """Stock diffusers where the export fits it, with the run's own guidance, else why it does not."""
    del run
    if not artifact.numbers["stock_pipeline"]:
        return (
            f"The stock `UnCLIPPipeline` of diffusers cannot hold this run ({artifact.numbers['not_stock_because']}); "
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


def clip_origin(artifact: Artifact) -> str:
    """The checkpoint that a CLIP was started from, whose licence goes with it."""
    checkpoint = artifact.numbers.get("checkpoint")
    if checkpoint is None:
        return ""
    return (
        f"`{artifact.manifest.stage}` was started from the open_clip checkpoint `{checkpoint}`; its licence "
        "and its training data's are not known here, and hold for all that was made from it."
    )


def _guidance(artifact: Artifact, kind: str) -> float | None:
    """The guidance scale of the sampler of the exported stage of that kind."""
    for path in sorted((artifact.path / "configs").glob("*.json")):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["kind"] == kind:
            return float(config["settings"]["sampler"]["guidance_scale"])
    return None
