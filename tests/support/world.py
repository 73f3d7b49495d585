"""A small workflow of real stages for Slurm: data -> learner -> reader, and beside it a gate and a sufferer.

The gate fails until it is opened. The sufferer takes memory, or fails in the way that is asked for.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import load_file
from torch import Tensor

from pipeline.compose import CONFIG_DIRECTORY
from pipeline.config import (
    RUNTIME,
    NotifySettings,
    OnDamage,
    PathSettings,
    RunConfig,
    RunSettings,
    Settings,
    StoreSettings,
    TrackedArtifacts,
    TrackingMode,
    TrackingSettings,
)
from pipeline.errors import UserError
from pipeline.launch.slurm import commands
from pipeline.launch.slurm.submit import SubmittedStage, plan_jobs, submit_jobs
from pipeline.launch.slurm.submit import slurm_launch as slurm_launch_of
from pipeline.training.context import StageContext, StageResult
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.declaration import Arity, Catalog, Input, StageDeclaration
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.plan import Plan, plan_run
from pipeline.workflow.runs import record_run
from tests.support import tiny

STEPS = 24


class GateSettings(Settings):
    """`open` is a file without which the stage fails."""

    open: Annotated[str, RUNTIME]


class ReaderSettings(Settings):
    """`note` only tells readers apart."""

    note: str


class SuffererSettings(Settings):
    """`suffers` is a number of MiB of memory that it takes, or a way to fail."""

    suffers: int | str


def suffer(context: StageContext) -> StageResult:
    wish = context.settings_as(SuffererSettings).suffers
    if isinstance(wish, int):
        taken = bytearray(b"1" * (wish << 20))
        return StageResult(samples_seen=len(taken))
    starts = context.work / "starts"
    with starts.open("a") as file:
        file.write("x")
    if wish == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(starts.read_text()) < 3:
        raise {"connection": RuntimeError("Connection closed by peer"), "permission": PermissionError(13, "no")}[wish]
    return StageResult()


def pass_gate(context: StageContext) -> StageResult:
    if not Path(context.settings_as(GateSettings).open).exists():
        raise UserError("the gate is closed; open it")
    return StageResult()


def read(context: StageContext) -> StageResult:
    weights = load_file(context.input("learner").path / "weights.safetensors")
    (context.output / "sizes.json").write_text(json.dumps({name: value.numel() for name, value in weights.items()}))
    return StageResult()


CATALOG = Catalog(
    {
        **tiny.CATALOG.stages,
        "gate": StageDeclaration(
            version=1,
            settings=GateSettings,
            run=f"{__name__}:pass_gate",
            output="gate",
            inputs=(Input("data"),),
        ),
        "sufferer": StageDeclaration(
            version=1, settings=SuffererSettings, run=f"{__name__}:suffer", output="sufferer", inputs=(Input("data"),)
        ),
        "reader": StageDeclaration(
            version=1,
            settings=ReaderSettings,
            run=f"{__name__}:read",
            output="reader",
            inputs=(Input("learner"), Input("gate", Arity.OPTIONAL)),
        ),
    }
)


def slurm_launch(**changes: Any) -> dict[str, Any]:
    """The default profile at tiny sizes."""
    import yaml

    values = yaml.safe_load((CONFIG_DIRECTORY / "launch" / "slurm.yaml").read_text())
    return {**values, "mem_gib": 2.0, "cpus_per_task": 1, "time_limit_min": 20, **changes}


def plan(
    outputs: Path,
    name: str = "trial",
    *,
    group: str | None = None,
    seed: int = 3,
    step_s: float = 0.02,
    steps: int = STEPS,
    note: str | None = None,
    gate: Path | None = None,
    suffers: int | str | None = None,
    launch: dict[str, Any] | None = None,
    notify: NotifySettings | None = None,
    is_local: bool = False,
    **trainer: Any,
) -> Plan:
    """A run of the small workflow; `note` adds a reader, `gate` a gate before it."""
    learner = {
        "kind": "learner", "global_batch_size": 8, "max_samples": 8 * steps, "dropout": 0.0, "step_s": step_s,
        "optimizer": tiny.OPTIMIZER.model_dump(mode="json"),
    }  # fmt: skip
    stages: dict[str, dict[str, Any]] = {"data": {"kind": "data", "samples": 48}, "learner": learner}
    if gate is not None:
        stages["gate"] = {"kind": "gate", "open": str(gate)}
    if suffers is not None:
        stages["sufferer"] = {"kind": "sufferer", "suffers": suffers}
    if note is not None:
        stages["reader"] = {"kind": "reader", "note": note}
    config = RunConfig(
        run=RunSettings(name=name, group=group),
        seed=seed,
        paths=PathSettings(outputs=outputs),
        store=StoreSettings(on_damage=OnDamage.STOP),
        catalog=f"{__name__}:CATALOG",
        data={},
        notify=notify,
        stage=stages,
        trainer=tiny.TRAINER.model_copy(update={"checkpoint_every_samples": 8, "lease_s": 20.0, **trainer}),
        launch={"kind": "local", "max_parallel": None, **(launch or {})}
        if is_local
        else slurm_launch(**(launch or {})),
        tracking=TrackingSettings(
            mode=TrackingMode.NONE, project="test", entity=None, artifacts=TrackedArtifacts.REFERENCE, tensorboard=False
        ),
    )
    return plan_run(config)


def submit(*plans: Plan) -> dict[str, SubmittedStage]:
    """Submit as `unclip submit` does; the stages by name, of several plans by `name@seed`."""
    for each in plans:
        record_run(each)
    jobs = plan_jobs(plans)
    limit = slurm_launch_of(plans[0].config).max_parallel
    done = submit_jobs(jobs, plans[0].store.outputs, limit, print)
    return {each.job.stage.stage if len(plans) == 1 else f"{each.job.key}": each for each in done}


def submitted_learner(outputs: Path, **changes: Any) -> tuple[FrozenStage, str]:
    """A learner in the queue, whose data is there already, and its job's id."""
    made = plan(outputs, **changes)
    run_stages_here(made, "data")
    learner = made.stages[1].frozen
    assert learner is not None
    job = submit(plan(outputs, **changes))["learner"]
    assert job.job_id is not None
    return learner, job.job_id


