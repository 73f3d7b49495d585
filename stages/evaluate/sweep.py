"""Curves over how pictures are sampled: which of a run's samplers a name stands for, and what it is set to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.config import validate
from pipeline.errors import UserError
from pipeline.report.metrics import is_bound
from stages.diffusion.settings import DiffusionStageSettings, SamplerSettings, check_steps
from stages.evaluate.settings import MEASURED
from stages.generation.options import GenerationOptions

SWEEPS = {
    "guidance": ("decoder", "guidance_scale"),
    "guidance_rescale": ("decoder", "guidance_rescale"),
    "clip_guidance": ("decoder", "clip_guidance_scale"),
    "steps": ("decoder", "steps"),
    "eta": ("decoder", "eta"),
    "prior_guidance": ("prior", "guidance_scale"),
    "prior_steps": ("prior", "steps"),
    "prior_eta": ("prior", "eta"),
    "upsampler_steps": ("upsampler", "steps"),
    "upsampler_eta": ("upsampler", "eta"),
}
"""What can be swept: whose sampler, and which of its settings."""


@dataclass(frozen=True)
class Sweep:
    """One of `SWEEPS`, and the values that it is to have, one after the other."""

    name: str
    values: tuple[float, ...]

    @property
    def part(self) -> str:
        """The kind of the stage whose network is sampled otherwise."""
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


def swept_options(sweep: Sweep, value: float) -> GenerationOptions:
    """What is asked of the run's samplers at a value. Raises `UserError` where no sampler has it."""
    return validate(GenerationOptions, {sweep.part: {SWEEPS[sweep.name][1]: value}}, f"--sweep {sweep.name}")


def check_sweep(sweep: Sweep, settings: DiffusionStageSettings, own: SamplerSettings) -> None:
    """Raise `UserError` where a network that is swept, with its own sampler, cannot be sampled at a value."""
    for value in sweep.values:
        options = swept_options(sweep, value)
        asked = options.of_upsampler(0) if sweep.part == "upsampler" else getattr(options, sweep.part)
        check_steps(f"--sweep {sweep.name}", settings.schedule, asked.over(own).steps)


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
