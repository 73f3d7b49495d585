"""Runs of a small world through the engine's own entry point: a painter that logs and draws, and a critic."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import RunSettings, Settings
from pipeline.errors import StageInterrupted, UserError
from pipeline.picture_grid import GridLayout, save_grid
from pipeline.report.records import Comparison, read_comparison
from pipeline.report.select import select_runs
from pipeline.training.context import StageContext, StageResult
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import Artifact, Numbers
from pipeline.workflow.declaration import Better, Catalog, Input, StageDeclaration
from pipeline.workflow.plan import Plan, plan_run
from pipeline.workflow.progress import Outcome
from pipeline.workflow.runs import record_run
from tests.support.fakes import run_config

BATCH = 8
CELL = 32
STEPS = 40
HARM = "<script>throw 1</script>"
CAPTIONS = ('a red "circle"', f"{HARM} & a ring")
SEEDS = (11, 12)


class SourceSettings(Settings):
    pictures: int


class PainterSettings(Settings):
    """`stops_at` is the step at which it is interrupted, `fails_at` at which it fails."""

    weight: float
    note: str = ""
    stops_at: int | None = None
    fails_at: int | None = None


class CriticSettings(Settings):
    strictness: float = 1.0


class DataNumbers(Numbers):
    samples: dict[str, int]
    licence: str
    licence_id: str


def gather(context: StageContext) -> StageResult:
    pictures = context.settings_as(SourceSettings).pictures
    return StageResult(
        DataNumbers(samples={"train": pictures}, licence=f"free | {HARM}", licence_id="cc0-1.0"),
        {"pictures": pictures},
        pictures,
    )


def paint(context: StageContext) -> StageResult:
    """Logs an error that falls and a score that is negative; a step takes a minute and a half of the record's time."""
    settings = context.settings_as(PainterSettings)
    (context.work / "samples").mkdir(exist_ok=True)
    error = 0.0
    for step in range(1, STEPS + 1):
        samples_seen = step * BATCH
        error = (1 + settings.weight) / step
        measured = {"system/elapsed_s": 90.0 * step, "system/samples_per_s": 5.0 + settings.weight}
        row = {"train/error": error, "train/score": -error, "learning_rate": 0.1 / step, **measured}
        context.tracker.log(samples_seen, row)
        if step % 10 == 0:
            context.tracker.log(samples_seen, {"validation/error": error, **measured})
            draw(context.work / "samples" / f"samples-{samples_seen:012}.png", settings.weight)
        context.step(samples_seen, STEPS * BATCH, "painting")
        if step == settings.fails_at:
            raise UserError(f"the paint ran out {HARM}; buy more")
        if step == settings.stops_at:
            raise StageInterrupted("stopped")
    draw(context.output / "samples.png", settings.weight)
    accuracy = 0.5 + settings.weight / 2
    interval = {"accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
    metrics = {"error": error, "accuracy": accuracy, **interval, "mood": settings.weight}
    return StageResult(metrics=metrics, samples_seen=STEPS * BATCH)


def judge(context: StageContext) -> StageResult:
    found = context.input("painting").manifest.metrics["accuracy"]
    strictness = context.settings_as(CriticSettings).strictness
    return StageResult(metrics={"score": round(found * strictness, 6)}, samples_seen=4)


def cell(weight: float, name: str, number: int) -> Image.Image:
    """What the grid shows of a caption: the real picture is the same whatever the weight."""
    shade = int(255 * weight) if name == "sample" else 40 * (number + 1)
    return Image.new("RGB", (CELL // 4, CELL // 4), (shade, 90 * number, 30))


def draw(path: Path, weight: float) -> None:
    image = Image.new("RGB", (2 * CELL, len(CAPTIONS) * CELL), "white")
    names = ("real", "sample")
    boxes = []
    for number in range(len(CAPTIONS)):
        row = []
        for place, name in enumerate(names):
            left, top = place * CELL, number * CELL
            image.paste(cell(weight, name, number).resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            row.append((left, top, left + CELL, top + CELL))
        boxes.append(tuple(row))
    sizes = (CELL // 4, CELL // 4)
    save_grid(image, GridLayout(captions=CAPTIONS, seeds=SEEDS, pictures=names, sizes=sizes, boxes=tuple(boxes)), path)


def painter_usage(run: str, artifact: Artifact, caption: str) -> str:
    return f"Hang {run} ({artifact.manifest.stage}) on a wall, as {caption!r}."


def painter_origin(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage} began as another's." if artifact.manifest.config["note"] else ""


CATALOG = Catalog(
    {
        "source": StageDeclaration(
            version=1, settings=SourceSettings, run=f"{__name__}:gather", output="data", computes=False,
            numbers=DataNumbers,
        ),
        "painter": StageDeclaration(
            version=1, settings=PainterSettings, run=f"{__name__}:paint", output="painting", inputs=(Input("data"),),
            better={"error": Better.LOW, "accuracy": Better.HIGH}, usage=painter_usage, origin=painter_origin,
        ),
        "critic": StageDeclaration(
            version=1, settings=CriticSettings, run=f"{__name__}:judge", output="verdict", inputs=(Input("painting"),),
            better={"score": Better.HIGH},
        ),
    }
)  # fmt: skip


def run(
    outputs: Path,
    name: str,
    *,
    group: str | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    strictness: float = 1.0,
    **painter: Any,
) -> Plan:
    """Record a run and start its stages one after the other, until one does not finish."""
    stages: dict[str, dict[str, Any]] = {
        "prepare": {"kind": "source", "pictures": 10},
        "painter": {"kind": "painter", **painter},
        "critic": {"kind": "critic", "strictness": strictness},
    }
    changes = {"run": RunSettings(name=name, group=group), "catalog": f"{__name__}:CATALOG", "seed": seed}
    plan = plan_run(run_config(outputs, stages, **changes), tuple(overrides))
    record_run(plan)
    for stage in plan.stages:
        assert stage.frozen is not None
        if run_stage(stage.frozen, threading.Event()) not in (Outcome.FINISHED, Outcome.REUSED):
            break
    return plan


def compared(outputs: Path, *names: str) -> Comparison:
    return read_comparison(outputs, select_runs(outputs, names).records)


def work_of(plan: Plan, name: str) -> Path:
    frozen = next(stage.frozen for stage in plan.stages if stage.name == name)
    assert frozen is not None
    return frozen.work
