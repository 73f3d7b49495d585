import html

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pipeline.errors import UserError
from stages.clip.network import (
    ClipModel,
    Towers,
    contrastive_loss,
    load_clip_source,
)
from stages.clip.settings import ClipNetworkSettings, ContrastiveLoss
from stages.clip.sources import clip_source
from stages.export.transformers_clip import text_to_transformers, vision_to_transformers

CAPTIONS = [
    "a small red circle",
    "",
    "  Caf\u00e9 &amp; <b>TEA</b>\n\n now ",
    "one two three four five six seven eight nine ten eleven twelve",
]


def make_settings(**changes):
    sizes = {
        "embed_dim": 32,
        "image_size": 16,
        "patch_size": 8,
        "vision_width": 48,
        "vision_layers": 2,
        "vision_heads": 3,
        "text_width": 32,
        "text_layers": 2,
        "text_heads": 4,
        "context_length": 12,
        "quick_gelu": False,
        "initial_position_gain": 1.0,
    }
    return ClipNetworkSettings(**{**sizes, **changes})


def load_checkpoint(path, settings):
    return load_clip_source(clip_source(path, "stage.clip.checkpoint"), settings)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ClipModel(make_settings()).eval()
    # open_clip starts biases at zero, where a wrong mapping would go unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_tokens_are_those_of_open_clips_tokenizer(model):
    expected = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)

    tokens = model.tokenize(CAPTIONS)

    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected)


def test_captions_are_cleaned_before_they_are_cut(model):
    plain, messy = model.tokenize(["caf\u00e9 & tea", html.escape("  Caf\u00e9 &\n TEA ")])

    assert torch.equal(plain, messy)


def test_text_embeddings_are_open_clips(model):
    tokens = model.tokenize(CAPTIONS)

    torch.testing.assert_close(model.encode_text(tokens).embed, model.network.encode_text(tokens))


def test_the_mask_covers_the_caption_and_its_end_token(model):
    tokens = model.tokenize(CAPTIONS)

    mask = model.encode_text(tokens).mask

    # 0 pads, and stands for "!", which no caption here has.
    assert torch.equal(mask, tokens != 0)
    assert mask.sum(1).tolist()[:2] == [6, 2]


def test_what_follows_the_end_token_changes_nothing_before_it(model):
    tokens = model.tokenize(["a red circle"])
    padded = tokens.clone()
    padded[0, 5:] = 7

    first, second = model.encode_text(tokens), model.encode_text(padded)

    torch.testing.assert_close(first.embed, second.embed)
    torch.testing.assert_close(first.hidden[first.mask], second.hidden[second.mask])


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_towers_give_the_same_embeddings_and_token_states(quick_gelu):
    torch.manual_seed(1)
    ours = ClipModel(make_settings(quick_gelu=quick_gelu)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = ours.tokenize(CAPTIONS)
    image = torch.rand(3, 3, 16, 16) * 2 - 1

    text, vision = text_to_transformers(ours), vision_to_transformers(ours)

    with torch.no_grad():
        theirs, encoding = text(input_ids=tokens), ours.encode_text(tokens)
        torch.testing.assert_close(theirs.text_embeds, encoding.embed, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.last_hidden_state, encoding.hidden, rtol=0, atol=1e-5)
        normalised = (image / 2 + 0.5 - ours.pixel_mean) / ours.pixel_std
        torch.testing.assert_close(
            vision(pixel_values=normalised).image_embeds, ours.encode_image(image), rtol=0, atol=1e-5
        )


def test_transformers_tower_agrees_on_sequences_padded_as_its_own_tokenizer_does(model):
    """transformers pads with the end token, open_clip with 0: the caption's own states must not see either."""
    tokens = model.tokenize(CAPTIONS[:2])
    encoding = model.encode_text(tokens)
    padded = torch.where(encoding.mask, tokens, 49407)

    with torch.no_grad():
        theirs = text_to_transformers(model)(input_ids=padded)

    torch.testing.assert_close(theirs.text_embeds, encoding.embed, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        theirs.last_hidden_state[encoding.mask], encoding.hidden[encoding.mask], rtol=0, atol=1e-5
    )


def test_pictures_are_resized_and_normalised_as_open_clip_expects(model):
    small = torch.rand(2, 3, 8, 8) * 2 - 1
    resized = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(1, 3, 1, 1)

    expected = model.network.encode_image(((resized + 1) / 2 - mean) / std)

    torch.testing.assert_close(model.encode_image(small), expected)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_image_embeddings_are_differentiable_at_any_size(model, size):
    picture = torch.zeros(1, 3, size, size, requires_grad=True)
    model.encode_image(picture).square().sum().backward()

    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", list(ContrastiveLoss))
def test_a_step_reaches_every_parameter(kind):
    model = ClipModel(make_settings(), kind)
    image_embed, text_embed = model(torch.randn(4, 3, 16, 16), model.tokenize(CAPTIONS))
    contrastive_loss(kind, 0, 1)(image_embed, text_embed, model.logit_scale, model.logit_bias).backward()

    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_contrastive_loss_is_the_symmetric_cross_entropy_of_cosines():
    image, text, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([10.0])
    logits = 10.0 * F.cosine_similarity(image[:, None], text[None], dim=-1)
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    loss = contrastive_loss(ContrastiveLoss.CONTRASTIVE, 0, 1)(image, text, scale, None)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, ClipLoss()(F.normalize(image), F.normalize(text), scale))


