import importlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UnCLIPImageVariationPipeline, UnCLIPPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel
from stages.clip.settings import ClipNetworkSettings
from stages.decoder.network import Condition, UNetDecoder
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderSettings
from stages.diffusion.settings import PredictionType, ScheduleKind
from stages.export.obstacle import obstacle
from stages.export.stock_pipeline import TEXT_PROJ_CLASS, save_stock_pipeline
from stages.generation.text_to_image import GenerationOptions, TextToImage
from stages.prior.network import build_prior
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorNetworkSettings, PriorSettings
from stages.unet import UNetSettings
from stages.upsampler.network import build_upsampler
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a small red circle at the left of a gray background", "Ünïcode &amp; HTML,   spaces", ""]
OPTIMIZER = {
    "learning_rate": 1e-3,
    "warmup_samples": 0,
    "decay": "constant",
    "final_learning_rate_share": 1.0,
    "beta1": 0.9,
    "beta2": 0.99,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "gradient_clip_norm": None,
    "non_finite": "stop",
    "ema_decay": 0.0,
}
TRAINING = {"global_batch_size": 1, "max_samples": 1, "optimizer": OPTIMIZER}
DIFFUSION = {
    "schedule": {"kind": "cosine", "timesteps": 1000, "zero_terminal_snr": False},
    "objective": {"prediction_type": "sample", "min_snr_gamma": None},
}
SAMPLER = {"steps": 2, "eta": 1.0, "guidance_scale": 1.0}
CLIP_NETWORK = ClipNetworkSettings(
    embed_dim=32,
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    context_length=24,
    quick_gelu=False,
    initial_position_gain=1.0,
)
UNET = UNetSettings(
    channels=(16, 32),
    layers_per_block=1,
    attention=(False, True),
    attention_head_dim=8,
    norm_groups=8,
    dropout=0.0,
)
PRIOR = PriorSettings.model_validate(
    TRAINING
    | DIFFUSION
    | {
        "network": {"layers": 1, "heads": 2, "head_dim": 8},
        "caption_dropout": 0.1,
        "sampler": SAMPLER | {"candidates": 1, "clip_sample_range": 5.0},
    }
)
DECODER = DecoderSettings.model_validate(
    TRAINING
    | DIFFUSION
    | {
        "image_size": 8,
        "condition": "image_embed",
        "network": UNET.model_dump(),
        "clip_loss": {"weight": 0.0, "timestep_power": 1.0, "sample_share": 1.0},
        "caption_dropout": 0.5,
        "image_embed_dropout": 0.1,
        "sampler": SAMPLER | {"clip_guidance_scale": 0.0},
    }
)
UPSAMPLER = UpsamplerSettings.model_validate(
    TRAINING
    | DIFFUSION
    | {
        "low_size": 8,
        "high_size": 16,
        "crop_size": 8,
        "degradation": "blur",
        "network": UNET.model_copy(update={"attention": (False, False)}),
        "sampler": SAMPLER,
    }
)


@pytest.fixture(scope="module")
def networks() -> Any:
    torch.manual_seed(0)
    decoder = UNetDecoder(UNET, image_size=8, embed_dim=32).eval()
    # Unequal variances, a mean, a null embedding: whatever export has to fold in.
    decoder.image_decorrelation.fit(3.0 + torch.randn(256, 32) * torch.logspace(-1, 1, 32))
    decoder.text_decorrelation.fit(torch.randn(256, 32) @ torch.randn(32, 32))
    torch.nn.init.normal_(decoder.text_proj.learned_classifier_free_guidance_embeddings)
    clip = ClipModel(CLIP_NETWORK).eval()
    prior = build_prior(PriorNetworkSettings(layers=1, heads=2, head_dim=8), embed_dim=32, context_length=24).eval()
    upsampler = build_upsampler(UPSAMPLER.network, high_size=16).eval()
    return TextToImage(
        clip,
        PriorSampler(prior, PRIOR, CaptionEncoder(clip)),
        DecoderSampler(decoder, DECODER, clip),
        [UpsamplerSampler(upsampler, UPSAMPLER)],
    )


