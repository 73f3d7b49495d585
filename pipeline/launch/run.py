"""The one way to start runs, for `unclip run`, `unclip submit`, and Hydra's own sweepers."""

from collections import Counter
from collections.abc import Sequence

from pipeline.config import OnDamage, RunConfig
from pipeline.errors import UserError
from pipeline.launch.launcher import StageOutcome, launcher_of
from pipeline.terminal.display import Display
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.code import read_record
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.in_use import recorded
from pipeline.workflow.notify import Event, require_address, tell
from pipeline.workflow.ownership import Vacancy
from pipeline.workflow.plan import Action, Plan, plan_run, require_unblocked, several
from pipeline.workflow.progress import Outcome
from pipeline.workflow.runs import make_runs, read_run, run_artifacts


def start(plans: Sequence[Plan], display: Display, *, waits: bool, accepts_code: bool = False) -> list[StageOutcome]:
    """Start what is not finished of these runs, which have one launcher; the outcomes of what was waited for.

    `waits` says whether it is to return only when all is over, `accepts_code` whether checkpoints of other code are
    gone on from. Raises `UserError` before anything is written or started, where a run cannot work.
    """
    if not plans:
        return []
    config = plans[0].config
    name = config.run.group or config.run.name
    try:
        plans = _on_whole_inputs(plans, None if waits else display)
        require_unblocked(plans)
    except UserError as failure:
        tell(config.notify, Event.FAILURE, name, f"{name} did not start: {failure}")
        raise
    launcher = launcher_of(plans[0].config)
    if launcher.waits is not waits:
        kind = plans[0].config.launch["kind"]
        raise UserError(
            f"launch.kind={kind!r} is for `unclip submit`; leave launch out to run here"
            if waits
            else f"launch.kind={kind!r} has no jobs; add launch=slurm, or a profile of your own"
        )
    for plan in plans:
        _check_objective(plan.config)
        require_address(plan.config.notify)
        if not accepts_code:
            _require_same_code(plan)
    launcher.check(plans)
    for plan in plans:
        make_runs(plan.store.outputs)
        for stage in plan.stages:
            if stage.action is Action.REUSE and stage.fingerprint is not None:
                plan.store.link(stage.name, stage.fingerprint)
    with recorded(plans) as in_use:
        require_unblocked(in_use)
        outcomes = launcher.submit([plan.with_code() for plan in in_use], display)
        if waits:
            ended = Counter(each.outcome.value for each in outcomes)
            text = f"{name} has ended: {', '.join(f'{number} {outcome}' for outcome, number in ended.items())}"
            tell(config.notify, Event.END, name, text)
            for plan in in_use:
                display.result(plan.store.outputs, read_run(plan.store.outputs, plan.config.run.name))
    return outcomes


def _on_whole_inputs(plans: Sequence[Plan], display: Display | None) -> Sequence[Plan]:
    """These plans, or others where finished stages that they build on are damaged: those are set aside, and run anew.

    The display is told of that, if there is one: a stage that starts here says it itself. Raises
    `DamagedArtifactError` where they are not to be.
    """
    found: set[tuple[ArtifactStore, StageKey]] = set()
    while True:
        stages = [stage for plan in plans for stage in plan.stages]
        to_run = [each.frozen for each in stages if each.frozen is not None and each.action is not Action.REUSE]
        checks = {
            (plan.store, stage.frozen.key): plan.store.verify_elsewhere
            for plan in plans
            for stage in plan.stages
            if stage.frozen is not None and stage.action is Action.REUSE and plan.store.also_read
        } | {(each.store, key): each.store.open for each in to_run for key in (*each.reads, each.key)}
        before = len(found)
        for (store, key), check in checks.items():
            try:
                check(*key)
            except DamagedArtifactError as damage:
                # What is found again could not be set aside.
                if (store, key) in found or any(plan.config.store.on_damage is OnDamage.STOP for plan in plans):
                    raise
                if display is not None:
                    display.note(f"{damage.fault}; it is made anew")
                found.add((store, key))
        if len(found) == before:
            return plans
        plans = [plan_run(plan.config, plan.overrides) for plan in plans]


def objective_of(plan: Plan, outcomes: Sequence[StageOutcome]) -> float | None:
    """The value of `run.objective` (`stage.metric`), or None without one.

    Raises `UserError` where a stage did not finish, and where there is no such metric.
    """
    config = plan.config
    for outcome in outcomes:
        if outcome.outcome not in (Outcome.FINISHED, Outcome.REUSED):
            why = f": {outcome.failure.message}" if outcome.failure else ""
            raise UserError(f"stage {outcome.stage} of run {config.run.name} is {outcome.outcome.value}{why}")
    if config.run.objective is None:
        return None
    stage, _, metric = config.run.objective.partition(".")
    artifacts = run_artifacts(plan.store.outputs, read_run(plan.store.outputs, config.run.name))
    metrics = artifacts[stage].manifest.metrics if stage in artifacts else {}
    if metric not in metrics:
        known = [f"{name}.{each}" for name, artifact in artifacts.items() for each in artifact.manifest.metrics]
        raise UserError(f"run.objective={config.run.objective!r} is no metric; there are {', '.join(known)}")
    value = metrics[metric]
    return float("nan") if value is None else float(value)  # a manifest keeps what is no number as null


def _require_same_code(plan: Plan) -> None:
    """Refuse to go on from a checkpoint with other code than it was made with, unless another command has the stage."""
    for stage in plan.stages:
        if stage.other_code and stage.frozen is not None:
            if not Vacancy(stage.frozen.work, stage.frozen.trainer.lease_s).is_free:
                continue
            before = read_record(stage.frozen.work) or {}
            raise UserError(
                f"stage {stage.name} would go on from its checkpoint with other code ({several(stage.other_code)} "
                f"changed); add --accept-code to go on with it, or go back to the code of {before.get('version')}"
            )


def _check_objective(config: RunConfig) -> None:
    """Refuse an objective that no stage of the run can have, before any of them runs."""
    objective = config.run.objective
    if objective is None:
        return
    stage, _, metric = objective.partition(".")
    if stage not in config.stage or not metric:
        raise UserError(
            f"run.objective={objective!r} is not stage.metric of this run; its stages are {', '.join(config.stage)}"
        )
