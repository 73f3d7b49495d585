"""The model card of an export: its `README.md`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.metrics import format_number, is_bound
from pipeline.workflow.artifacts import Artifact
from stages.catalog import CATALOG
from stages.clip.settings import ContrastiveLoss
from stages.decoder.settings import DecoderSettings
from stages.diffusion.settings import Solver
from stages.export.settings import CONFIGS, Dtype, ExportFormat
from stages.prior.settings import PriorSettings
from stages.upsampler.settings import UpsamplerSettings

FILE = "README.md"
_TORCH_NAMES = {Dtype.FP16: "float16", Dtype.BF16: "bfloat16"}
_TITLES = {
    ExportFormat.DIFFUSERS: "DALL·E 2 (unCLIP) for diffusers",
    ExportFormat.OPEN_CLIP: "CLIP for open_clip",
    ExportFormat.TRANSFORMERS: "CLIP for transformers",
}
_LIBRARIES = {
    ExportFormat.DIFFUSERS: ("diffusers", "text-to-image"),
    ExportFormat.OPEN_CLIP: ("open_clip", "zero-shot-image-classification"),
    ExportFormat.TRANSFORMERS: ("transformers", "zero-shot-image-classification"),
}


@dataclass(frozen=True)
class Card:
    """What an export's card tells: `sources` are the exported artifacts, `whole` all that the run has finished."""

    run: str
    kind: ExportFormat
    dtype: Dtype
    sources: tuple[Artifact, ...]
    whole: tuple[Artifact, ...]


def write_card(directory: Path, card: Card) -> None:
    """Write the card of what stands in the directory."""
    library, task = _LIBRARIES[card.kind]
    sections = [
        f"---\nlicense: unknown\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [unclip]\n---",
        f"# {_TITLES[card.kind]}\n\n{_summary(card)}",
        f"## Use\n\n{_use(directory, card)}",
        f"## Licence\n\n{_licence(card)}",
        f"## Metrics\n\n{_metrics(card)}",
        f"## Settings\n\n{_settings(card)}",
    ]
    (directory / FILE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _summary(card: Card) -> str:
    versions = ", ".join(sorted({each.manifest.code_version for each in card.sources}))
    rows = [
        [each.manifest.stage, f"{each.manifest.samples_seen:,}", each.manifest.fingerprint] for each in card.sources
    ]
    made = f"Run `{card.run}`, trained by unclip ({versions}); weights in {card.dtype.value}."
    return f"{made}\n\n{_table(['stage', 'samples seen', 'fingerprint'], rows)}"


def _use(directory: Path, card: Card) -> str:
    """Code that runs in the directory, and what it does otherwise than unclip."""
    match card.kind:
        case ExportFormat.DIFFUSERS:
            return _use_of_diffusers(directory, card)
        case ExportFormat.OPEN_CLIP:
            code, notes = _OPEN_CLIP, [_SQUARES]
        case ExportFormat.TRANSFORMERS:
            code, notes = _TRANSFORMERS, [_SQUARES, _CAPTIONS]
            if card.sources[0].manifest.config.get("loss") == ContrastiveLoss.SIGLIP.value:
                notes.append(
                    "It was trained with SigLIP's loss. `CLIPModel` has no place for that loss's bias, so that the "
                    "logits are without it; it is the same for all pairs and changes no ranking."
                )
    return f"In this directory:\n\n{_python(code)}\n\n{_list(notes)}"


def _use_of_diffusers(directory: Path, card: Card) -> str:
    index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    sampling: dict[str, float] = index["sampling"]
    loading = f'".", dtype=torch.{_TORCH_NAMES[card.dtype]}' if card.dtype in _TORCH_NAMES else '"."'
    on_device = '.to("cuda")' if card.dtype in _TORCH_NAMES else ""
    has_variations = "image_encoder" in index
    stock = _STOCK.format(arguments=_arguments(sampling))
    defaults = _DEFAULTS
    if has_variations:
        stock += _STOCK_VARIATION.format(
            arguments=_arguments({name: each for name, each in sampling.items() if not name.startswith("prior_")})
        )
        defaults += _DEFAULTS_VARIATION
    parts = [
        "In this directory, by stock diffusers, which has to be told the run's guidance and steps (its own guidance, 4 "
        "and 8, spoils the pictures of networks that were not trained for it):",
        _python(stock),
        "or with the run's own values as defaults, by the small files beside this one, which diffusers runs if it is "
        "allowed to:",
        _python(defaults),
    ]
    if card.dtype in _TORCH_NAMES:
        half = f"UnCLIPPipeline.from_pretrained({loading}){on_device}"
        parts.append(
            "So the weights are read as float32, which a CPU needs. On a GPU, after `import torch`: "
            f"`pipeline = {half}`."
        )
    return "\n\n".join([*parts, "Otherwise than in unclip:", _list(list(_differences(card)))])


def _differences(card: Card) -> Iterator[str]:
    """Where the stock pipelines do not sample as the run did."""
    yield (
        "Their timesteps are spaced otherwise, with both ends among them, so that the same noise gives another picture "
        "unless there are as many steps as the schedule has."
    )
    yield _CAPTIONS
    for artifact in card.sources:
        match artifact.manifest.kind:
            case "prior":
                sampler = artifact.settings(PriorSettings).sampler
                if sampler.candidates > 1:
                    yield f"One image embedding is drawn for a caption, and not the best of {sampler.candidates}."
            case "decoder":
                sampler = artifact.settings(DecoderSettings).sampler
                if sampler.clip_guidance_scale > 0.0:
                    yield f"There is no guidance by CLIP, which the run has at scale {sampler.clip_guidance_scale:g}."
            case "upsampler":
                sampler = artifact.settings(UpsamplerSettings).sampler
            case _:
                continue
        name = artifact.manifest.stage
        eta = sampler.solver.eta(sampler.eta)
        if sampler.solver is Solver.DPM_SOLVER_PP_2M:
            yield f"The {name} is sampled by DDPM, and not by {sampler.solver.value}."
        elif eta != 1.0:
            yield f"The {name} is sampled with eta 1, and not {eta:g}."
        if sampler.guidance_rescale > 0.0 or sampler.guidance_interval != (0.0, 1.0):
            yield f"The guidance of the {name} acts at all timesteps, and is not rescaled."


def _licence(card: Card) -> str:
    data = {str(each.manifest.numbers["licence"]) for each in card.whole if "licence" in each.manifest.numbers}
    lines = [f"Data: {_one_line(each)}" for each in sorted(data)]
    origins = ((CATALOG.stages[each.manifest.kind].origin, each) for each in card.sources)
    lines += [said for origin, each in origins if origin is not None and (said := origin(each))]
    lines.append("Weights: none is stated. Who publishes them chooses one, and sets `license` at the top of this file.")
    return _list(lines)


def _metrics(card: Card) -> str:
    rows = [
        [each.manifest.stage, f"`{name}`", format_number(value)]
        for each in card.whole
        for name, value in each.manifest.metrics.items()
        if not is_bound(name, each.manifest.metrics)
    ]
    return _table(["stage", "metric", "value"], rows) if rows else "None were recorded."


def _settings(card: Card) -> str:
    """What counts of each stage's settings; all of them are in `configs/`."""
    counted = {each.manifest.stage: each.manifest.identity.get("settings") for each in card.sources}
    text = json.dumps(counted, indent=2, ensure_ascii=False)
    return f"Whole, they are in `{CONFIGS}/`. What made the weights what they are:\n\n```json\n{text}\n```"


def _arguments(values: dict[str, float]) -> str:
    return "".join(f"    {name}={value:g},\n" for name, value in values.items())


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {each}" for each in lines)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(each.replace('|', '/') for each in line)} |" for line in lines)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


