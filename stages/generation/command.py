"""`unclip sample` and `unclip edit`: PNGs and a grid by the networks of a run. Thin over `stages.generation.model`."""

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import validate
from pipeline.errors import UserError
from pipeline.options import OptionParser, add_outputs, command_parser
from pipeline.picture_grid import save_grid
from pipeline.workflow.runs import read_run, run_directory
from stages.generation.captions import require_text
from stages.generation.load import load, load_for, require_sampled
from stages.generation.options import (
    BATCH_SIZE,
    GenerationOptions,
    Judge,
    Preset,
    require_count,
    require_seed,
    require_share,
)
from stages.generation.picture import Noise, Picture, as_image, read_recipe, require_mask

if TYPE_CHECKING:
    from stages.generation.model import Model

Given = argparse.Namespace

GRID_COLUMNS = 4
SAMPLES = "samples"
EDITS_DIRECTORY = "edits"

_KEYS = {
    "guidance": "decoder.guidance_scale",
    "prior_guidance": "prior.guidance_scale",
    "clip_guidance": "decoder.clip_guidance_scale",
    "steps": "decoder.steps",
    "solver": "decoder.solver",
    "negative": "negative_caption",
}
"""The keys of `GenerationOptions` that have an argument of their own."""


def main(arguments: Sequence[str]) -> int:
    """`unclip sample`: parse, load the run's networks, sample, write."""
    given = _sample_parser().parse_intermixed_args(arguments)
    if given.source is not None:
        return _make_again(given)
    if given.run is None or not given.captions:
        raise UserError("no caption is given; write: unclip sample RUN 'a caption', or: unclip sample --from PNG")
    if given.picture:
        raise UserError("--picture is what a picture of --from was made from; for pictures of one see: unclip edit")
    require_text(given.captions)
    require_count(given.best_of, "--best-of ")
    options = _options(given)
    require_sampled(given.run, given.outputs, options)
    output = _output(given, SAMPLES)
    pictures = _load(given)(
        given.captions,
        count=given.count,
        seed=given.seed,
        options=options,
        best_of=given.best_of,
        judge=Judge(given.judge),
    )
    names = [
        f"{position:02}-{_slug(caption)}-{number:02}.png"
        for position, caption in enumerate(given.captions)
        for number in range(given.count)
    ]
    _write(pictures, names, output)
    return 0


def edit(arguments: Sequence[str]) -> int:
    """`unclip edit`: variations of pictures, ways between them, and pictures that are drawn anew in part."""
    given = _edit_parser().parse_args(arguments)
    chosen, options = EDITS[given.operation], _options(given)
    for share in chosen.shares:
        require_share(getattr(given, share), f"--{share} ")
    for name in chosen.inputs:
        if name not in PICTURES:
            require_text([getattr(given, name)])
    inputs = {
        name: as_image(getattr(given, name)) if name in PICTURES else getattr(given, name) for name in chosen.inputs
    }
    if "mask" in inputs:
        require_mask(inputs["mask"], inputs["picture"])
    require_sampled(given.run, given.outputs, options)
    output = _output(given, f"{EDITS_DIRECTORY}/{given.operation}")
    numbers: dict[str, Any] = {share: getattr(given, share) for share in chosen.shares}
    if chosen.noise is not None:
        numbers["noise"] = Noise(given.noise)
    method = getattr(_load(given), chosen.method)
    pictures = method(*inputs.values(), count=given.count, seed=given.seed, options=options, **numbers)
    _write(pictures, [f"{place:02}.png" for place in range(len(pictures))], output)
    return 0


PICTURES = ("picture", "other_picture", "mask")
"""The inputs of an edit that are files of pictures; the others are captions."""


@dataclass(frozen=True)
class Edit:
    """An operation of `unclip edit`: the method of `Model` that it is, what is given after the run, and its numbers."""

    description: str
    method: str
    inputs: tuple[str, ...]
    count: int = 5
    shares: Mapping[str, float] = field(default_factory=dict)
    noise: Noise | None = None


EDITS = {
    "variations": Edit(
        "Pictures with the embedding of one; --eta says how much they differ.",
        "variations",
        ("picture",),
        count=4,
        shares={"eta": 1.0},
    ),
    "interpolate": Edit(
        "Pictures on the way from one to another.",
        "interpolate",
        ("picture", "other_picture"),
        noise=Noise.INTERPOLATED,
    ),
    "interpolate-captions": Edit(
        "Pictures on the way from one caption to another.",
        "interpolate_captions",
        ("caption", "other_caption"),
        noise=Noise.FIXED,
    ),
    "text-diff": Edit(
        "A picture of what one caption says on its way to what another says.",
        "text_diff",
        ("picture", "source", "target"),
        shares={"strength": 0.5},
    ),
    "inpaint": Edit(
        "Pictures for a caption in which the white part of a mask alone is drawn.",
        "inpaint",
        ("picture", "mask", "caption"),
        count=4,
    ),
    "image-to-image": Edit(
        "Pictures for a caption that are begun from a picture; --strength says how little of it is left.",
        "image_to_image",
        ("picture", "caption"),
        count=4,
        shares={"strength": 0.6},
    ),
}


def _sample_parser() -> OptionParser:
    parser = command_parser("sample", "Pictures from captions by the networks of a run.")
    parser.add_argument("run", nargs="?", help="name of a finished run")
    parser.add_argument("captions", nargs="*", metavar="caption")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="keep the best of N pictures, by a CLIP")
    parser.add_argument("--judge", default=Judge.CLIP.value, choices=[each.value for each in Judge])
    parser.add_argument("--from", dest="source", type=Path, metavar="PNG", help="make a picture of unclip's again")
    parser.add_argument(
        "--picture", type=Path, action="append", default=[], help="with --from: what it was made from, in its order"
    )
    _add_options(parser, count=1)
    return parser


