"""Stages on this machine, side by side as far as its devices allow."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from pipeline.config import NotNegative, Positive, validate
from pipeline.errors import UserError
from pipeline.launch.launcher import Launcher, LaunchSettings, StageOutcome
from pipeline.launch.local.devices import Devices, cores_here, gpus_here, most_at_once
from pipeline.launch.local.schedule import Schedule
from pipeline.terminal.display import Display
from pipeline.workflow.causes import Cause
from pipeline.workflow.in_use import commands_at_work
from pipeline.workflow.plan import Plan
from pipeline.workflow.runs import RunRecord


class LocalLaunch(LaunchSettings):
    """`max_parallel` is how many stages run at a time.

    Null stands for one per GPU. Without GPUs it stands for as many as the runs have side by side, one per core at most.
    `retries` is how often a stage starts again after a failure, by its cause. Stages named in `first` start before
    others that could. `places` is how many places a stage takes, if it is more than one, where there are no GPUs and
    one run alone: each has its share of the cores.
    """

    max_parallel: Positive | None
    retries: dict[Cause, NotNegative] = Field(default_factory=dict)  # newer than records that lack it
    first: tuple[str, ...] = ()
    places: dict[str, Positive] = Field(default_factory=dict)


class LocalLauncher(Launcher):
    """Runs stages in processes of this machine, and waits for them."""

    settings = LocalLaunch
    waits = True

    def check(self, plans: Sequence[Plan]) -> None:
        """Refuse what needs several machines."""
        for plan in plans:
            for stage in plan.stages:
                if stage.frozen is not None and stage.frozen.trainer.num_nodes > 1:
                    raise UserError(
                        f"stage.{stage.name} has trainer.num_nodes={stage.frozen.trainer.num_nodes}, and `unclip run` "
                        "works on one machine; submit it to Slurm: unclip submit"
                    )

    def cancel(self, outputs: Path, records: Sequence[RunRecord]) -> list[str]:
        """Have the commands of this machine that work on these runs alone checkpoint and stop."""
        names = {each.name for each in records}
        lines = []
        for command in commands_at_work(outputs):
            others = [name for name in command.needs.runs if name not in names]
            if len(others) == len(command.needs.runs):
                continue
            runs = ", ".join(name for name in command.needs.runs if name in names)
            if command.process is None:
                lines.append(f"{runs}: {command.who}, which is stopped there: Ctrl-C, or its job's end")
            elif others:
                lines.append(f"{runs}: {command.who}, and on {', '.join(others)}, so that it is left")
            else:
                lines.append(f"{runs}: {_asked_to_stop(command.process)}")
        return lines

    def submit(self, plans: Sequence[Plan], display: Display) -> list[StageOutcome]:
        """Run all that is not finished, and wait for it."""
        gpus, cores = gpus_here(os.environ), cores_here()
        launch = validate(LocalLaunch, plans[0].config.launch, "launch")
        places = launch.max_parallel or len(gpus) or min(cores, most_at_once(plans))
        widths = launch.places if len(plans) == 1 else {}  # the members of a sweep keep all cores busy
        devices = Devices(places, gpus, cores, widths)
        return Schedule(plans, devices, display, launch.retries, launch.first).run()


def _asked_to_stop(process: int) -> str:
    try:
        os.kill(process, signal.SIGTERM)
    except OSError as error:
        return f"process {process} cannot be stopped ({error.strerror}); ask whose it is"
    return f"process {process} was asked to write a checkpoint and stop"


LAUNCHER = LocalLauncher()
