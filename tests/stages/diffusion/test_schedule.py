import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.settings import ScheduleKind, ScheduleSettings


def make(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=False):
    return NoiseSchedule(ScheduleSettings(kind=kind, timesteps=timesteps, zero_terminal_snr=zero_terminal_snr))


@pytest.mark.parametrize(
    ("kind", "diffusers_name"), [(ScheduleKind.COSINE, "squaredcos_cap_v2"), (ScheduleKind.LINEAR, "linear")]
)
def test_alpha_bar_is_that_of_diffusers_scheduler(kind, diffusers_name):
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule=diffusers_name)

    torch.testing.assert_close(make(kind).alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_the_cosine_schedule_follows_its_closed_form():
    steps, offset = 1000, 0.008
    t = torch.arange(0, steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + offset) / (1 + offset) * torch.pi / 2) ** 2

    # The last betas are capped at 0.999, which the closed form of alpha_bar does not show.
    torch.testing.assert_close(make().alpha_bar[:-1], (f[1:] / f[0])[:-1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("timesteps", [100, 1000, 4000])
def test_a_linear_schedule_holds_about_the_same_noise_at_its_end_for_any_number_of_steps(timesteps):
    log_alpha_bar = make(ScheduleKind.LINEAR, timesteps).alpha_bar[-1].log()

    # -integral of beta: the mean of 1e-4 and 0.02, times 1000
    assert log_alpha_bar == pytest.approx(-10.05, rel=0.1)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_first_step_as_it_was(kind):
    plain, rescaled = make(kind), make(kind, zero_terminal_snr=True)

    assert rescaled.alpha_bar[-1] == 0.0
    assert rescaled.alpha_bar[0] == pytest.approx(float(plain.alpha_bar[0]), rel=1e-9)
    assert (rescaled.alpha_bar.diff() < 0).all()
    torch.testing.assert_close(rescaled.betas, rescale_zero_terminal_snr(plain.betas.clone()))


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_noise_is_added_as_diffusers_adds_it(kind):
    name = "squaredcos_cap_v2" if kind is ScheduleKind.COSINE else "linear"
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    x_0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    timestep = torch.tensor([0, 1, 500, 998, 999])

    torch.testing.assert_close(
        make(kind).add_noise(x_0, noise, timestep),
        reference.add_noise(x_0, noise, timestep),  # pyright: ignore[reportArgumentType]
        rtol=0,
        atol=2e-5,
    )


def test_a_schedule_has_nothing_in_a_checkpoint():
    assert make().state_dict() == {}
