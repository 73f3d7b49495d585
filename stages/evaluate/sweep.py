"""Curves over how pictures are sampled: which of a run's samplers a name stands for, and what it is set to."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.config import Settings, validate
from pipeline.errors import UserError
from pipeline.report.metrics import is_bound
from stages.evaluate.settings import MEASURED
from stages.generation.text_to_image import TextToImage

SWEEPS = {
    "guidance": ("decoder", "guidance_scale"),
    "clip_guidance": ("decoder", "clip_guidance_scale"),
    "steps": ("decoder", "steps"),
    "eta": ("decoder", "eta"),
    "prior_guidance": ("prior", "guidance_scale"),
    "prior_steps": ("prior", "steps"),
    "prior_eta": ("prior", "eta"),
    "upsampler_steps": ("upsamplers", "steps"),
    "upsampler_eta": ("upsamplers", "eta"),
}
"""What can be swept: the part of the chain, and the setting of its sampler."""


@dataclass(frozen=True)
class Sweep:
    """One of `SWEEPS`, and the values that it is to have, one after the other."""

    name: str
    values: tuple[float, ...]

    @property
    def part(self) -> str:
        """Which part of the chain is sampled otherwise."""
        return SWEEPS[self.name][0]


def parse_sweep(text: str) -> Sweep:
    """`guidance=1,2,4`. Raises `UserError` for what is none."""
    name, _, values = text.partition("=")
    if name not in SWEEPS:
        raise UserError(f"--sweep {text}: {name!r} cannot be swept; there are {', '.join(SWEEPS)}")
    try:
        found = tuple(int(each) if each.strip().isdigit() else float(each) for each in values.split(","))
    except ValueError:
        raise UserError(f"--sweep {text}: give numbers, as in --sweep {name}=1,2,4") from None
    if len(set(found)) < 2:
        raise UserError(f"--sweep {text} is no curve; give two values or more, as in --sweep {name}=1,2,4")
    return Sweep(name, found)


def swept_settings(settings: Any, sweep: Sweep, value: float) -> Any:
    """A stage's settings with its sampler's setting at that value. Raises `UserError` where the sampler refuses it."""
    field, sampler = SWEEPS[sweep.name][1], settings.sampler
    assert isinstance(sampler, Settings), f"a {sweep.part} has a sampler"
    changed = validate(type(sampler), {**sampler.model_dump(), field: value}, f"--sweep {sweep.name}")
    if field == "steps" and value > settings.schedule.timesteps:
        raise UserError(
            f"--sweep {sweep.name}={value} exceeds the schedule's {settings.schedule.timesteps} timesteps; use less"
        )
    return settings.model_copy(update={"sampler": changed})


def swept_chain(chain: TextToImage, sweep: Sweep, value: float) -> TextToImage:
    """The chain with a sampler's setting at that value, and else as the run has it."""

    def changed(sampler: Any) -> Any:
        other = copy.copy(sampler)
        other.settings = swept_settings(sampler.settings, sweep, value)
        return other

    part: Any = getattr(chain, sweep.part)
    return replace(
        chain, **{sweep.part: changed(part) if sweep.part != "upsamplers" else [changed(each) for each in part]}
    )


def plot_sweep(sweep: Sweep, results: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Draw what moves with the swept setting and is known to improve one way, with intervals; else all there is."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for name in results[0] if not is_bound(name, results[0])]
    directed = [name for name in names if any(fnmatchcase(name, pattern) for pattern in MEASURED)]
    names = [name for name in directed if len({each[name] for each in results}) > 1] or names
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axis, name in zip(axes, names, strict=False):
            axis.plot(sweep.values, [each[name] for each in results], marker="o", markersize=3)
            if f"{name}_low" in results[0]:
                ends = [[each[f"{name}{end}"] for each in results] for end in ("_low", "_high")]
                axis.fill_between(sweep.values, *ends, alpha=0.2)
            axis.set_title(name, fontsize=8)
            axis.set_xlabel(sweep.name)
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        figure.suptitle(title)
        figure.savefig(path, dpi=110)
