from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch.nn import functional as F

from stages.clip.network import TextEncoding
from stages.decoder.network import Condition, UNetDecoder
from stages.decoder.text_proj import TextProjection
from stages.unet import UNetSettings, check_unet

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
    stock_proj = UnCLIPTextProjModel(**decoder.text_proj.sizes)
    stock_proj.load_state_dict(decoder.text_proj.state_dict())
    hidden, time_embed = stock_proj(
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
        attention_mask=F.pad(text_mask, (decoder.text_proj.extra_tokens, 0), value=True),
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


def test_new_weights_of_the_projection_are_drawn_as_those_of_the_stock_pipelines(decoder):
    torch.manual_seed(3)
    stock = UnCLIPTextProjModel(**decoder.text_proj.sizes).state_dict()
    torch.manual_seed(3)
    sizes = decoder.text_proj.sizes
    ours = TextProjection(
        sizes["clip_embeddings_dim"],
        sizes["time_embed_dim"],
        sizes["cross_attention_dim"],
        decoder.text_proj.extra_tokens,
    ).state_dict()

    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


def test_a_decoder_is_saved_and_loaded_as_the_classes_of_the_stock_pipeline(decoder, tmp_path):
    decoder.unet.save_pretrained(tmp_path / "decoder")
    decoder.text_proj.save(tmp_path / "text_proj")
    again = UNetDecoder(UNET, image_size=8, embed_dim=EMBED_DIM).eval()
    again.unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder")
    again.text_proj.load_state_dict(UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj").state_dict())
    given, noisy, timestep = condition(1), torch.randn(1, 3, 8, 8), torch.tensor([3])

    torch.testing.assert_close(again(noisy, timestep, Condition(**given)), decoder(noisy, timestep, Condition(**given)))


def run_decoder(image_size, context_length):
    decoder = UNetDecoder(UNET, image_size, embed_dim=16)
    decoder(
        torch.randn(1, 3, image_size, image_size),
        torch.tensor([1]),
        Condition(
            torch.randn(1, 16),
            TextEncoding(
                torch.randn(1, 16), torch.randn(1, context_length, 16), torch.ones(1, context_length, dtype=torch.bool)
            ),
        ),
    )


def test_what_is_refused_for_its_tokens_crashes_in_diffusers_and_its_neighbours_run():
    with pytest.raises(RuntimeError):
        run_decoder(image_size=12, context_length=32)
    for context_length in (31, 33):
        check_unet(UNET, 12, "network", "image_size", context_length)
        run_decoder(image_size=12, context_length=context_length)
