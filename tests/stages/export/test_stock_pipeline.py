import pytest
import torch
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline

from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel
from stages.clip.settings import ClipNetworkSettings
from stages.decoder.network import Condition, UNetDecoder
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderSettings
from stages.diffusion.settings import PredictionType, ScheduleKind
from stages.export.stock_pipeline import obstacle, save_stock_pipeline
from stages.generation.text_to_image import TextToImage
from stages.prior.network import build_prior
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorNetworkSettings, PriorSettings
from stages.unet import UNetSettings
from stages.upsampler.network import build_upsampler
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerSettings

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
def networks() -> TextToImage:
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


@pytest.fixture(scope="module")
def pipeline(networks, tmp_path_factory) -> UnCLIPPipeline:
    directory = tmp_path_factory.mktemp("stock")
    save_stock_pipeline(directory, networks.clip, networks.prior, networks.decoder, networks.upsamplers[0])
    return UnCLIPPipeline.from_pretrained(directory, use_safetensors=True)


def test_the_saved_pipeline_draws_pictures_of_the_upsamplers_size(pipeline):
    pipeline.set_progress_bar_config(disable=True)
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


def test_what_the_stock_schedulers_cannot_express_is_named():
    v_objective = DECODER.objective.model_copy(update={"prediction_type": PredictionType.V_PREDICTION})
    linear = PRIOR.schedule.model_copy(update={"kind": ScheduleKind.LINEAR})
    assert obstacle(PRIOR, DECODER, UPSAMPLER) is None
    assert "v_prediction" in str(obstacle(PRIOR, DECODER.model_copy(update={"objective": v_objective}), UPSAMPLER))
    assert "cosine" in str(obstacle(PRIOR.model_copy(update={"schedule": linear}), DECODER, UPSAMPLER))
    assert "prior" in str(obstacle(None, DECODER, UPSAMPLER))
    assert "upsampler" in str(obstacle(PRIOR, DECODER, None))
    other = DECODER.model_copy(update={"network": PRIOR.network})
    assert "U-Net" in str(obstacle(PRIOR, other, UPSAMPLER))