def save(directory: Path, networks: Any, **options) -> Path:
    save_stock_pipeline(directory, networks.clip, networks.prior, networks.decoder, networks.upsamplers[0], **options)
    return directory


def quiet(pipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def directory(networks, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("stock"), networks)


@pytest.fixture(scope="module")
def pipeline(directory) -> Any:
    return quiet(UnCLIPPipeline.from_pretrained(directory, use_safetensors=True))


@pytest.fixture(scope="module")
def variations(directory) -> Any:
    return quiet(UnCLIPImageVariationPipeline.from_pretrained(directory, use_safetensors=True))


def test_diffusers_still_has_what_the_export_is_made_for():
    """Nothing but the export needs the pipelines."""
    for name in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline", "UnCLIPScheduler", "PriorTransformer"):
        assert getattr(diffusers, name, None) is not None, (
            f"diffusers {diffusers.__version__} has no {name} any more: bound it in pyproject.toml below this version, "
            "and say in docs/exporting.md which one loads an export, until there is another format to export to"
        )
    module, name = TEXT_PROJ_CLASS
    assert hasattr(importlib.import_module(module), name), (
        f"diffusers {diffusers.__version__} has moved {name}: set TEXT_PROJ_CLASS in stages/export/stock_pipeline.py "
        "to its new place, and see that older exports still load"
    )


def test_the_saved_pipeline_draws_pictures_of_the_upsamplers_size(pipeline):
    pictures = pipeline(
        CAPTIONS[:2],
        prior_num_inference_steps=2,
        decoder_num_inference_steps=2,
        super_res_num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]


@torch.no_grad()
def test_the_saved_text_encoder_agrees_with_clip_on_whole_captions(networks, pipeline):
    # transformers' tokenizer does not clean captions as open_clip's does: give it a clean one.
    tokens = pipeline.tokenizer(CAPTIONS[:1], padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    stock = pipeline.text_encoder(tokens.input_ids)
    own = networks.clip.encode_text(networks.clip.tokenize(CAPTIONS[:1]))
    torch.testing.assert_close(stock.text_embeds, own.embed, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens.attention_mask.bool(), own.mask)
    kept = own.mask[0]
    torch.testing.assert_close(stock.last_hidden_state[:, kept], own.hidden[:, kept], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_saved_decoder_predicts_what_ours_does_and_the_fixed_small_variance(networks, pipeline):
    clip, decoder = networks.clip, networks.decoder.network
    text = clip.encode_text(clip.tokenize(CAPTIONS[:2]))
    image_embed = torch.randn(2, 32)
    noisy = torch.randn(2, 3, 8, 8)
    timestep = torch.tensor([10, 900])
    hidden, time_embed = pipeline.text_proj(
        image_embeddings=image_embed[1:],
        prompt_embeds=text.embed,
        text_encoder_hidden_states=text.hidden,
        do_classifier_free_guidance=True,  # puts the null embedding before the given one
    )
    mask = torch.nn.functional.pad(text.mask, (4, 0), value=True)
    stock = pipeline.decoder(
        noisy, timestep, encoder_hidden_states=hidden, class_labels=time_embed, attention_mask=mask
    ).sample
    dropped = torch.tensor([True, False])
    own = decoder(noisy, timestep, Condition(image_embed, text, drop_image_embed=dropped))
    torch.testing.assert_close(stock[:, :3], own, atol=1e-4, rtol=1e-4)
    assert torch.equal(stock[:, 3:], torch.full_like(own, -1.0))


@torch.no_grad()
def test_the_saved_prior_and_upsampler_predict_what_ours_do(networks, pipeline):
    noisy = torch.randn(2, 6, 16, 16)
    timestep = torch.tensor([5, 500])
    torch.testing.assert_close(
        pipeline.super_res_first(noisy, timestep).sample, networks.upsamplers[0].network(noisy, timestep).sample
    )
    embeds, hidden = torch.randn(2, 32), torch.randn(2, 24, 32)
    arguments = {"timestep": timestep, "proj_embedding": embeds, "encoder_hidden_states": hidden}
    mask = torch.ones(2, 24, dtype=torch.bool)
    stock = pipeline.prior(embeds, attention_mask=mask, **arguments).predicted_image_embedding
    own = networks.prior.network(embeds, attention_mask=mask, **arguments).predicted_image_embedding
    torch.testing.assert_close(stock, own)


def with_every_timestep(networks: Any, timesteps: int) -> TextToImage:
    """The same networks with a short schedule, each of whose timesteps is taken, and with guidance."""

    def shortened(settings, **sampling):
        schedule = settings.schedule.model_copy(update={"timesteps": timesteps})
        sampler = settings.sampler.model_copy(update={"steps": timesteps, "eta": 1.0, **sampling})
        return settings.model_copy(update={"schedule": schedule, "sampler": sampler})

    clip = networks.clip
    return TextToImage(
        clip,
        PriorSampler(networks.prior.network, shortened(PRIOR, guidance_scale=2.0), CaptionEncoder(clip)),
        DecoderSampler(networks.decoder.network, shortened(DECODER, guidance_scale=3.0), clip),
        [UpsamplerSampler(networks.upsamplers[0].network, shortened(UPSAMPLER))],
    )


def replay(noise: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand these to diffusers' scheduler in turn where it would draw noise for a step."""
    remaining = iter(noise)

    def next_noise(shape, **_):
        drawn = next(remaining)
        assert drawn.shape == shape
        return drawn

    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", next_noise)


def test_the_same_noise_gives_the_same_picture_as_ours(networks, tmp_path, monkeypatch):
    ours = with_every_timestep(networks, 12)
    drawn: list[tuple[str, Tensor]] = []
    normal = SampleDraws.normal

    def recorded(self, purpose, shape):
        drawn.append((purpose, normal(self, purpose, shape)))
        return drawn[-1][1]

    monkeypatch.setattr(SampleDraws, "normal", recorded)
    captions = [CAPTIONS[0], "a big blue ring"]
    own = ours.generate(captions, [1, 2], GenerationOptions()).final
    steps = [noise for purpose, noise in drawn if " step " in purpose]
    beginnings = [noise for purpose, noise in drawn if " step " not in purpose]
    stock = quiet(UnCLIPPipeline.from_pretrained(save(tmp_path, ours)))
    replay(steps, monkeypatch)
    pictures = stock(
        captions,
        prior_num_inference_steps=12,
        decoder_num_inference_steps=12,
        super_res_num_inference_steps=12,
        prior_guidance_scale=2.0,
        decoder_guidance_scale=3.0,
        output_type="np",
        **dict(zip(("prior_latents", "decoder_latents", "super_res_latents"), beginnings, strict=True)),
    ).images
    expected = (own * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.05
    # Of 255 levels less than a tenth of one.
    np.testing.assert_allclose(pictures, expected, atol=3e-4, rtol=0)


@torch.no_grad()
def test_variations_are_made_from_the_embedding_that_our_clip_gives(networks, variations):
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    own = networks.clip.encode_image(pixels.permute(2, 0, 1)[None] / 127.5 - 1)
    stock = variations.image_encoder(variations.feature_extractor(picture, return_tensors="pt").pixel_values)
    torch.testing.assert_close(stock.image_embeds, own, atol=1e-5, rtol=1e-5)
    made = variations(picture, decoder_num_inference_steps=2, super_res_num_inference_steps=2).images
    assert [each.size for each in made] == [(16, 16)]


def test_one_directory_serves_all_loaders(directory, pipeline, variations):
    assert type(DiffusionPipeline.from_pretrained(directory)) is UnCLIPPipeline
    for name in ("decoder", "text_encoder", "text_proj", "super_res_first"):
        ours, theirs = (getattr(each, name).state_dict() for each in (pipeline, variations))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_the_image_tower_there_is_no_pipeline_for_variations(networks, tmp_path):
    save(tmp_path, networks, with_image_tower=False)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is UnCLIPPipeline
    assert not {"image_encoder", "feature_extractor", "image_variation.py"} & {each.name for each in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="image_encoder"):
        UnCLIPImageVariationPipeline.from_pretrained(tmp_path)


def loaded_with_defaults(directory: Path, name: str) -> Any:
    return quiet(DiffusionPipeline.from_pretrained(directory, custom_pipeline=name, trust_remote_code=True))


def test_the_pipelines_that_go_along_sample_as_the_run_unless_told_otherwise(networks, pipeline, directory, tmp_path):
    def pictures(of, subject, **options):
        return np.stack([np.asarray(of(subject, generator=torch.Generator().manual_seed(0), **options).images[0])])

    caption = CAPTIONS[0]
    run = {
        "prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0, "prior_num_inference_steps": 2,
        "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2,
    }  # fmt: skip
    own = loaded_with_defaults(directory, "text_to_image")
    assert own.config["sampling"] == run
    assert np.array_equal(pictures(own, caption), pictures(pipeline, caption, **run))
    few = {name: value for name, value in run.items() if "steps" in name}
    strong = {**few, "prior_guidance_scale": 4.0, "decoder_guidance_scale": 8.0}
    assert np.array_equal(pictures(own, caption, **strong), pictures(pipeline, caption, **strong))
    assert not np.array_equal(pictures(own, caption), pictures(own, caption, **strong))
    # Another export in the same process has its own.
    other = save(tmp_path, with_every_timestep(networks, 3))
    sampling = loaded_with_defaults(other, "text_to_image").config["sampling"]
    assert sampling["decoder_guidance_scale"] == 3.0
    variation = loaded_with_defaults(other, "image_variation")
    assert dict(variation.config["sampling"]) == {n: each for n, each in sampling.items() if "prior" not in n}
    assert variation(Image.new("RGB", (16, 16))).images[0].size == (16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_digits_are_half_the_bytes_and_load_as_float32(networks, directory, tmp_path, dtype):
    before = deepcopy(networks.prior.network.state_dict())
    save(tmp_path, networks, dtype=dtype)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 7
    for file in files:
        whole, half = load_file(directory / file), load_file(tmp_path / file)
        assert {each.dtype for each in half.values()} == {dtype}
        assert all(torch.equal(whole[name].to(dtype), half[name]) for name in whole)
    after = networks.prior.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stock = quiet(UnCLIPPipeline.from_pretrained(tmp_path))
    assert {stock.decoder.dtype, stock.prior.dtype, stock.text_encoder.dtype} == {torch.float32}
    few = dict.fromkeys([f"{name}_num_inference_steps" for name in ("prior", "decoder", "super_res")], 2)
    assert np.isfinite(stock(CAPTIONS[0], output_type="np", **few).images).all()
    stock = quiet(UnCLIPPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert {stock.decoder.dtype, stock.prior.dtype, stock.text_encoder.dtype} == {dtype}


def test_the_index_says_how_the_run_is_sampled(directory):
    index = json.loads((directory / "model_index.json").read_text())
    assert index["sampling"]["prior_guidance_scale"] == PRIOR.sampler.guidance_scale


def test_what_the_stock_schedulers_cannot_express_is_named():
    v_objective = DECODER.objective.model_copy(update={"prediction_type": PredictionType.V_PREDICTION})
    linear = PRIOR.schedule.model_copy(update={"kind": ScheduleKind.LINEAR})
    assert obstacle(PRIOR, DECODER, [UPSAMPLER]) is None
    assert "v_prediction" in str(obstacle(PRIOR, DECODER.model_copy(update={"objective": v_objective}), [UPSAMPLER]))
    assert "cosine" in str(obstacle(PRIOR.model_copy(update={"schedule": linear}), DECODER, [UPSAMPLER]))
    assert "prior" in str(obstacle(None, DECODER, [UPSAMPLER]))
    assert "upsampler" in str(obstacle(PRIOR, DECODER, []))
    larger = UPSAMPLER.model_copy(update={"low_size": 16, "high_size": 32})
    assert "upsampler" in str(obstacle(PRIOR, DECODER, [larger]))
    assert obstacle(PRIOR, DECODER, [larger, UPSAMPLER]) is None
    other = DECODER.model_copy(update={"network": PRIOR.network})
    assert "U-Net" in str(obstacle(PRIOR, other, [UPSAMPLER]))
