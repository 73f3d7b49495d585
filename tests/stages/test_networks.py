from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch.nn import functional as F

from stages.clip.network import TextEncoding
from stages.decoder.network import Condition, UNetDecoder
from stages.embed.embeddings import Whitening
from stages.pictures import resize
from stages.prior.network import build_prior, denoise_prior, get_whitening, set_whitening
from stages.prior.settings import PriorNetworkSettings
from stages.unet import UNetSettings
from stages.upsampler.network import build_upsampler, denoise_upsampler

EMBED_DIM, CONTEXT = 16, 10
UNET = UNetSettings(
    channels=(16, 32), layers_per_block=1, attention=(False, True), attention_head_dim=8, norm_groups=8, dropout=0.0
)


def condition(batch):
    mask = torch.arange(CONTEXT)[None] < torch.randint(2, CONTEXT + 1, (batch, 1))
    return {
        "image_embed": torch.randn(batch, EMBED_DIM),
        "text": TextEncoding(torch.randn(batch, EMBED_DIM), torch.randn(batch, CONTEXT, EMBED_DIM), mask),
    }


def without_gradient(network):
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = UNetDecoder(UNET, image_size=8, embed_dim=EMBED_DIM)
    with torch.no_grad():
        decoder.text_proj.learned_classifier_free_guidance_embeddings.normal_()
    return decoder.eval()


@torch.no_grad()
def test_a_guided_decoder_call_is_that_of_the_stock_pipeline(decoder):
    """Half of the batch without the image embedding, as `UnCLIPPipeline` stacks [unconditional, conditional]."""
    given = condition(2)
    empty = condition(2)
    noisy, timestep = torch.randn(2, 3, 8, 8), torch.tensor([7, 7])
    both = empty["text"], given["text"]
    text_embed = torch.cat([text.embed for text in both])
    text_hidden = torch.cat([text.hidden for text in both])
    text_mask = torch.cat([text.mask for text in both])
    hidden, time_embed = decoder.text_proj(
        image_embeddings=given["image_embed"],
        prompt_embeds=text_embed,
        text_encoder_hidden_states=text_hidden,
        do_classifier_free_guidance=True,
    )
    stock = decoder.unet(
        sample=torch.cat([noisy, noisy]),
        timestep=torch.tensor(7),
        encoder_hidden_states=hidden,
        class_labels=time_embed,
        attention_mask=F.pad(text_mask, (decoder.text_proj.clip_extra_context_tokens, 0), value=True),
    ).sample

    unconditional = decoder(
        noisy,
        timestep,
        Condition(given["image_embed"], empty["text"], drop_image_embed=torch.tensor([True, True])),
    )
    conditional = decoder(noisy, timestep, Condition(**given))

    torch.testing.assert_close(torch.cat([unconditional, conditional]), stock, rtol=1e-4, atol=1e-5)
    assert (unconditional - conditional).abs().max() > 1e-3


@torch.no_grad()
def test_each_sample_drops_its_own_image_embedding(decoder):
    given, noisy, timestep = condition(2), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    other = {**given, "image_embed": torch.randn(2, EMBED_DIM)}
    drop = torch.tensor([True, False])

    first = decoder(noisy, timestep, Condition(**given, drop_image_embed=drop))
    second = decoder(noisy, timestep, Condition(**other, drop_image_embed=drop))

    torch.testing.assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-4


@torch.no_grad()
def test_the_decoder_sees_no_token_behind_the_mask(decoder):
    given, noisy, timestep = condition(2), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    text = given["text"]
    text.mask[:, 5:] = False
    changed = {**given, "text": replace(text, hidden=text.hidden.clone())}
    changed["text"].hidden[:, 5:] += 1.0
    visible = {**given, "text": replace(text, hidden=text.hidden.clone())}
    visible["text"].hidden[:, 0] = torch.randn(2, EMBED_DIM)

    output = decoder(noisy, timestep, Condition(**given))

    torch.testing.assert_close(output, decoder(noisy, timestep, Condition(**changed)))
    assert (output - decoder(noisy, timestep, Condition(**visible))).abs().max() > 1e-5


@pytest.mark.parametrize("drop", [None, torch.tensor([True, True, True]), torch.tensor([True, False, False])])
def test_a_decoder_step_reaches_every_parameter(drop):
    decoder = UNetDecoder(UNET, image_size=8, embed_dim=EMBED_DIM)
    decoder(
        torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 3]), Condition(**condition(3), drop_image_embed=drop)
    ).sum().backward()

    assert without_gradient(decoder) == []