def _edit_parser() -> OptionParser:
    parser = OptionParser("unclip edit", description="Pictures from pictures by the networks of a run.")
    chosen = parser.add_subparsers(dest="operation", required=True)
    for name, each in EDITS.items():
        one = chosen.add_parser(name, help=each.description, description=each.description)
        one.add_argument("run", help="name of a finished run")
        for given in each.inputs:
            one.add_argument(given, metavar=given.replace("_", "-"))
        for share, default in each.shares.items():
            one.add_argument(f"--{share}", type=float, default=default, help=f"0 to 1 (default: {default:g})")
        if each.noise is not None:
            one.add_argument("--noise", default=each.noise.value, choices=[kind.value for kind in Noise])
        add_outputs(one)
        _add_options(one, each.count)
    return parser


def _add_options(parser: argparse.ArgumentParser, count: int) -> None:
    parser.add_argument("--count", type=int, default=count, help=f"pictures (default: {count}), of each caption")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance of the decoder; 1 is none")
    parser.add_argument("--prior-guidance", type=float, help="classifier-free guidance of the prior; 1 is none")
    parser.add_argument("--clip-guidance", type=float, metavar="S", help="scale of the CLIP similarity's gradient")
    parser.add_argument("--steps", type=int, help="sampling steps of the decoder")
    parser.add_argument("--solver", help="of the decoder: ddim, ddpm, euler or dpmpp_2m")
    parser.add_argument("--negative", metavar="CAPTION", help="what guidance leads away from")
    parser.add_argument("--preset", choices=[each.value for each in Preset], help="numbers of steps of all networks")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any option, such as prior.candidates=2 upsampler.eta=1",
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="pictures at a time")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], help="instead of the one it was trained on")
    parser.add_argument("--output", type=Path, help="directory for the PNGs (default: one below runs/RUN)")


def _options(given: Given) -> GenerationOptions:
    """What was asked for. Raises `UserError` for what no network could use."""
    require_count(given.count, "--count ")
    require_seed(given.seed, "--seed ")
    require_count(given.batch_size, "--batch-size ")
    if given.steps is not None and given.steps < 1:
        raise UserError(f"--steps {given.steps} is no number of sampling steps; give 1 or more")
    for name in ("guidance", "prior_guidance", "clip_guidance"):
        scale = getattr(given, name)
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise UserError(f"--{name.replace('_', '-')} {scale} is no scale; give a finite number of 0 or more")
    asked: dict[str, Any] = Preset(given.preset).options.model_dump(exclude_none=True) if given.preset else {}
    by_name = {key: getattr(given, name) for name, key in _KEYS.items() if getattr(given, name) is not None}
    for each in given.set:
        key, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--set {each} has no value; write KEY=VALUE, such as decoder.steps=27")
        if key in by_name:
            raise UserError(f"{key} is given twice; give it once")
        by_name[key] = _value(key, value)
    for key, value in by_name.items():
        _put(asked, key, value)
    options = validate(GenerationOptions, asked)
    require_text([options.negative_caption])
    return options


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {key}={text} cannot be read; write a number, a name or a list such as [0,0.8]"
        ) from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; where a preset has a list, the one value is for all of it."""
    first, _, rest = key.partition(".")
    if not rest:
        values[first] = value
        return
    inner = values.setdefault(first, {})
    for each in inner if isinstance(inner, list | tuple) else [inner]:
        if not isinstance(each, dict):
            raise UserError(f"{first}={each!r} has no {rest}; give the one or the other")
        _put(each, rest, value)


def _make_again(given: Given) -> int:
    default, names = _sample_parser().get_default, (*_KEYS, "preset", "set", "count", "seed", "best_of", "judge")
    unused = [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) != default(name)]
    if given.run is not None or unused:
        said = ", ".join([*([given.run] if given.run else []), *unused])
        raise UserError(f"--from {given.source} says all of how its picture was made; leave out {said}")
    require_count(given.batch_size, "--batch-size ")
    recipe = read_recipe(given.source)
    given.run = recipe.run
    read_run(given.outputs, given.run)  # or a directory would be made for a run that is none
    output = _output(given, SAMPLES)
    sources = [as_image(each) for each in given.picture]
    model = load_for(recipe, outputs=given.outputs, accelerator=given.accelerator, batch_size=given.batch_size)
    _write([model.again(recipe, sources)], [f"again-{given.source.stem}.png"], output)
    return 0


def _load(given: Given) -> "Model":
    return load(given.run, outputs=given.outputs, accelerator=given.accelerator, batch_size=given.batch_size)


def _output(given: Given, name: str) -> Path:
    """The directory for the pictures, which can be written to. Raises `UserError` if it is none."""
    output: Path = given.output or run_directory(given.outputs, given.run) / name
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be a directory ({error.strerror}); give another one") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"--output {output} cannot be written to; give another one")
    return output


def _write(pictures: Sequence[Picture], names: Sequence[str], output: Path) -> None:
    from stages.generation.grid import captioned_grid

    for picture, name in zip(pictures, names, strict=True):
        picture.save(output / name)
    grid = captioned_grid(
        {"sample": [each.image for each in pictures]},
        [each.recipe.title for each in pictures],
        [each.recipe.seed for each in pictures],
        columns=GRID_COLUMNS,
    )
    save_grid(grid.image, grid.layout, output / "grid.png")
    count = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    print(f"{count} and grid.png in {output}")


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"
