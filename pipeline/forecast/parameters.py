"""Whether the parameters that a stage is to freeze, or to train at a rate of their own, are in its network.

Imports torch only where a plan has such a stage.
"""

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.workflow.plan import Action, Plan, PlannedStage

_ASKING = ("freeze", "learning_rate_factors", "layer_decay")
"""The settings of an optimiser that are right or wrong by the names of a network's parameters."""


def require_parameters(plans: Sequence[Plan]) -> None:
    """Build the networks of such stages without weights. Raises `UserError` where one lacks what its settings name."""
    looked_at: set[str] = set()
    for plan in plans:
        asking = [each for each in plan.stages if _asks(each) and each.fingerprint not in looked_at]
        if asking:
            _build(plan, [each.name for each in asking])
            looked_at |= {str(each.fingerprint) for each in asking}


def _asks(stage: PlannedStage) -> bool:
    if stage.frozen is None or stage.action is Action.REUSE:
        return False
    optimizer = stage.frozen.settings.get("optimizer") or {}
    return any(optimizer.get(name) for name in _ASKING)


def _build(plan: Plan, names: Sequence[str]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.forecast.rehearsal import rehearsals_of, rehearsing

    rehearsals = rehearsals_of(plan, FakeTensorMode(allow_non_fake_inputs=True))
    with rehearsing():
        for name in names:
            try:
                _ = rehearsals[name].rehearsed
            except UserError as error:
                raise UserError(f"stage.{name}.{error}") from error
