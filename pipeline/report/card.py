"""A run's model card: one Markdown file, and the pictures beside it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from PIL import Image

from pipeline.picture_grid import read_layout
from pipeline.report.evaluations import EvaluationRecord, read_evaluations
from pipeline.report.metrics import format_interval, is_bound
from pipeline.report.pictures import latest_grid
from pipeline.report.records import Comparison, RunReport, StageReport, State
from pipeline.report.table import format_hours, totals
from pipeline.terminal.words import format_duration
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.declaration import Catalog, StageDeclaration, resolve
from pipeline.workflow.runs import PICTURES, gather_pictures, run_directory
from pipeline.workflow.sealed import opened

CARD = "README.md"
_ANY_CAPTION = "a caption of your own"
_WEIGHTS = (
    "weights: no licence is stated for what this project trains; who publishes them chooses one that the licences "
    "above allow"
)
_SPECIAL = re.compile(r"([\\`*_\[\]|~<>&])")
_HARDWARE_UNITS = {"memory_gib": "GiB of memory", "cpus": "CPUs", "nodes": "nodes"}


def write_card(comparison: Comparison, path: Path | None) -> Path:
    """Write the card of the one run that was read; at its pictures' side by default. Returns where."""
    run = comparison.runs[0]
    home = run_directory(comparison.outputs, run.name)
    target = (path or home / CARD).absolute()
    beside = None if target.parent == home else target.parent / f"{target.stem}_{PICTURES}"
    pictures = gather_pictures(comparison.outputs, run.record, beside)
    links = [Path(os.path.relpath(each, target.parent)).as_posix() for each in pictures]
    evaluations = [
        (each, _link(each.plot, target, beside) if each.plot else None)
        for each in read_evaluations(comparison.outputs, run.name)
    ]
    target.write_text(card(comparison, links, evaluations), encoding="utf-8")
    return target


