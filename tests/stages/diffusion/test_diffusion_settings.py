import pytest

from pipeline.config import OptimizerSettings
from pipeline.errors import UserError
from stages.diffusion.settings import (
    DiffusionStageSettings,
    ObjectiveSettings,
    PredictionType,
    SamplerSettings,
    ScheduleKind,
    ScheduleSettings,
    check_diffusion,
)

COSINE = ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=False)


V_PREDICTION = ObjectiveSettings(prediction_type=PredictionType.V_PREDICTION, min_snr_gamma=None)


@pytest.mark.parametrize(
    ("schedule", "objective", "steps", "message"),
    [
        (
            COSINE.model_copy(update={"zero_terminal_snr": True}),
            V_PREDICTION.model_copy(update={"prediction_type": PredictionType.EPSILON}),
            20,
            "epsilon cannot be used with schedule.zero_terminal_snr",
        ),
        (COSINE.model_copy(update={"kind": ScheduleKind.LINEAR, "timesteps": 20}), V_PREDICTION, 5, "too few"),
        (COSINE.model_copy(update={"timesteps": 50}), V_PREDICTION, 64, "steps 64 is more than the schedule's 50"),
    ],
)
def test_a_diffusion_that_cannot_work_is_refused(schedule, objective, steps, message):
    def check(schedule, objective, steps):
        settings = DiffusionStageSettings.model_construct(
            schedule=schedule, objective=objective, optimizer=OptimizerSettings.model_construct()
        )
        check_diffusion("stage.decoder", settings, SamplerSettings(steps=steps, eta=0.0, guidance_scale=1.0))

    check(COSINE, V_PREDICTION, 64)

    with pytest.raises(UserError, match=message):
        check(schedule, objective, steps)
