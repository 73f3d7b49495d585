"""The door for Python, on networks that were never trained: what is drawn from what, and what stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config import TrainerSettings, validate
from pipeline.errors import UserError
from pipeline.training.inference import inference_fabric
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel
from stages.clip.settings import ClipSettings
from stages.decoder.network import build_decoder
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderOptions, DecoderSettings
from stages.diffusion.settings import SamplerOptions, Solver
from stages.embed.embeddings import Whitening
from stages.generation.model import Model, Origin
from stages.generation.options import GenerationOptions, Judge
from stages.generation.picture import Noise, Picture, read_recipe
from stages.generation.text_to_image import TextToImage
from stages.prior.network import build_prior, set_whitening
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorOptions, PriorSettings
from stages.upsampler.network import build_upsampler
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerSettings
from tests.support.fakes import TRAINER
from tests.support.tiny_runs import plan_stages

ORIGIN = Origin("tiny", {"decoder": "0" * 64}, "test")
NO_NUMBERS = DecoderOptions(guidance_scale=1e39, guidance_rescale=0.5)
"""More than a float32 holds."""

CAPTIONS = ["a big blue ring", "a small red square"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    stages = plan_stages(tmp_path_factory.mktemp("outputs"))
    clip_settings = ClipSettings.model_validate(stages["clip"].settings)
    prior_settings = PriorSettings.model_validate(stages["prior"].settings)
    decoder_settings = DecoderSettings.model_validate(stages["decoder"].settings)
    upsampler_settings = UpsamplerSettings.model_validate(stages["upsampler"].settings)
    clip = ClipModel(clip_settings.network)
    width = clip_settings.network.embed_dim
    prior = build_prior(prior_settings.network, width, clip_settings.network.context_length)
    set_whitening(prior, Whitening.of(torch.randn(50, width)))
    decoder = build_decoder(decoder_settings, width)
    upsampler = build_upsampler(upsampler_settings.network, upsampler_settings.high_size)
    for network in (decoder, upsampler):
        _stir(network)
    chain = TextToImage(
        clip.eval(),
        PriorSampler(prior.eval(), prior_settings, CaptionEncoder(clip)),
        DecoderSampler(decoder.eval(), decoder_settings, clip),
        [UpsamplerSampler(upsampler.eval(), upsampler_settings)],
    )
    trainer = validate(TrainerSettings, TRAINER.model_dump())
    return Model(chain, ORIGIN, inference_fabric(trainer), batch_size=3, shows_progress=False)


def _stir(network: nn.Module) -> None:
    """Some of a U-Net's layers begin at 0, and would do nothing."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def levels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def difference(first: Picture, second: Picture) -> int:
    return int(np.abs(levels(first) - levels(second)).max())


def are_about_equal(first: Picture, second: Picture) -> bool:
    """As equal as batches of other sizes let them be."""
    return difference(first, second) <= 1


