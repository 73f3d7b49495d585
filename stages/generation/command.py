"""`unclip sample RUN CAPTION ...`: PNGs and a grid from the networks of a run."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.cli import command_parser
from pipeline.config import SEED_LIMIT, TrainerSettings
from pipeline.data.mixing import named_seed
from pipeline.errors import UserError
from pipeline.picture_grid import save_grid
from pipeline.training.inference import inference_fabric
from pipeline.workflow.runs import read_run, run_artifacts
from stages.decoder.sample import DecoderOptions
from stages.generation.grid import captioned_grid, to_pil
from stages.generation.text_to_image import KINDS, GenerationOptions, TextToImage, chain_of_inputs, inputs_by_kind

BATCH_SIZE = 16
GRID_COLUMNS = 4


@dataclass(frozen=True)
class Request:
    """One picture that was asked for: its caption, the seed of what it draws, and its file's name."""

    caption: str
    seed: int
    file_name: str


def main(arguments: Sequence[str]) -> int:
    """Parse, load the run's networks, sample, write."""
    options = _parser().parse_args(arguments)
    _check(options)
    outputs = options.outputs
    record = read_run(outputs, options.run)
    artifacts = run_artifacts(outputs, record)
    unfinished = [stage.name for stage in record.stages if stage.name not in artifacts and stage.kind in KINDS]
    if unfinished:
        raise UserError(f"run {record.name} lacks {', '.join(unfinished)}; finish it with unclip run, then sample")
    fabric = inference_fabric(TrainerSettings.model_validate(record.config["trainer"]))
    with fabric.autocast():
        chain = chain_of_inputs(inputs_by_kind(artifacts.values()), fabric.device)
        requests = list(_requests(options.captions, options.count, options.seed))
        decoder = DecoderOptions(options.guidance, options.clip_guidance, options.steps)
        pictures = _sample(chain, requests, GenerationOptions(decoder, options.prior_guidance))
    output = options.output or outputs / "runs" / record.name / "samples"
    output.mkdir(parents=True, exist_ok=True)
    for request, picture in zip(requests, pictures, strict=True):
        picture.save(output / request.file_name)
    captions, seeds = [each.caption for each in requests], [each.seed for each in requests]
    grid = captioned_grid({"sample": pictures}, captions, seeds, columns=GRID_COLUMNS)
    save_grid(grid.image, grid.layout, output / "grid.png")
    print(f"{len(pictures)} pictures and grid.png in {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sample", "Pictures from captions by the networks of a run.")
    parser.add_argument("run", help="name of a finished run")
    parser.add_argument("captions", nargs="+", metavar="caption")
    parser.add_argument("--count", type=int, default=1, help="pictures for each caption")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance of the decoder; 1 is none")
    parser.add_argument("--prior-guidance", type=float, help="classifier-free guidance of the prior; 1 is none")
    parser.add_argument("--clip-guidance", type=float, metavar="S", help="scale of the CLIP similarity's gradient")
    parser.add_argument("--steps", type=int, help="sampling steps of the decoder")
    parser.add_argument("--output", type=Path, help="directory for the PNGs (default: runs/RUN/samples)")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise UserError(f"--count {options.count} makes no picture; give 1 or more")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps} is no number of sampling steps; give 1 or more")
    if not 0 <= options.seed < SEED_LIMIT:
        raise UserError(f"--seed {options.seed} is no seed of 64 bits; give 0 to {SEED_LIMIT - 1}")
    for name in ("guidance", "prior_guidance", "clip_guidance"):
        scale = getattr(options, name)
        if scale is not None and not math.isfinite(scale):
            raise UserError(f"--{name.replace('_', '-')} {scale} is no scale; give a finite number")


def _requests(captions: Sequence[str], count: int, seed: int) -> list[Request]:
    """Picture n of a caption has a seed of its own, whatever other captions are asked for."""
    return [
        Request(caption, named_seed(seed, caption, number), f"{position:02}-{_slug(caption)}-{number:02}.png")
        for position, caption in enumerate(captions)
        for number in range(count)
    ]


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"


def _sample(chain: TextToImage, requests: Sequence[Request], options: GenerationOptions) -> list[Image.Image]:
    pictures = []
    for first in range(0, len(requests), BATCH_SIZE):
        batch = requests[first : first + BATCH_SIZE]
        with torch.no_grad():
            generated = chain.generate([each.caption for each in batch], [each.seed for each in batch], options)
        pictures += [to_pil(picture) for picture in generated.final]
    return pictures
