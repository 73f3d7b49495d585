"""A stage's batch job, rendered: pure functions from a frozen stage and its resources to sbatch's input."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.launch.identity import LAUNCHED_BY
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
    """What sbatch is given: `sbatch OPTIONS SCRIPT ARGUMENTS`; dependencies come on top."""

    name: str
    options: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]


def render(frozen: FrozenStage, resources: SlurmResources) -> BatchJob:
    """The job of one stage. Nothing of the stage stands in the script: it comes as arguments, which no shell reads."""
    name = f"{frozen.stage}-{frozen.fingerprint[:12]}"
    arguments = (
        str(frozen.store.path(frozen.stage, frozen.fingerprint) / MANIFEST),
        str(frozen.work / FAILURE),
        str(resources.max_requeues),
        resources.policy.model_dump_json(),
        *resources.srun_arguments,
        *resources.container_command,
        resources.python or sys.executable,
        "-m",
        "pipeline.training.worker",
        str(frozen_path(frozen)),
    )
    code = snapshot(frozen.outputs, frozen.code) if frozen.code is not None else None
    return BatchJob(name, _options(frozen, resources, name), render_script(resources, code), arguments)


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
    template = TEMPLATE.read_text(encoding="utf-8")
    assert template.count(_PLACE_OF_ENVIRONMENT) == 1, f"{TEMPLATE} has one place for the environment"
    return template.replace(_PLACE_OF_ENVIRONMENT, "\n".join(lines))


def _or_fail(command: str, what: str) -> str:
    return f"{command} || fail {shlex.quote(f'{what} could not be loaded')}"


def _options(frozen: FrozenStage, resources: SlurmResources, name: str) -> tuple[str, ...]:
    tasks = frozen.tasks
    asked: dict[str, object] = {
        "job-name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "reservation": resources.reservation,
        "constraint": resources.constraint,
        "nodes": tasks.nodes,
        "ntasks-per-node": tasks.per_node,
        "cpus-per-task": resources.cpus_per_task,
        "mem": None if (mem_mib := resources.policy.mem_mib) is None else f"{mem_mib}M",
        "time": resources.time_limit_min,
        **_gpus(resources, tasks.per_node),
        "signal": f"B:USR1@{resources.stop_before_s}",
        "open-mode": "append",
        "output": _escaped(frozen.work / LOG),
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
