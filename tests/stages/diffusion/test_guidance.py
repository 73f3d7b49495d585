"""What guidance and candidates cost is batched, and what a sample gets does not depend on its batch."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from pipeline.data.draws import SampleDraws
from stages.captions import NO_CAPTION, CaptionEncoder
from stages.clip.network import ClipModel, TextEncoding
from stages.clip.settings import ClipSettings
from stages.decoder.network import Condition, build_decoder
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderOptions, DecoderSettings
from stages.diffusion.guidance import ClassifierFree, classifier_free, guided
from stages.diffusion.settings import SamplerSettings
from stages.embed.embeddings import Whitening
from stages.prior.network import build_prior, denoise_prior, get_whitening, set_whitening
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorOptions, PriorSettings
from tests.support.tiny_runs import plan_stages

SEEDS = torch.tensor([5, 6, 7])
STEPS, CANDIDATES, SCALE = 3, 2, 2.5
CAPTIONS = ["a big blue ring", "two", "a small red square on the left"]


class Batches:
    """The sizes of the batches that a network is called with."""

    def __init__(self, network: nn.Module) -> None:
        self.sizes: list[int] = []
        network.register_forward_pre_hook(lambda _, inputs: self.sizes.append(len(inputs[0])))


@pytest.fixture
def clip(tmp_path) -> ClipModel:
    settings = ClipSettings.model_validate(plan_stages(tmp_path)["clip"].settings)
    return ClipModel(settings.network).eval()


@pytest.fixture
def prior(tmp_path, clip: ClipModel) -> PriorSampler:
    settings = PriorSettings.model_validate(plan_stages(tmp_path)["prior"].settings)
    sampler = settings.sampler.model_copy(update={"candidates": CANDIDATES, "guidance_scale": SCALE, "eta": 0.5})
    network = build_prior(settings.network, clip.settings.embed_dim, clip.settings.context_length).eval()
    set_whitening(network, Whitening.of(torch.randn(50, clip.settings.embed_dim)))
    return PriorSampler(network, settings.model_copy(update={"sampler": sampler}), CaptionEncoder(clip))


@pytest.fixture
def decoder(tmp_path, clip: ClipModel) -> DecoderSampler:
    settings = DecoderSettings.model_validate(plan_stages(tmp_path)["decoder"].settings)
    sampler = settings.sampler.model_copy(update={"guidance_scale": SCALE, "eta": 0.5})
    network = build_decoder(settings, clip.settings.embed_dim).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # some of a U-Net's layers begin at 0, and would do nothing
            parameter.add_(0.02 * torch.randn_like(parameter))
    return DecoderSampler(network, settings.model_copy(update={"sampler": sampler}), clip)


def guidance(**changes) -> ClassifierFree:
    sampler = {"steps": STEPS, "eta": 0.0, "guidance_scale": SCALE, **changes}
    return ClassifierFree(SamplerSettings.model_validate(sampler), timesteps=10)


def test_guidance_acts_inside_of_its_interval_alone():
    text, none = (TextEncoding(torch.randn(1, 4), torch.randn(1, 3, 4), torch.ones(1, 3).bool()) for _ in range(2))

    def denoise(x: Tensor, at: Tensor, condition: TextEncoding) -> Tensor:
        del at
        return x + condition.embed

    inside = guided(denoise, text, none, guidance(guidance_interval=(0.2, 0.7)))
    x_t = torch.randn(1, 4)

    conditional = denoise(x_t, torch.tensor([0]), text)
    is_guided = [not torch.equal(inside(x_t, torch.tensor([each])), conditional) for each in range(10)]
    assert is_guided == [2 <= each < 7 for each in range(10)]


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale: float):
    without, conditional = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)

    ours = guidance(guidance_scale=4.0, guidance_rescale=rescale).combine(without, conditional)

    theirs = rescale_noise_cfg(classifier_free(without, conditional, 4.0), conditional, guidance_rescale=rescale)
    torch.testing.assert_close(ours, theirs)


def test_guidance_is_one_call_of_what_both_predictions_are():
    text, none = (TextEncoding(torch.randn(2, 4), torch.randn(2, 3, 4), torch.ones(2, 3).bool()) for _ in range(2))
    x_t, timestep = torch.randn(2, 4), torch.tensor([3, 4])

    def denoise(x: Tensor, at: Tensor, condition: TextEncoding) -> Tensor:
        return x * at[:, None] + condition.embed + condition.hidden.sum(1)

    both = guided(denoise, text, none, guidance())(x_t, timestep)

    expected = classifier_free(denoise(x_t, timestep, none), denoise(x_t, timestep, text), SCALE)
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(guided(denoise, text, None, guidance())(x_t, timestep), denoise(x_t, timestep, text))


def test_candidates_and_guidance_of_the_prior_are_one_batch_of_what_each_is_alone(prior: PriorSampler):
    captions = prior._captions
    text, batches = captions.encode(CAPTIONS), Batches(prior.network)

    drawn = prior.sample(text, SampleDraws(SEEDS), PriorOptions(steps=STEPS))

    assert batches.sizes == STEPS * [2 * CANDIDATES * len(SEEDS)]
    for row, seed in enumerate(SEEDS):
        own, none = text[row : row + 1], captions.encode_all_as(NO_CAPTION, 1)

        def denoise(x_t: Tensor, timestep: Tensor, own: TextEncoding = own, none: TextEncoding = none) -> Tensor:
            without, given = (denoise_prior(prior.network, x_t, timestep, each) for each in (none, own))
            return classifier_free(without, given, SCALE)

        candidates = [
            prior.draw(
                denoise,
                SampleDraws(seed[None]),
                f"prior {candidate}",
                own.embed.shape[1:],
                prior.settings.sampler.model_copy(update={"steps": STEPS}),
                clip_range=prior.settings.sampler.clip_sample_range,
            )
            for candidate in range(CANDIDATES)
        ]
        unwhitened = [get_whitening(prior.network).unwhiten(each) for each in candidates]
        best = max(unwhitened, key=lambda z_i, own=own: float((z_i * own.embed).sum()))
        torch.testing.assert_close(drawn[row : row + 1], best, rtol=1e-4, atol=1e-5)
        assert (unwhitened[0] - unwhitened[1]).abs().max() > 1e-2


def test_a_guided_picture_of_the_decoder_does_not_depend_on_its_batch(decoder: DecoderSampler):
    embed = torch.randn(len(SEEDS), decoder._clip.settings.embed_dim)
    text, batches = CaptionEncoder(decoder._clip).encode(CAPTIONS), Batches(decoder.network)
    options = DecoderOptions(steps=STEPS)

    together = decoder.sample(Condition(embed, text), SampleDraws(SEEDS), options)

    assert batches.sizes == STEPS * [2 * len(SEEDS)]
    unguided = decoder.sample(Condition(embed, text), SampleDraws(SEEDS), DecoderOptions(guidance_scale=1, steps=STEPS))
    assert batches.sizes[STEPS:] == STEPS * [len(SEEDS)]
    assert (together - unguided).abs().max() > 1e-2
    for row in range(len(SEEDS)):
        rows = slice(row, row + 1)
        alone = decoder.sample(Condition(embed[rows], text[rows]), SampleDraws(SEEDS[rows]), options)
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)


def test_the_encoding_of_no_caption_is_that_of_an_empty_one(clip: ClipModel):
    captions = CaptionEncoder(clip)
    none, empty = captions.encode_all_as(NO_CAPTION, 3), captions.encode(["", "", ""])
    torch.testing.assert_close(none.embed, empty.embed)
    torch.testing.assert_close(none.hidden, empty.hidden)
    assert torch.equal(none.mask, empty.mask)
