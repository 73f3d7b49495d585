import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from stages.diffusion.guidance import ClipGuidance, classifier_free
from stages.diffusion.process import DiffusionProcess, Noised, Noisy
from stages.diffusion.sampler import invert, sample, sampling_timesteps
from stages.diffusion.settings import ObjectiveSettings, PredictionType, ScheduleKind, ScheduleSettings, Solver

DATA_MEAN, DATA_STD = 0.4, 0.2


def make_process(prediction_type, zero_terminal_snr=False):
    return DiffusionProcess(
        ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=zero_terminal_snr),
        ObjectiveSettings(prediction_type=prediction_type, min_snr_gamma=None),
    )


def ideal_denoiser(process):
    """The exact prediction for data that is N(mean, std^2) in every pixel: a closed form."""

    def denoise(x_t, timestep):
        alpha_bar = process.schedule.alpha_bar[timestep].float().reshape(-1, *([1] * (x_t.ndim - 1)))
        gain = alpha_bar.sqrt() * DATA_STD**2 / (alpha_bar * DATA_STD**2 + 1 - alpha_bar)
        x_0 = DATA_MEAN + gain * (x_t - alpha_bar.sqrt() * DATA_MEAN)
        noise = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return process.target(Noised(x_t, timestep, x_0, noise))

    return denoise


def wiggly_denoiser(x_t, timestep):
    """Any smooth function serves to compare two samplers."""
    return torch.sin(2.0 * x_t) * 0.7 + timestep.reshape(-1, 1, 1, 1) / 2000.0


@pytest.mark.parametrize("steps", [1, 7, 27, 64, 300, 1000])
def test_timesteps_are_those_that_diffusers_calls_trailing(steps):
    reference = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    reference.set_timesteps(steps)

    assert sampling_timesteps(1000, steps) == reference.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", list(PredictionType))
def test_samples_are_those_of_diffusers_ddim_where_the_steps_divide_the_timesteps(prediction_type, eta):
    process, steps = make_process(prediction_type), 20
    x_T, noises = torch.randn(2, 3, 4, 4), torch.randn(steps, 2, 3, 4, 4)  # noqa: N806
    reference = DDIMScheduler(
        num_train_timesteps=1000,
        trained_betas=process.schedule.betas.numpy(),
        timestep_spacing="trailing",
        prediction_type=prediction_type.value,
        clip_sample=True,
        clip_sample_range=1.5,
    )
    reference.set_timesteps(steps)
    theirs = x_T
    for index, timestep in enumerate(reference.timesteps):
        theirs = reference.step(
            wiggly_denoiser(theirs, timestep),
            int(timestep),
            theirs,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=noises[index],
            return_dict=False,
        )[0]

    ours = sample(wiggly_denoiser, x_T, process, steps, clip_range=1.5, eta=eta, step_noise=lambda index: noises[index])

    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("eta", "steps"), [(0.0, 300), (1.0, 900)])