def test_a_decoder_is_saved_and_loaded_as_the_classes_of_the_stock_pipeline(decoder, tmp_path):
    decoder.unet.save_pretrained(tmp_path / "decoder")
    decoder.text_proj.save_pretrained(tmp_path / "text_proj")
    again = UNetDecoder(UNET, image_size=8, embed_dim=EMBED_DIM).eval()
    again.unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder")
    again.text_proj = UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj")
    given, noisy, timestep = condition(1), torch.randn(1, 3, 8, 8), torch.tensor([3])

    torch.testing.assert_close(again(noisy, timestep, Condition(**given)), decoder(noisy, timestep, Condition(**given)))


def make_prior():
    torch.manual_seed(0)
    return build_prior(PriorNetworkSettings(layers=2, heads=2, head_dim=8), EMBED_DIM, CONTEXT)


def test_a_prior_step_reaches_every_parameter():
    prior, given = make_prior(), condition(3)
    denoise_prior(
        prior,
        torch.randn(3, EMBED_DIM),
        torch.tensor([1, 2, 3]),
        given["text"],
    ).sum().backward()

    assert without_gradient(prior) == []
    assert not prior.clip_mean.requires_grad


@torch.no_grad()
def test_the_prior_takes_a_timestep_for_each_sample():
    prior, given, noisy = make_prior().eval(), condition(2), torch.randn(2, EMBED_DIM)
    text = given["text"]

    together = denoise_prior(prior, noisy, torch.tensor([5, 900]), text)

    for row, timestep in enumerate((5, 900)):
        one = text[row : row + 1]
        alone = prior(noisy[row : row + 1], timestep, one.embed, one.hidden, one.mask).predicted_image_embedding
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_whitened_embeddings_have_zero_mean_and_unit_variance_and_come_back():
    embeds = 3.0 + 2.0 * torch.randn(500, EMBED_DIM)
    whitening = Whitening.of(embeds)

    white = whitening.whiten(embeds)

    torch.testing.assert_close(white.mean(0), torch.zeros(EMBED_DIM), rtol=0, atol=1e-5)
    torch.testing.assert_close(white.std(0, correction=0), torch.ones(EMBED_DIM), rtol=1e-4, atol=0)
    torch.testing.assert_close(whitening.unwhiten(white), embeds, rtol=1e-4, atol=1e-5)


def test_a_constant_dimension_whitens_to_zero():
    embeds = torch.randn(10, 3)
    embeds[:, 1] = 4.0

    assert (Whitening.of(embeds).whiten(embeds)[:, 1] == 0).all()


def test_the_prior_carries_the_whitening_as_the_stock_pipeline_reads_it(tmp_path):
    prior, embeds = make_prior(), 3.0 + 2.0 * torch.randn(50, EMBED_DIM)
    whitening = Whitening.of(embeds)
    set_whitening(prior, whitening)
    prior.save_pretrained(tmp_path)

    again = type(prior).from_pretrained(tmp_path)

    white = torch.randn(4, EMBED_DIM)
    torch.testing.assert_close(again.post_process_latents(white), whitening.unwhiten(white))
    torch.testing.assert_close(get_whitening(again).std, whitening.std)


UPSAMPLER = UNET.model_copy(update={"attention": (False, False)})


def test_an_upsampler_step_reaches_every_parameter():
    upsampler = build_upsampler(UPSAMPLER, high_size=32)
    denoise_upsampler(
        upsampler, torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), torch.randn(2, 3, 16, 16)
    ).sum().backward()

    assert without_gradient(upsampler) == []


@torch.no_grad()
def test_an_upsampler_without_attention_does_the_same_on_a_crop_and_on_the_picture():
    """Far from the borders, up to the statistics of group norm, which a constant picture shares with its crop."""
    upsampler = build_upsampler(UPSAMPLER, high_size=32).eval()
    picture, condition_ = torch.full((1, 3, 32, 32), 0.3), torch.full((1, 3, 32, 32), -0.2)

    whole = denoise_upsampler(upsampler, picture, torch.tensor([10]), condition_)
    crop = denoise_upsampler(upsampler, picture[..., :16, :16], torch.tensor([10]), condition_[..., :16, :16])

    assert whole.shape == (1, 3, 32, 32)
    assert crop.shape == (1, 3, 16, 16)


def test_an_upsampler_has_no_attention_unless_it_is_asked_for():
    def attention_layers(network):
        return [name for name, _ in network.named_modules() if name.endswith("to_q")]

    assert attention_layers(build_upsampler(UPSAMPLER, 32)) == []
    assert attention_layers(build_upsampler(UNET, 32)) != []


def test_the_condition_is_enlarged_as_the_stock_pipeline_enlarges_it():
    low = torch.rand(2, 3, 4, 4)
    stock = F.interpolate(low, size=[16, 16], mode="bicubic", align_corners=False, antialias=True)

    assert torch.equal(resize(low, 16), stock)