def picture_of(model: Model, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (model.size, model.size, 3), np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_depends_on_its_own_caption_and_seed_alone(model: Model):
    together = model(CAPTIONS, count=2, seed=1)

    assert [each.recipe.captions for each in together] == [(caption,) for caption in CAPTIONS for _ in range(2)]
    alone = model(CAPTIONS[1], count=2, seed=1)
    assert all(map(are_about_equal, together[2:], alone))
    assert difference(together[0], together[1]) > 2
    assert difference(model(CAPTIONS[1], seed=2)[0], alone[0]) > 2
    assert together[0].image.size == (model.size, model.size)


def test_a_saved_picture_is_made_again_from_what_its_file_says(model: Model, tmp_path):
    options = GenerationOptions(
        prior=PriorOptions(candidates=2, guidance_scale=2.0),
        decoder=DecoderOptions(steps=3, guidance_scale=3.0, clip_guidance_scale=0.5),
        negative_caption="a frog",
    )
    made = model(CAPTIONS, count=2, seed=3, options=options)[2]
    made.save(tmp_path / "made.png")

    recipe = read_recipe(tmp_path / "made.png")

    assert recipe == made.recipe
    assert are_about_equal(model.again(recipe), made)
    with Image.open(tmp_path / "made.png") as file:
        assert np.array_equal(np.asarray(file), np.asarray(made.image))
        assert file.info["Description"] == CAPTIONS[1]
        assert "run tiny" in file.info["Software"]


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": PriorOptions(guidance_scale=4.0)},
        {"decoder": DecoderOptions(guidance_scale=4.0)},
        {"decoder": DecoderOptions(guidance_scale=4.0, guidance_interval=(0.0, 0.6))},
        {"decoder": DecoderOptions(guidance_scale=4.0, guidance_rescale=0.9)},
        {"decoder": DecoderOptions(guidance_scale=4.0), "negative_caption": "a frog"},
        {"decoder": DecoderOptions(steps=5)},
        {"decoder": DecoderOptions(steps=5, solver=Solver.DPM_SOLVER_PP_2M)},
        {"decoder": DecoderOptions(clip_guidance_scale=50.0)},
        {"upsampler": (SamplerOptions(steps=5),)},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(model: Model, changes):
    seen = [GenerationOptions(), GenerationOptions(decoder=DecoderOptions(guidance_scale=4.0))]
    made = model(CAPTIONS[0], options=GenerationOptions(**changes))[0]
    others = [model(CAPTIONS[0], options=each)[0] for each in seen if each != GenerationOptions(**changes)]
    assert all(difference(made, other) > 0 for other in others)


def test_the_best_of_several_is_the_one_that_clip_finds_nearest_to_its_caption(model: Model):
    (best,) = model(CAPTIONS[0], best_of=4, seed=5)

    candidates = model(CAPTIONS[0], count=4, seed=5)
    clip = model.chain.clip
    images = torch.stack([torch.from_numpy(levels(each)).permute(2, 0, 1) / 127.5 - 1 for each in candidates]).float()
    with torch.no_grad():
        text = clip.encode_text(clip.tokenize([CAPTIONS[0]])).embed
        scores = torch.cosine_similarity(clip.encode_image(images), text)
    assert best.recipe == candidates[int(scores.argmax())].recipe
    with pytest.raises(UserError, match="no stage judge_clip; judge by its own clip"):
        model(CAPTIONS[0], best_of=2, judge=Judge.JUDGE_CLIP)


def test_variations_without_eta_are_one_reconstruction_and_differ_with_it(model: Model):
    # Without upsamplers, which draw noise of their own.
    small = Model(replace(model.chain, upsamplers=[]), ORIGIN, model._fabric, shows_progress=False)
    source = picture_of(small)

    assert are_about_equal(*small.variations(source, count=2, eta=0.0))
    spread = small.variations(source, count=2, eta=1.0)

    assert difference(*spread) > 10
    assert are_about_equal(small.again(spread[1].recipe, [source]), spread[1])


def test_an_interpolation_begins_and_ends_with_its_two_pictures(model: Model):
    first, second = picture_of(model, 1), picture_of(model, 2)

    way = model.interpolate(first, second, count=4)

    assert [each.recipe.share for each in way] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    back = model.interpolate(second, first, count=4)[::-1]
    assert all(map(are_about_equal, way, back))
    assert difference(way[0], way[-1]) > 2
    fixed = model.interpolate(first, second, count=4, noise=Noise.FIXED)
    assert are_about_equal(fixed[0], way[0])
    assert difference(fixed[-1], way[-1]) > 1


def test_captions_are_interpolated_from_what_each_gives_alone(model: Model):
    way = model.interpolate_captions(*CAPTIONS, count=3, seed=4)

    assert difference(way[0], way[2]) > 2
    assert are_about_equal(model.again(way[1].recipe), way[1])
    elsewhere = model.interpolate_captions(CAPTIONS[0], "a tall green cross", count=3, seed=4)
    assert are_about_equal(way[0], elsewhere[0])
    assert difference(way[1], elsewhere[1]) > 1


def test_a_text_diff_begins_with_the_picture_and_turns_towards_the_target(model: Model):
    source = picture_of(model)

    way = model.text_diff(source, *CAPTIONS, count=3, strength=0.5)

    assert [each.recipe.share for each in way] == [0.0, 0.25, 0.5]
    assert difference(way[0], way[1]) > 0
    back = model.text_diff(source, *CAPTIONS[::-1], count=3, strength=0.5)
    assert are_about_equal(way[0], back[0])
    assert difference(way[2], back[2]) > 1


@pytest.mark.parametrize("solver", [Solver.DDIM, Solver.DPM_SOLVER_PP_2M])
def test_inpainting_keeps_what_the_mask_leaves_black_to_the_bit(model: Model, solver: Solver):
    source, mask = picture_of(model), Image.new("L", (model.size, model.size), 0)
    left = model.size // 2 - 3  # no multiple of the decoder's pixels
    mask.paste(255, (left, 0, model.size, model.size))
    options = GenerationOptions(decoder=DecoderOptions(solver=solver, steps=3))

    made = model.inpaint(source, mask, CAPTIONS[0], count=4, options=options)

    for each in made:
        assert np.array_equal(np.asarray(each.image)[:, :left], np.asarray(source)[:, :left])
        assert np.abs(levels(each)[:, left:] - np.asarray(source).astype(int)[:, left:]).max() > 10
    assert difference(made[0], made[1]) > 2
    with pytest.raises(UserError, match="the mask has 5 x 5 pixels and the picture"):
        model.inpaint(source, Image.new("L", (5, 5)), CAPTIONS[0])


def test_image_to_image_leaves_the_less_of_a_picture_the_stronger_it_is(model: Model):
    source = picture_of(model)
    options = GenerationOptions(decoder=DecoderOptions(steps=10))

    whole = model.image_to_image(source, CAPTIONS[0], strength=1.0, seed=2, options=options)[0]

    assert are_about_equal(whole, model(CAPTIONS[0], seed=2, options=options)[0])
    weak = model.image_to_image(source, CAPTIONS[0], strength=0.1, seed=2, options=options)[0]
    assert difference(weak, whole) > 2


def test_what_cannot_be_made_again_says_why(model: Model, tmp_path):
    source = picture_of(model)
    made = model.variations(source, count=1)[0]

    with pytest.raises(UserError, match="made from 1 others, and the 0 given"):
        model.again(made.recipe)
    with pytest.raises(UserError, match="are not these"):
        model.again(made.recipe, [picture_of(model, 9)])
    other = made.recipe.model_copy(update={"artifacts": {"decoder": "1" * 64}})
    with pytest.raises(UserError, match="made by another decoder"):
        model.again(other, [source])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"captions": []}, "no caption is given"),
        ({"captions": "a <end_of_text> b"}, "CLIP takes for its own mark"),
        ({"captions": "x", "options": GenerationOptions(negative_caption="<end_of_text>")}, "its own mark"),
        ({"captions": "broken \udcff"}, "no valid text"),
        ({"captions": "x", "count": 0}, "count=0"),
        ({"captions": "x", "seed": -1}, "seed=-1"),
        ({"captions": "x", "seed": 2**64}, "seed="),
        (
            {"captions": "x", "options": GenerationOptions(decoder=DecoderOptions(steps=10**6))},
            "decoder.steps .* at most",
        ),
        ({"captions": "x", "options": GenerationOptions(upsampler=(SamplerOptions(steps=10**6),))}, "upsampler.steps"),
        ({"captions": "x", "options": GenerationOptions(decoder=NO_NUMBERS)}, "give smaller scales of guidance"),
        ({"captions": "x", "best_of": 2, "judge": "judge_clip"}, "has no stage judge_clip"),
    ],
)
def test_what_no_picture_can_be_made_of_is_refused_in_a_line(model: Model, arguments, said: str):
    with pytest.raises(UserError, match=said) as refused:
        model(**arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("caption", ["", "红色的圆", "a\x00b\x07", "<|endoftext|>", "🙂" * 3, "\n\t "])
def test_odd_captions_are_captions(model: Model, caption: str, tmp_path):
    (made,) = model(caption)
    made.save(tmp_path / "made.png")
    assert read_recipe(tmp_path / "made.png").captions == (caption,)


def test_a_caption_that_is_cut_is_said_in_a_line(model: Model, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", "stages.generation"):
        model("ring " * 10)
        assert caplog.messages == []
        model("ring " * 10_000)
    (line,) = caplog.messages
    assert line.endswith("has 10000 tokens, and the first 14 count")


@pytest.mark.parametrize("mode", ["1", "P", "I", "F", "CMYK", "HSV", "YCbCr", "RGBA"])
def test_pictures_of_every_mode_of_pillow_are_pictures(model: Model, mode: str):
    grey = Image.new("L", (20, 30), 255).convert(mode) if mode != "HSV" else Image.new("HSV", (20, 30), (0, 0, 255))
    made, of_white = (model.variations(each, count=1)[0] for each in (grey, Image.new("RGB", (20, 30), "white")))
    assert are_about_equal(made, of_white)


def test_a_picture_without_pixels_is_refused(model: Model):
    with pytest.raises(UserError, match="is no picture"):
        model.variations(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_that_is_no_picture_is_refused(model: Model, tmp_path, content: bytes):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(UserError, match="is no picture"):
        model.variations(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"odd\.png"):
        read_recipe(tmp_path / "odd.png")
    with pytest.raises(UserError, match="cannot be read"):
        model.variations(tmp_path / "nothing.png")