@pytest.mark.parametrize("prediction_type", [PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_an_ideal_denoiser_gives_the_datas_distribution_from_pure_noise(prediction_type, eta, steps):
    generator = torch.Generator().manual_seed(0)
    process = make_process(prediction_type, zero_terminal_snr=True)
    x_T = torch.randn(16, 3, 16, 16, generator=generator)  # noqa: N806

    pictures = sample(
        ideal_denoiser(process),
        x_T,
        process,
        steps,
        clip_range=None,
        eta=eta,
        step_noise=lambda _: torch.randn(x_T.shape, generator=generator),
    )

    assert pictures.mean().item() == pytest.approx(DATA_MEAN, abs=0.01)
    assert pictures.std().item() == pytest.approx(DATA_STD, rel=0.03)


def test_a_picture_does_not_depend_on_the_batch_it_is_in():
    process = make_process(PredictionType.V_PREDICTION)
    x_T, noises = torch.randn(5, 3, 4, 4), torch.randn(10, 5, 3, 4, 4)  # noqa: N806

    together = sample(wiggly_denoiser, x_T, process, 10, eta=1.0, step_noise=lambda index: noises[index])
    alone = sample(wiggly_denoiser, x_T[3:4], process, 10, eta=1.0, step_noise=lambda index: noises[index, 3:4])

    torch.testing.assert_close(together[3:4], alone)


def test_clipping_bounds_every_picture():
    process = make_process(PredictionType.SAMPLE)

    pictures = sample(lambda x_t, _: 10.0 * x_t, torch.randn(4, 3, 4, 4), process, 10, clip_range=0.25)

    assert pictures.abs().max() <= 0.25


def test_inversion_finds_the_noise_that_leads_back_to_the_picture():
    process = make_process(PredictionType.V_PREDICTION)
    denoise = ideal_denoiser(process)
    picture = DATA_MEAN + DATA_STD * torch.randn(2, 3, 4, 4)

    x_T = invert(denoise, picture, process, steps=500)  # noqa: N806

    # For Gaussian data the flow is a shift and a scale, so x_T is known.
    torch.testing.assert_close(x_T, (picture - DATA_MEAN) / DATA_STD, rtol=0, atol=0.1)
    torch.testing.assert_close(sample(denoise, x_T, process, steps=500, clip_range=None), picture, rtol=0, atol=0.02)


def test_stochastic_sampling_without_noise_is_refused():
    process = make_process(PredictionType.SAMPLE)

    with pytest.raises(ValueError, match="step_noise"):
        sample(wiggly_denoiser, torch.randn(1, 3, 4, 4), process, 5, eta=1.0)


def test_classifier_free_guidance_extrapolates_and_a_scale_of_one_changes_nothing():
    unconditional, conditional = torch.tensor([1.0]), torch.tensor([3.0])

    assert classifier_free(unconditional, conditional, 1.0).item() == 3.0
    assert classifier_free(unconditional, conditional, 2.5).item() == 6.0
    assert classifier_free(unconditional, conditional, 0.0).item() == 1.0


class MeanColourClip:
    """A CLIP whose embedding is the mean colour."""

    def encode_image(self, image):
        return image.mean((2, 3))


@pytest.mark.parametrize("prediction_type", list(PredictionType))
def test_clip_guidance_shifts_the_noise_as_classifier_guidance_does(prediction_type):
    process = make_process(prediction_type)
    timestep, scale = 400, 100.0
    alpha_bar = float(process.schedule.alpha_bar[timestep])
    x_t, text_embed = 0.5 * torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    denoise = ideal_denoiser(process)
    batch_timestep = torch.full((2,), timestep)

    def predict_x_0(x):
        return process.x_0(denoise(x, batch_timestep), Noisy(x, batch_timestep))

    def log_p(x):
        image_embed = predict_x_0(x).clamp(-1, 1).mean((2, 3))
        return (scale * alpha_bar * torch.cosine_similarity(image_embed, text_embed)).sum()

    steps = 1e-4 * torch.eye(x_t.numel(), dtype=torch.float64).reshape(-1, *x_t.shape)
    numeric = torch.stack([log_p(x_t + step) - log_p(x_t - step) for step in steps]).reshape(x_t.shape) / 2e-4
    noise = (x_t - alpha_bar**0.5 * predict_x_0(x_t)) / (1 - alpha_bar) ** 0.5
    shifted_noise = noise - (1 - alpha_bar) ** 0.5 * numeric

    guided = ClipGuidance(MeanColourClip(), text_embed, scale)(predict_x_0, x_t, alpha_bar)

    guided_noise = (x_t - alpha_bar**0.5 * guided) / (1 - alpha_bar) ** 0.5
    assert (shifted_noise - noise).abs().max() > 0.05
    torch.testing.assert_close(guided_noise, shifted_noise, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction_type", [PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_clip_guidance_raises_the_similarity_of_what_is_sampled(prediction_type):
    process = make_process(prediction_type, zero_terminal_snr=True)
    denoise = ideal_denoiser(process)
    x_T, text_embed = torch.randn(4, 3, 4, 4), torch.tensor([[1.0, -1.0, 0.0]]).expand(4, 3)  # noqa: N806
    clip = MeanColourClip()

    def similarity_with(scale):
        guidance = ClipGuidance(clip, text_embed, scale)
        pictures = sample(denoise, x_T, process, 20, guidance=guidance)
        assert torch.isfinite(pictures).all()
        return torch.cosine_similarity(clip.encode_image(pictures), text_embed).mean().item()

    plain = sample(denoise, x_T, process, 20)
    assert similarity_with(0.0) == pytest.approx(
        torch.cosine_similarity(clip.encode_image(plain), text_embed).mean().item(), abs=1e-5
    )
    assert similarity_with(0.0) < similarity_with(5.0) < similarity_with(50.0)


def test_ddpm_is_that_of_diffusers_at_every_timestep():
    process, steps = make_process(PredictionType.SAMPLE), 1000
    x_T = torch.randn(2, 3, 4, 4)  # noqa: N806
    reference = DDPMScheduler(
        num_train_timesteps=steps,
        trained_betas=process.schedule.betas.numpy(),
        prediction_type="sample",
        clip_sample=True,
        variance_type="fixed_small",
    )
    theirs, noises = x_T, []
    for timestep in reversed(range(steps)):
        torch.manual_seed(timestep)
        noises.append(torch.randn_like(x_T))
        torch.manual_seed(timestep)
        theirs = reference.step(wiggly_denoiser(theirs, torch.tensor(timestep)), timestep, theirs, return_dict=False)[0]

    ours = sample(wiggly_denoiser, x_T, process, steps, solver=Solver.DDPM, step_noise=lambda index: noises[index])

    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_euler_is_that_of_diffusers():
    process, steps = make_process(PredictionType.SAMPLE), 25
    x_T = torch.randn(2, 3, 4, 4)  # noqa: N806
    reference = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        trained_betas=process.schedule.betas.tolist(),
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    reference.set_timesteps(steps)
    theirs = x_T * reference.init_noise_sigma
    for timestep in reference.timesteps:
        x_t = reference.scale_model_input(theirs, timestep)
        theirs = reference.step(wiggly_denoiser(x_t, timestep), timestep, theirs, return_dict=False)[0]

    ours = sample(wiggly_denoiser, x_T, process, steps, solver=Solver.EULER, clip_range=None, eta=1.0)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_that_of_diffusers(steps):
    process = make_process(PredictionType.SAMPLE)
    x_T = torch.randn(2, 3, 4, 4)  # noqa: N806
    reference = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        trained_betas=process.schedule.betas.tolist(),
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    reference.set_timesteps(steps)
    theirs = x_T
    for timestep in reference.timesteps:
        theirs = reference.step(wiggly_denoiser(theirs, timestep), timestep, theirs, return_dict=False)[0]

    ours = sample(wiggly_denoiser, x_T, process, steps, solver=Solver.DPM_SOLVER_PP_2M, clip_range=None)

    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", [PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_dpm_solver_needs_fewer_steps_than_ddim_for_the_flow_of_gaussian_data(prediction_type, is_zero_snr):
    process = make_process(prediction_type, zero_terminal_snr=is_zero_snr)
    denoise, x_T = ideal_denoiser(process), torch.randn(4, 3, 8, 8)  # noqa: N806

    def error(solver):
        made = sample(denoise, x_T, process, 12, solver=solver, clip_range=None)
        # The flow of Gaussian data is a shift and a scale.
        return float((made - (DATA_MEAN + DATA_STD * x_T)).square().mean().sqrt())

    # Half of it is that of the last step, which is the same for both: the prediction at the lowest timestep.
    assert error(Solver.DPM_SOLVER_PP_2M) < 0.8 * error(Solver.DDIM)


def test_what_is_begun_at_a_later_step_goes_on_as_the_whole_does():
    process = make_process(PredictionType.SAMPLE)
    seen, steps = [], 10
    x_T = torch.randn(2, 3, 4, 4)  # noqa: N806

    def denoise(x_t, timestep):
        seen.append(x_t)
        return wiggly_denoiser(x_t, timestep)

    whole = sample(denoise, x_T, process, steps)

    torch.testing.assert_close(sample(wiggly_denoiser, seen[6], process, steps, first=6), whole)


def test_what_is_known_of_a_picture_stays_and_the_rest_is_drawn():
    process = make_process(PredictionType.SAMPLE)
    known = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4).expand(2, 3, 4, 4)
    is_known = torch.arange(4)[None, None, None] < 2

    for solver in Solver:
        pictures = sample(
            wiggly_denoiser,
            torch.randn(2, 3, 4, 4),
            process,
            6,
            solver=solver,
            step_noise=lambda _: torch.randn(2, 3, 4, 4),
            constrain=lambda x_0: torch.where(is_known, known, x_0),
        )
        assert torch.equal(pictures[..., :2], known[..., :2])
        assert (pictures[..., 2:] - known[..., 2:]).abs().max() > 0.01


def test_refined_inversion_comes_back_to_the_picture_in_few_steps():
    process, steps = make_process(PredictionType.SAMPLE), 25
    picture = 0.6 * torch.randn(2, 3, 4, 4).clamp(-1, 1)

    def denoise(x_t, timestep):
        alpha_bar = process.schedule.alpha_bar[timestep].float().reshape(-1, 1, 1, 1)
        return (torch.tanh(2.0 * x_t / alpha_bar.sqrt().clamp(min=0.05)) * alpha_bar + 0.3 * (1 - alpha_bar)).float()

    def error(refinements):
        x_T = invert(denoise, picture, process, steps, refinements=refinements)  # noqa: N806
        again = sample(denoise, x_T, process, steps, clip_range=None)
        return float((again - denoise(picture, torch.full((2,), 39))).square().mean().sqrt())

    assert error(3) < 0.5 * error(0)