def run_stages_here(made: Plan, *names: str) -> None:
    """Run stages of a plan in this process."""
    from threading import Event

    from pipeline.training.stage import run_stage
    from pipeline.workflow.progress import Outcome

    for stage in made.stages:
        if stage.name in names:
            assert stage.frozen is not None
            assert run_stage(stage.frozen, Event()) in (Outcome.FINISHED, Outcome.REUSED)


def undisturbed(outputs: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights of a learner that was trained in this process in one go."""
    # How long a step takes is no part of what is learned, though it is of the fingerprint.
    run_stages_here(plan(outputs, **{**changes, "step_s": 0.0}), "data", "learner")
    return weights_under(outputs)


def weights_under(outputs: Path) -> dict[str, Tensor]:
    (weights,) = ArtifactStore(outputs).outputs.glob("artifacts/learner/*/weights.safetensors")
    return load_file(weights)


def log_of(frozen: FrozenStage) -> str:
    log = frozen.work / "log.txt"
    return log.read_text() if log.exists() else "no log"


def is_finished(frozen: FrozenStage) -> bool:
    return frozen.store.find(frozen.stage, frozen.fingerprint) is not None


def state_of(job_id: str) -> str:
    """In Slurm's words; "" of a job that it does not know."""
    job = commands.queued([job_id]).get(job_id)
    return "" if job is None else job.state


def reason_of(job_id: str) -> str:
    return commands.queued([job_id])[job_id].reason


def slurm(program: str, *arguments: str) -> str:
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def restarts_of(job_id: str) -> int:
    shown = slurm("scontrol", "show", "job", job_id, "--oneliner")
    return int(shown.partition("Restarts=")[2].split()[0])


def wait(what: str, is_so: Callable[[], bool], timeout_s: float = 300.0, *, releases: bool = True) -> None:
    deadline = time.monotonic() + timeout_s
    look_at_the_held = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline, f"in vain waited for: {what}\n{slurm('squeue', '--states=all')}"
        time.sleep(0.3)
        if releases and time.monotonic() > look_at_the_held:
            release_what_could_not_be_launched()
            look_at_the_held = time.monotonic() + 5


def release_what_could_not_be_launched() -> None:
    """As an administrator would: Slurm holds a job whose launch failed, for instance on a busy machine."""
    for line in slurm("squeue", "-h", "-t", "PD", "-o", "%A|%r").splitlines():
        job_id, _, reason = line.partition("|")
        if reason.replace("_", " ") == "launch failed requeued held":
            # It may be gone by now.
            subprocess.run(["scontrol", "release", job_id], check=False, capture_output=True)


def wait_for_end(frozen: FrozenStage, job_id: str, timeout_s: float = 300.0) -> None:
    """Until the job is over; its artifact must be there then."""

    states: list[str] = []

    def is_over() -> bool:
        states.append(state_of(job_id))
        return states[-1] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")

    wait("the job's end", is_over, timeout_s)
    assert states[-1] == "COMPLETED", f"{states}\n{log_of(frozen)}"
    assert is_finished(frozen), log_of(frozen)


def is_training(frozen: FrozenStage, checkpoints: int = 2) -> bool:
    return len(list((frozen.work / "checkpoints").glob("*.json"))) >= checkpoints


def write(frozen: FrozenStage) -> Path:
    return write_frozen(frozen).path