def card(
    comparison: Comparison, pictures: Sequence[str], evaluations: Sequence[tuple[EvaluationRecord, str | None]] = ()
) -> str:
    """The card as Markdown; `pictures` are links to them, and an evaluation has one to its plot, if any.

    What comes from configs and records is escaped.
    """
    run = comparison.runs[0]
    sections = [
        _front_matter(run),
        f"# {_escaped(run.name)}\n\n{_summary(comparison, run)}",
        f"## Use\n\n{_usage(run)}",
        f"## Data and licence\n\n{_data(run)}",
        f"## Metrics\n\n{_metrics(run)}",
        *_evaluations(evaluations),
        f"## Pictures\n\n{_pictures(pictures)}",
        f"## Training\n\n{_training(comparison, run)}",
        f"## Config\n\n{_config(run)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(run: RunReport) -> str:
    """What model hubs read; JSON is YAML."""
    values = {"license": _licence_id(run), "tags": ["unclip"], "model_name": run.name}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _summary(comparison: Comparison, run: RunReport) -> str:
    finished = sum(stage.state is State.FINISHED for stage in run.stages)
    cost = totals(run.stages, comparison)
    state = (
        "finished" if finished == len(run.stages) else f"{run.state.value}, {finished} of {len(run.stages)} stages done"
    )
    versions = sorted({stage.artifact.manifest.code_version for stage in run.stages if stage.artifact})
    made = f" by unclip {_escaped(', '.join(versions))}" if versions else ""
    hours = (
        f"{format_duration(cost.duration_s)} of training and evaluation, {format_hours(cost.device_hours)} device-hours"
    )
    name = run.name.replace("`", "")
    return f"Run `{name}`, started {_escaped(run.record.started_at)}: {state}, made{made} in {hours}."


def _licence_id(run: RunReport) -> str:
    """What the run's data declares, by its name among hubs; `other` where something else is mixed in."""
    numbers = [stage.artifact.manifest.numbers for stage in run.stages if stage.artifact is not None]
    declared = {str(each.get("licence_id", "unknown")) for each in numbers if "licence" in each}
    if _origins(run) or len(declared) > 1:
        return "other"
    return next(iter(declared), "unknown")


def _origins(run: RunReport) -> list[str]:
    """What the stages say of others' work that they were made from."""
    found = [declared.origin(artifact) for declared, artifact in _finished(run) if declared.origin is not None]
    return [each for each in found if each]


def _finished(run: RunReport) -> Iterator[tuple[StageDeclaration, Artifact]]:
    """The artifacts of the run whose kind is known here."""
    catalog = cast(Catalog, resolve(run.catalog))
    for stage in run.stages:
        if stage.artifact is not None and stage.kind in catalog.stages:
            yield catalog.stages[stage.kind], stage.artifact


def _caption(run: RunReport) -> str:
    """The first caption that the run itself was sampled under."""
    for stage in run.stages:
        path = latest_grid(stage) if stage.is_finished else None
        if path is not None:
            with suppress(Exception), opened(path) as file, Image.open(file) as image:  # Pillow raises all sorts
                layout = read_layout(image)
                if layout is not None and layout.captions:
                    return " ".join(layout.captions[0].split())
    return _ANY_CAPTION


def _usage(run: RunReport) -> str:
    """What the stages say of their outputs' use."""
    caption = _caption(run)
    said = [declared.usage(run.name, artifact, caption) for declared, artifact in _finished(run) if declared.usage]
    return "\n\n".join(said) or "Nothing of this run can be used yet: no stage with an output for others has finished."


def _data(run: RunReport) -> str:
    lines = []
    for stage in run.stages:
        numbers: dict[str, Any] = stage.artifact.manifest.numbers if stage.artifact else {}
        if "licence" in numbers:
            lines.append(f"- {_escaped(stage.name)}: {_escaped(str(numbers['licence']))}")
        samples = numbers.get("samples")
        if isinstance(samples, dict):
            counts = ", ".join(f"{count:,} {_escaped(split)}" for split, count in samples.items())
            lines.append(f"- samples: {counts}")
    lines = lines or ["- No stage of this run has said yet what data it was trained on."]
    return "\n".join([*lines, *(f"- {each}" for each in _origins(run)), f"- {_WEIGHTS}"])


def _metrics(run: RunReport) -> str:
    rows = []
    for stage in run.stages:
        for name in stage.metrics:
            if is_bound(name, stage.metrics):
                continue
            so_far = "" if stage.is_finished else f", {stage.state.value}"
            rows.append([f"{stage.name}{so_far}", name, format_interval(stage.metrics, name)])
    return _table(["stage", "metric", "value"], rows) if rows else "None yet."


def _link(picture: Path, target: Path, beside: Path | None) -> str:
    """The path from the card to a picture, which is copied to the directory `beside` the card where there is one."""
    if beside is not None:
        picture = Path(shutil.copy(picture, beside))
    return Path(os.path.relpath(picture, target.parent)).as_posix()


def _evaluations(evaluations: Sequence[tuple[EvaluationRecord, str | None]]) -> Iterator[str]:
    """The section on what `unclip evaluate` found, if it was asked."""
    parts = []
    for each, plot in evaluations:
        names = dict.fromkeys(name for found in each.points.values() for name in found if not is_bound(name, found))
        rows = [[name, *(format_interval(found, name) for found in each.points.values())] for name in names]
        head = f"Made {each.made_at} of {_escaped(each.conditions)} at most."
        table = _table(["metric", *(value or "value" for value in each.points)], rows)
        parts += [head, table, *([f"![Metrics over what was swept](<{plot}>)"] if plot else [])]
    if parts:
        yield "\n\n".join(["## Evaluations", *parts])


def _pictures(links: Sequence[str]) -> str:
    found = [f"![Samples: {_escaped(Path(link).stem)}](<{link}>)" for link in links]
    return "\n\n".join(found) or "None yet."


def _training(comparison: Comparison, run: RunReport) -> str:
    rows = [
        [
            stage.name,
            stage.state.value,
            "" if stage.duration_s is None else format_duration(stage.duration_s),
            format_hours(stage.device_hours),
            f"{stage.samples_seen:,}" if stage.samples_seen else "",
            _hardware(stage),
            stage.fingerprint[:12],
        ]
        for stage in run.stages
    ]
    cost = totals(run.stages, comparison)
    rows.append(["all", "", format_duration(cost.duration_s), format_hours(cost.device_hours), "", "", ""])
    return _table(["stage", "state", "time", "device-hours", "samples seen", "hardware", "fingerprint"], rows)


def _hardware(stage: StageReport) -> str:
    found = dict(stage.hardware)
    if not found:
        return f"{stage.devices} device{'' if stage.devices == 1 else 's'}, of which no more was recorded"
    device = f"{found.pop('devices', stage.devices)} x {found.pop('device', 'device')}"
    rest = [
        f"{value} {_HARDWARE_UNITS[key]}" if key in _HARDWARE_UNITS else f"{key} {value}"
        for key, value in found.items()
    ]
    return ", ".join([device, *rest])


def _config(run: RunReport) -> str:
    overrides = shlex.join(run.record.overrides)
    return "\n\n".join([
        "Overrides:", _fenced(overrides or "none", "text"),
        "Resolved:", _fenced(json.dumps(run.record.config, indent=2, ensure_ascii=False), "json"),
    ])  # fmt: skip


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any that the text holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\&", "&amp;")
