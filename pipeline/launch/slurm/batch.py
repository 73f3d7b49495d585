"""Batch jobs, rendered: pure functions from frozen stages and their resources to sbatch's input."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pipeline.launch.identity import LAUNCHED_BY
from pipeline.launch.slurm.commands import ranges
from pipeline.launch.slurm.settings import GpuRequest, SlurmResources
from pipeline.workflow.artifacts import MANIFEST
from pipeline.workflow.code import snapshot
from pipeline.workflow.frozen import FrozenStage, frozen_path
from pipeline.workflow.progress import FAILURE, LOG

TEMPLATE = Path(__file__).resolve().parents[2] / "stage.sbatch"
"""A link to the checkout's file, which a wheel has in its place."""
_PLACE_OF_ENVIRONMENT = "# {environment}"


@dataclass(frozen=True)
class BatchJob:
    """What sbatch is given: `sbatch OPTIONS SCRIPT ARGUMENTS`; dependencies come on top.

    Jobs that are alike differ in name, output, stage and frozen alone.
    """

    name: str
    output: str
    asked: tuple[str, ...]
    script: str
    stage: tuple[str, ...]
    command: tuple[str, ...]
    frozen: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Of sbatch."""
        return (f"--job-name={self.name}", f"--output={self.output}", *self.asked)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the script."""
        return (*self.stage, *self.command, *self.frozen)


def render(frozen: FrozenStage, resources: SlurmResources) -> BatchJob:
    """The job of one stage. Nothing of the stage stands in the script: it comes as arguments, which no shell reads."""
    return BatchJob(
        name=f"{frozen.stage}-{frozen.fingerprint[:12]}",
        output=_escaped(frozen.work / LOG),
        asked=_asked(frozen, resources),
        script=render_script(resources, snapshot(frozen.outputs, frozen.code) if frozen.code is not None else None),
        stage=(str(frozen.store.path(*frozen.key) / MANIFEST), str(frozen.work / FAILURE)),
        command=_command(resources),
        frozen=(str(frozen_path(frozen)),),
    )


def render_several(
    frozen: FrozenStage, resources: SlurmResources, table: Path, side_by_side: int, tasks: Sequence[int] | None
) -> BatchJob:
    """A job of several stages like this one: so many at a time, in each of the tasks of an array if there are any.

    `table` is a file that says which. What they write goes to the log of each.
    """
    if side_by_side > 1:
        each = [f"--{name}={value}" for name, value in _gpus(resources, frozen.tasks.per_node).items()]
        memory = None if resources.mem_gib is None else side_by_side * resources.mem_gib
        update = {"srun_arguments": [*each, *resources.srun_arguments], "mem_gib": memory}
        resources = resources.model_copy(update=update)
    limit = f"%{resources.array_limit}" if resources.array_limit is not None else ""
    array = () if tasks is None else (f"--array={','.join(ranges(tasks))}{limit}",)
    return replace(
        render(frozen, resources),
        output="/dev/null",
        asked=(*_asked(frozen, resources, side_by_side), *array),
        stage=("--several", str(table), str(side_by_side)),
        command=_command(resources),
        frozen=(),
    )


def _command(resources: SlurmResources) -> tuple[str, ...]:
    """What the script does with each stage."""
    return (
        str(resources.max_requeues), resources.policy.model_dump_json(), *resources.srun_arguments,
        *resources.container_command, resources.python or sys.executable, "-m", "pipeline.training.worker",
    )  # fmt: skip


def render_script(resources: SlurmResources, code: Path | None = None) -> str:
    """The template with the profile's modules, script and environment in their place, quoted.

    Python finds the snapshot `code` before anything else, and the directory here last.
    """
    quote = shlex.quote
    lines = []
    if resources.modules:
        lines.append("command -v module >/dev/null || . /etc/profile")
        lines += [_or_fail(f"module load {quote(each)}", f"module {each}") for each in resources.modules]
    if resources.setup_script is not None:
        lines.append(_or_fail(f". {quote(str(resources.setup_script.absolute()))}", str(resources.setup_script)))
    lines += [f"export {name}={quote(value)}" for name, value in sorted(resources.environment.items())]
    if code is not None:
        lines.append(f'export PYTHONSAFEPATH=1 PYTHONPATH={quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}:$PWD"')
    lines.append(f"export {LAUNCHED_BY}=slurm")
    template = _template()
    assert template.count(_PLACE_OF_ENVIRONMENT) == 1, f"{TEMPLATE} has one place for the environment"
    return template.replace(_PLACE_OF_ENVIRONMENT, "\n".join(lines))


@cache
def _template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")


def _or_fail(command: str, what: str) -> str:
    return f"{command} || fail {shlex.quote(f'{what} could not be loaded')}"


def _asked(frozen: FrozenStage, resources: SlurmResources, side_by_side: int = 1) -> tuple[str, ...]:
    tasks = frozen.tasks
    per_node = tasks.per_node * side_by_side
    asked: dict[str, object] = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "reservation": resources.reservation,
        "constraint": resources.constraint,
        "nodes": tasks.nodes,
        "ntasks-per-node": per_node,
        "cpus-per-task": resources.cpus_per_task,
        "mem": None if (mem_mib := resources.policy.mem_mib) is None else f"{mem_mib}M",
        "time": resources.time_limit_min,
        **_gpus(resources, per_node),
        "signal": f"B:USR1@{resources.stop_before_s}",
        "open-mode": "append",
        "kill-on-invalid-dep": "yes",
    }
    options = [f"--{option}={value}" for option, value in asked.items() if value is not None]
    return (*options, "--requeue", *resources.sbatch_arguments)


def _gpus(resources: SlurmResources, number: int) -> dict[str, str]:
    of_type = f"{resources.gpu_type}:" if resources.gpu_type else ""
    if resources.gpu_request is GpuRequest.GRES:
        return {"gres": f"gpu:{of_type}{number}"}
    if resources.gpu_request is GpuRequest.GPUS_PER_NODE:
        return {"gpus-per-node": f"{of_type}{number}"}
    return {}


def _escaped(path: Path) -> str:
    """A file name in which Slurm replaces nothing. With a backslash in it, it takes all but backslashes as they are."""
    name = str(path)
    return name.replace("\\", "\\\\") if "\\" in name else name.replace("%", "%%")