_CAPTIONS = (
    "Captions are taken as they are: mend broken Unicode, resolve HTML entities and collapse spaces before, as unclip "
    "and open_clip do."
)
_SQUARES = (
    "Pictures that are not of the tower's size are resized by Pillow or torchvision, a little otherwise than by unclip."
)

_STOCK = """
from diffusers import UnCLIPPipeline

pipeline = UnCLIPPipeline.from_pretrained(".")
picture = pipeline(
    "a caption of your own",
{arguments}).images[0]
picture.save("picture.png")
"""
_STOCK_VARIATION = """
from diffusers import UnCLIPImageVariationPipeline

variations = UnCLIPImageVariationPipeline.from_pretrained(".")
variation = variations(
    picture,
{arguments}).images[0]
variation.save("variation.png")
"""
_DEFAULTS = """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline="text_to_image", trust_remote_code=True)
picture = pipeline("a caption of your own").images[0]
picture.save("picture.png")
"""
_DEFAULTS_VARIATION = """
variations = DiffusionPipeline.from_pretrained(".", custom_pipeline="image_variation", trust_remote_code=True)
variations(picture).images[0].save("variation.png")
"""
_OPEN_CLIP = """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
picture = Image.new("RGB", (64, 64), "red")
with torch.no_grad():
    image = model.encode_image(preprocess(picture)[None], normalize=True)
    text = model.encode_text(tokenizer(["a caption of your own", "another one"]), normalize=True)
print(image @ text.T)
"""
_TRANSFORMERS = """
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("."), CLIPProcessor.from_pretrained(".")
picture = Image.new("RGB", (64, 64), "red")
inputs = processor(
    text=["a caption of your own", "another one"],
    images=picture,
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    print(model(**inputs).logits_per_image)
"""
