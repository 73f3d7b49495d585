"""A run as a function of its config, for Hydra's own sweepers and launchers: they call it and read its objective."""

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.launch.local.lanes import run_plans
from pipeline.terminal.display import Display
from pipeline.workflow.plan import plan_run, require_unblocked
from pipeline.workflow.progress import Outcome
from pipeline.workflow.runs import read_run, record_run, run_artifacts


def run_and_measure(config: RunConfig, overrides: tuple[str, ...]) -> float | None:
    """Run what is not finished; the value of `run.objective` (`stage.metric`), or None without one.

    Raises `UserError` where a stage did not finish, and where there is no such metric.
    """
    plan = plan_run(config, overrides)
    require_unblocked([plan])
    _check_objective(config)
    record_run(plan)
    for outcome in run_plans([plan], Display()):
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
