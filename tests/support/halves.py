"""A small world of stages that tell when they run: a source, halves that may wait for each other, and an end."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

from pipeline.config import RUNTIME, OnDamage, PathSettings, Settings, StoreSettings
from pipeline.errors import UserError
from pipeline.training.context import StageContext, StageResult
from pipeline.workflow.declaration import Arity, Catalog, Input, StageDeclaration
from pipeline.workflow.plan import Plan, plan_run
from tests.support.fakes import run_config

STARTS = "starts"
SECONDS_TO_MEET = 120.0


class HalfSettings(Settings):
    """`meets` are the stages that have to run at the same time; one that `fails` does so once they do.

    What it makes is its name, or what it `says`, as a GPU may make something else of the same settings.
    """

    name: str
    meets: Annotated[tuple[str, ...], RUNTIME] = ()
    fails: Annotated[bool, RUNTIME] = False
    says: Annotated[str | None, RUNTIME] = None


def run_half(context: StageContext) -> StageResult:
    settings = context.settings_as(HalfSettings)
    starts = context.frozen.outputs / STARTS
    starts.mkdir(exist_ok=True)
    with (starts / settings.name).open("a") as file:
        file.write(f"{os.environ.get('OMP_NUM_THREADS')}\n")
    until = time.monotonic() + SECONDS_TO_MEET
    while not all((starts / name).exists() for name in settings.meets):
        context.step(1, 2)
        assert time.monotonic() < until, f"{settings.name} never met {settings.meets}"
        time.sleep(0.02)
    if settings.fails:
        raise UserError(f"{settings.name} was to fail")
    (context.output / "said.txt").write_text(settings.says or settings.name)
    return StageResult()


def _declaration(output: str, *inputs: Input, repeatable: bool = False) -> StageDeclaration:
    return StageDeclaration(
        version=1, settings=HalfSettings, run="tests.support.halves:run_half", output=output, inputs=inputs,
        repeatable=repeatable,
    )  # fmt: skip


CATALOG = Catalog(
    {
        "source": _declaration("data"),
        "half": _declaration("half", Input("data"), repeatable=True),
        "end": _declaration("end", Input("half", Arity.ANY)),
    }
)


def plan_halves(
    outputs: Path,
    run: str,
    halves: dict[str, dict[str, Any]],
    max_parallel: int | None = 2,
    on_damage: OnDamage = OnDamage.STOP,
    also_read: tuple[Path, ...] = (),
) -> Plan:
    """source -> one half of each given name -> end. The halves' names tell runs apart; the source is shared."""
    stages: dict[str, dict[str, Any]] = {"source": {"kind": "source", "name": "source"}}
    stages |= {name: {"kind": "half", "name": name, **own} for name, own in halves.items()}
    stages["end"] = {"kind": "end", "name": f"end-{run}"}
    config = run_config(
        outputs, stages, catalog="tests.support.halves:CATALOG",
        launch={"kind": "local", "max_parallel": max_parallel}, store=StoreSettings(on_damage=on_damage),
        paths=PathSettings(outputs=outputs, also_read=also_read),
    )  # fmt: skip
    return plan_run(config.model_copy(update={"run": config.run.model_copy(update={"name": run})}))


def starts(outputs: Path) -> dict[str, list[str]]:
    """How often each stage was started: the number of threads that each of its starts was given."""
    return {path.name: path.read_text().splitlines() for path in (outputs / STARTS).iterdir()}
