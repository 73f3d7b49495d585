import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.nn import functional as F

from stages.diffusion.process import diffusion_loss, predicted_noise, predicted_x_0, target, timestep_weight
from stages.diffusion.schedule import NoiseSchedule
from stages.settings import ObjectiveSettings, PredictionType, ScheduleKind, ScheduleSettings

TIMESTEP = torch.tensor([0, 10, 500, 900, 990])


@pytest.fixture
def schedule():
    return NoiseSchedule(ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=False))


@pytest.fixture
def zero_snr_schedule():
    return NoiseSchedule(ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=True))


def test_v_is_that_of_diffusers(schedule):
    x_0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    ours = target(PredictionType.V_PREDICTION, schedule, x_0, noise, TIMESTEP)

    theirs = reference.get_velocity(x_0, noise, TIMESTEP)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", list(PredictionType))
def test_a_perfect_prediction_gives_back_the_clean_data_and_the_noise(schedule, prediction_type):
    x_0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    x_t = schedule.add_noise(x_0, noise, TIMESTEP)
    prediction = target(prediction_type, schedule, x_0, noise, TIMESTEP)

    # float32 loses digits where one of the two drowns in the other: epsilon's x_0 at t = 990, sample's noise at t = 0
    torch.testing.assert_close(
        predicted_x_0(prediction_type, schedule, prediction, x_t, TIMESTEP), x_0, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        predicted_noise(prediction_type, schedule, prediction, x_t, TIMESTEP), noise, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("prediction_type", [PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_clean_data_is_predicted_from_pure_noise(zero_snr_schedule, prediction_type):
    x_0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    last = torch.tensor([999, 999])
    prediction = target(prediction_type, zero_snr_schedule, x_0, noise, last)

    torch.testing.assert_close(predicted_x_0(prediction_type, zero_snr_schedule, prediction, noise, last), x_0)


def test_min_snr_weights_make_all_prediction_types_one_objective(schedule):
    """The same mistake, expressed as x_0, noise or v, must cost min(SNR, gamma) times its square in x_0."""
    gamma = 5.0
    timestep = torch.tensor([0, 100, 400, 600, 900])
    x_0, noise, mistake = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64)
    alpha_bar = schedule.alpha_bar[timestep].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    guess = x_0 + mistake
    guessed_noise = (x_t - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = torch.minimum(snr, torch.tensor(gamma)) * mistake.square().mean((1, 2, 3))
    for prediction_type in PredictionType:
        settings = ObjectiveSettings(prediction_type=prediction_type, min_snr_gamma=gamma)
        loss = diffusion_loss(
            target(prediction_type, schedule, guess, guessed_noise, timestep),
            target(prediction_type, schedule, x_0, noise, timestep),
            timestep_weight(settings, schedule, timestep),
        )
        torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "weight"),
    [(PredictionType.EPSILON, 1.0), (PredictionType.SAMPLE, 0.0), (PredictionType.V_PREDICTION, 0.0)],
)
def test_min_snr_weights_are_finite_at_pure_noise(zero_snr_schedule, prediction_type, weight):
    settings = ObjectiveSettings(prediction_type=prediction_type, min_snr_gamma=5.0)

    assert timestep_weight(settings, zero_snr_schedule, torch.tensor([999])).tolist() == [weight]


def test_without_gamma_the_loss_is_the_mean_squared_error_of_each_sample(schedule):
    prediction, truth = torch.randn(2, 5, 3, 4, 4)
    settings = ObjectiveSettings(prediction_type=PredictionType.EPSILON, min_snr_gamma=None)

    loss = diffusion_loss(prediction, truth, timestep_weight(settings, schedule, TIMESTEP))

    assert loss.shape == (5,)
    assert loss.mean().item() == pytest.approx(F.mse_loss(prediction, truth).item(), rel=1e-5)