def test_the_siglip_loss_is_a_sigmoid_on_every_pair():
    image, text = torch.randn(5, 8), torch.randn(5, 8)
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    logits = 10.0 * F.cosine_similarity(image[:, None], text[None], dim=-1) - 10.0
    expected = F.binary_cross_entropy_with_logits(logits, torch.eye(5), reduction="sum") / 5

    torch.testing.assert_close(contrastive_loss(ContrastiveLoss.SIGLIP, 0, 1)(image, text, scale, bias), expected)


@pytest.mark.parametrize("kind", list(ContrastiveLoss))
def test_a_saved_model_is_read_back_as_it_was(tmp_path, kind):
    model = ClipModel(make_settings(), kind).eval()
    model.save(tmp_path)

    again = ClipModel.load(tmp_path).eval()

    assert again.settings == model.settings
    assert again.loss is kind
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_text_tower_alone_holds_no_image_weights_and_reads_text_as_before(model, tmp_path):
    model.save(tmp_path)

    text_only = ClipModel.load(tmp_path, Towers.TEXT).eval()

    assert text_only.towers is Towers.TEXT
    assert not any("visual" in name for name, _ in text_only.named_parameters())
    assert all(not tensor.is_meta for tensor in [*text_only.parameters(), *text_only.buffers()])
    tokens = model.tokenize(CAPTIONS)
    ours, theirs = text_only.encode_text(tokens), model.encode_text(tokens)
    torch.testing.assert_close(ours.embed, theirs.embed)
    torch.testing.assert_close(ours.hidden, theirs.hidden)


def test_saved_weights_load_in_open_clip_itself(model, tmp_path):
    model.save(tmp_path)
    reference = open_clip.CLIP(
        32,
        open_clip.CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=16),
        open_clip.CLIPTextCfg(context_length=12, width=32, heads=4, layers=2),
        nonscalar_logit_scale=True,
    )
    reference.load_state_dict(load_file(tmp_path / "clip.safetensors"))
    image = torch.randn(2, 3, 16, 16)

    torch.testing.assert_close(reference.eval().encode_image(image), model.network.encode_image(image))


@pytest.mark.parametrize("layout", ["safetensors", "state_dict", "training"])
def test_an_open_clip_checkpoint_is_loaded(model, tmp_path, layout):
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    # open_clip's logit scale is a scalar by default.
    weights["logit_scale"] = weights["logit_scale"].squeeze()
    path = tmp_path / ("clip.safetensors" if layout == "safetensors" else "clip.pt")
    if layout == "safetensors":
        save_file(weights, path)
    elif layout == "state_dict":
        torch.save(weights, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)

    loaded = load_checkpoint(path, model.settings).eval()

    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded.encode_image(image), model.encode_image(image))
    assert loaded.logit_scale.shape == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_width": 96}, r"visual\.\S+ has shape \[.*48.*\] there and \[.*96.*\] here \(30 of 62 weights fit"),
        ({"text_layers": 3}, r"lacks transformer\.resblocks\.2"),
        ({"vision_layers": 1}, r"has visual\.transformer\.resblocks\.1\S+ in excess"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_refused_by_name(model, tmp_path, changes, message):
    path = tmp_path / "clip.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.network.state_dict().items()}, path)

    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(path, make_settings(**changes))

    assert "\n" not in str(error.value)


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": RunsCode()}, path)

    with pytest.raises(UserError, match="no file of plain weights"):
        load_checkpoint(path, make_settings())

    assert "code ran" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "none.pt", make_settings())


def test_the_position_gain_scales_both_positional_embeddings_and_nothing_else():
    torch.manual_seed(0)
    plain = ClipModel(make_settings()).network.state_dict()
    torch.manual_seed(0)
    scaled = ClipModel(make_settings(initial_position_gain=3.0)).network.state_dict()
    for name, weight in plain.items():
        gain = 3.0 if name.endswith("positional_embedding") else 1.0
        torch.testing.assert_close(scaled[name], gain * weight)


def test_training_cuts_the_captions_to_the_longest_and_gives_the_same_embeddings(model):
    tokens = model.tokenize(["a ring", "a red circle"])
    assert int((tokens > 0).sum(1).max()) < tokens.shape[1]
    torch.testing.assert_close(model(torch.zeros(2, 3, 16, 16), tokens)[1], model.encode_text(tokens).embed)
