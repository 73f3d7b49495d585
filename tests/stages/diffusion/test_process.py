import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.nn import functional as F

from pipeline.data.draws import SampleDraws
from pipeline.training.weighted import weighted_means
from stages.diffusion.process import DiffusionProcess, Noised, Noisy
from stages.diffusion.settings import ObjectiveSettings, PredictionType, ScheduleKind, ScheduleSettings

TIMESTEP = torch.tensor([0, 10, 500, 900, 990])


def make_process(prediction_type, zero_terminal_snr=False, min_snr_gamma=None):
    return DiffusionProcess(
        ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=zero_terminal_snr),
        ObjectiveSettings(prediction_type=prediction_type, min_snr_gamma=min_snr_gamma),
    )


def noised_at(process, timestep, shape=(3, 4, 4)):
    x_0, noise = torch.randn(2, len(timestep), *shape)
    return Noised(process.schedule.add_noise(x_0, noise, timestep), timestep, x_0, noise)


def test_v_is_that_of_diffusers():
    process = make_process(PredictionType.V_PREDICTION)
    noised = noised_at(process, TIMESTEP)
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    theirs = reference.get_velocity(noised.x_0, noised.noise, TIMESTEP)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(process.target(noised), theirs, rtol=0, atol=2e-5)


def test_data_is_noised_as_its_samples_draw():
    process, seeds = make_process(PredictionType.SAMPLE), torch.arange(5)
    x_0 = torch.randn(5, 3, 4, 4)

    noised = process.noise(x_0, SampleDraws(seeds))

    alone = process.noise(x_0[3:4], SampleDraws(seeds[3:4]))
    assert len(set(noised.timestep.tolist())) > 1
    assert torch.equal(noised.x_0, x_0)
    assert torch.equal(noised.x_t, process.schedule.add_noise(x_0, noised.noise, noised.timestep))
    assert torch.equal(noised.x_t[3:4], alone.x_t)


@pytest.mark.parametrize("prediction_type", list(PredictionType))
def test_a_perfect_prediction_gives_back_the_clean_data_and_the_noise(prediction_type):
    process = make_process(prediction_type)
    noised = noised_at(process, TIMESTEP)
    prediction = process.target(noised)

    # float32 loses digits where one of the two drowns in the other: epsilon's x_0 at t = 990, sample's noise at t = 0
    torch.testing.assert_close(process.x_0(prediction, noised), noised.x_0, rtol=0, atol=1e-4)
    x_0 = process.x_0(prediction, noised)
    torch.testing.assert_close(process.noise_between(x_0, noised), noised.noise, rtol=0, atol=1e-4)
    assert process.loss(prediction, noised).tolist() == [0.0] * 5


@pytest.mark.parametrize("prediction_type", [PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_clean_data_is_predicted_from_pure_noise(prediction_type):
    process = make_process(prediction_type, zero_terminal_snr=True)
    noised = noised_at(process, torch.tensor([999, 999]))
    pure = Noisy(noised.noise, noised.timestep)

    torch.testing.assert_close(process.x_0(process.target(noised), pure), noised.x_0)


def test_min_snr_weights_make_all_prediction_types_one_objective():
    """The same mistake, expressed as x_0, noise or v, must cost min(SNR, gamma) times its square in x_0."""
    gamma = 5.0
    timestep = torch.tensor([0, 100, 400, 600, 900])
    x_0, noise, mistake = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64)
    alpha_bar = make_process(PredictionType.SAMPLE).schedule.alpha_bar[timestep].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    guess = x_0 + mistake
    guessed_noise = (x_t - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = torch.minimum(snr, torch.tensor(gamma)) * mistake.square().mean((1, 2, 3))
    for prediction_type in PredictionType:
        process = make_process(prediction_type, min_snr_gamma=gamma)
        prediction = process.target(Noised(x_t, timestep, guess, guessed_noise))
        loss = process.loss(prediction, Noised(x_t, timestep, x_0, noise))
        torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "weight"),
    [(PredictionType.EPSILON, 1.0), (PredictionType.SAMPLE, 0.0), (PredictionType.V_PREDICTION, 0.0)],
)
def test_min_snr_weights_are_finite_at_pure_noise(prediction_type, weight):
    process = make_process(prediction_type, zero_terminal_snr=True, min_snr_gamma=5.0)

    assert process.weight(torch.tensor([999])).tolist() == [weight]


def test_without_gamma_the_loss_is_the_mean_squared_error_of_each_sample():
    process = make_process(PredictionType.EPSILON)
    noised = noised_at(process, TIMESTEP)
    prediction = torch.randn_like(noised.noise)

    loss = process.loss(prediction, noised)

    assert loss.shape == (5,)
    assert loss.mean().item() == pytest.approx(F.mse_loss(prediction, noised.noise).item(), rel=1e-5)


def test_losses_by_timestep_are_means_of_the_samples_of_each_quarter():
    process = make_process(PredictionType.SAMPLE)
    noised = noised_at(process, torch.tensor([0, 249, 250, 999]))
    found = process.loss_by_timestep(torch.tensor([1.0, 3.0, 5.0, 7.0]), noised)
    means = weighted_means({name: float(value) for name, value in found.items()})
    assert means == {"diffusion_t0": 2.0, "diffusion_t1": 5.0, "diffusion_t3": 7.0}
