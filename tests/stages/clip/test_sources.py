import json
from pathlib import Path
from typing import cast

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipeline.errors import UserError
from stages.clip.names import vit_shapes
from stages.clip.network import ClipModel, ClipTokenizer, ShortTokenizer, load_clip_source
from stages.clip.settings import clip_network, dictated
from stages.clip.sources import (
    BPE_VOCABULARY,
    OPENAI_MEAN,
    OPENAI_STD,
    clip_source,
    network_of_model,
    open_clip_models,
)
from stages.export.open_clip_directory import save_open_clip
from stages.export.transformers_clip import text_to_transformers, vision_to_transformers
from stages.weights import without_weights

KEY = "stage.clip.checkpoint"
CAPTIONS = ["a small red circle", "one two three"]
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TIMM = {"image_size": 32, "timm_pool": "", "timm_proj": "linear", "timm_model_pretrained": True}
CONFIGS = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "quick_gelu": {"quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "wide blocks": {"vision_cfg": VIT | {"mlp_ratio": 4.5}, "text_cfg": TEXT},
    "average pool": {"vision_cfg": VIT | {"pool_type": "avg"}, "text_cfg": TEXT},
    "resnet": {"vision_cfg": RESNET, "text_cfg": TEXT},
    "convnext": {"vision_cfg": TIMM | {"timm_model_name": "test_convnext"}, "text_cfg": TEXT},
    "custom text": {"custom_text": True, "vision_cfg": TIMM | {"timm_model_name": "test_vit"}, "text_cfg": TEXT},
    "no causal mask": {"custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT | {"no_causal_mask": True}},
    "narrow text": {"vision_cfg": VIT, "text_cfg": TEXT | {"width": 16}},
}


def write_local_dir(directory: Path, config, file: str = "open_clip_model.safetensors", **preprocess):
    """A folder as open_clip's `local-dir:` takes it, and the model in it."""
    directory.mkdir(exist_ok=True)
    model_config = {"embed_dim": 32, **config}
    vision = {name: each for name, each in config["vision_cfg"].items() if name != "timm_model_pretrained"}
    build = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    torch.manual_seed(0)
    model = build(
        32,
        open_clip.CLIPVisionCfg(**vision),
        open_clip.CLIPTextCfg(**config["text_cfg"]),
        quick_gelu=config.get("quick_gelu", False),
    ).eval()
    for name, each in model.named_parameters():
        if name != "logit_scale":
            each.data.add_(0.05 * torch.randn_like(each))
    content = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if file.endswith(".safetensors"):
        save_file(weights, directory / file)
    else:
        torch.save(
            {"epoch": 1, "state_dict": {f"module.{name}": each for name, each in weights.items()}}, directory / file
        )
    return model


def load(location: Path) -> ClipModel:
    source = clip_source(location, KEY)
    assert source.network is not None
    return load_clip_source(source, clip_network(source.network)).eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_local_directory_of_any_towers_gives_open_clip_s_own_embeddings(name: str, tmp_path: Path):
    theirs = write_local_dir(tmp_path, CONFIGS[name])

    ours = load(tmp_path)

    size = ours.settings.image_size
    image = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (OPENAI_MEAN, OPENAI_STD))
    tokens = ours.tokenize(CAPTIONS)
    torch.testing.assert_close(ours.encode_image(2 * image - 1), theirs.encode_image((image - mean) / std))
    encoding = ours.encode_text(tokens)
    torch.testing.assert_close(encoding.embed, theirs.encode_text(tokens))
    assert encoding.hidden.shape == (2, 12, 32)
    assert torch.equal(encoding.mask, tokens != 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reaches_every_parameter_and_no_statistics_of_batches(name: str):
    config = CONFIGS[name]
    model = ClipModel(clip_network(dictated_by({"embed_dim": 32, **config})))
    size = model.settings.image_size
    before = {key: each.clone() for key, each in model.network.named_buffers()}

    image, text = model(torch.randn(2, 3, size, size), model.tokenize(CAPTIONS))
    (image.square().sum() + text.square().sum()).backward()

    assert [key for key, each in model.named_parameters() if each.grad is None] == ["network.logit_scale"]
    assert all(torch.equal(each, before[key]) for key, each in model.network.named_buffers())


def dictated_by(config):
    from stages.clip.sources import network_of_config

    return network_of_config(config, "here")


@pytest.mark.parametrize("name", ["vit", "resnet", "custom text", "no causal mask"])
def test_what_is_saved_of_any_towers_is_read_back_whole_and_as_a_text_tower(name: str, tmp_path: Path):
    write_local_dir(tmp_path / "theirs", CONFIGS[name])
    model = load(tmp_path / "theirs")
    model.save(tmp_path)

    again, text_only = ClipModel.load(tmp_path).eval(), ClipModel.load(tmp_path, type(model.towers).TEXT).eval()

    assert again.settings == model.settings
    weights = model.state_dict()
    assert all(torch.equal(each, weights[key]) for key, each in again.state_dict().items())
    tokens = model.tokenize(CAPTIONS)
    assert torch.equal(text_only.encode_text(tokens).embed, model.encode_text(tokens).embed)


def test_captions_are_cut_short_in_training_only_where_padding_is_not_looked_at():
    causal, other = (
        ClipModel(clip_network(dictated_by({"embed_dim": 32, **CONFIGS[name]}))) for name in ("vit", "no causal mask")
    )
    assert isinstance(causal.training_tokenizer, ShortTokenizer)
    assert type(other.training_tokenizer) is ClipTokenizer


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "model.safetensors", "epoch_3.pt"])
def test_weights_are_found_in_a_directory_and_count_as_the_file_alone_does(file: str, tmp_path: Path):
    write_local_dir(tmp_path / "one", CONFIGS["vit"], file)
    (tmp_path / "two").mkdir()
    moved = tmp_path / "two" / f"renamed{Path(file).suffix}"
    moved.write_bytes((tmp_path / "one" / file).read_bytes())

    assert clip_source(tmp_path / "one", KEY).digest() == clip_source(moved, KEY).digest()
    assert load(tmp_path / "one").settings.embed_dim == 32


@torch.no_grad()
def test_pixels_are_normalised_as_the_directory_says(tmp_path: Path):
    theirs = write_local_dir(tmp_path, CONFIGS["vit"], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    image = torch.rand(1, 3, 16, 16) * 2 - 1

    torch.testing.assert_close(load(tmp_path).encode_image(image), theirs.encode_image(image))


@pytest.mark.parametrize("name", ["vit", "wide blocks", "resnet", "custom text"])
@torch.no_grad()
def test_what_is_exported_for_open_clip_loads_there_and_comes_back_bit_for_bit(name: str, tmp_path: Path):
    write_local_dir(tmp_path / "theirs", CONFIGS[name])
    ours = load(tmp_path / "theirs")
    exported = tmp_path / "exported"
    exported.mkdir()
    save_open_clip(exported, ours, torch.float32)

    theirs = cast(open_clip.CLIP, open_clip.create_model(f"local-dir:{exported}")).eval()
    again = load(exported)

    tokens = ours.tokenize(CAPTIONS)
    torch.testing.assert_close(theirs.encode_text(tokens), ours.encode_text(tokens).embed)
    assert again.settings == ours.settings
    weights = again.network.state_dict()
    assert all(torch.equal(each, weights[key]) for key, each in ours.network.state_dict().items())


@torch.no_grad()
def test_a_clip_model_of_transformers_gives_the_same_embeddings(tmp_path: Path):
    text = CLIPTextConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    theirs = CLIPModel(config).eval()
    for each in theirs.parameters():
        each.add_(0.05 * torch.randn_like(each))
    theirs.save_pretrained(tmp_path)

    ours = load(tmp_path)

    tokens, image = ours.tokenize(CAPTIONS), torch.rand(2, 3, 16, 16) * 2 - 1
    normalised = (image / 2 + 0.5 - ours.pixel_mean) / ours.pixel_std
    found = theirs(input_ids=tokens, pixel_values=normalised)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(ours.encode_text(tokens).embed, dim=-1), found.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(unit(ours.encode_image(image), dim=-1), found.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale.exp().reshape(1))


def test_the_towers_of_a_diffusers_pipeline_come_back_bit_for_bit(tmp_path: Path):
    write_local_dir(tmp_path / "theirs", CONFIGS["quick_gelu"])
    model = load(tmp_path / "theirs")
    text_to_transformers(model).save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"has a text_encoder/ and no image_encoder/.*image variation pipeline"):
        clip_source(tmp_path, KEY)
    vision_to_transformers(model).save_pretrained(tmp_path / "image_encoder")

    again = load(tmp_path)

    assert again.settings == model.settings
    weights = model.network.state_dict()
    different = [name for name, each in again.network.state_dict().items() if not torch.equal(each, weights[name])]
    assert different == ["logit_scale"]


def test_every_model_of_open_clip_is_taken_with_its_own_pixels_or_refused_with_a_reason():
    taken, refused = {}, {}
    for name in open_clip_models():
        try:
            taken[name] = network_of_model(name, "stage.clip.model")
        except UserError as error:
            refused[name] = str(error)
    assert {name for name in taken if taken[name]["kind"] == "vit"} >= {"ViT-B-32", "ViT-L-14-quickgelu", "ViT-bigG-14"}
    assert {"RN50", "convnext_base_w", "EVA02-B-16", "ViTamin-L", "MobileCLIP-B", "PE-Core-B-16"} <= set(taken)
    assert {"coca_ViT-B-32", "ViT-B-16-SigLIP", "roberta-ViT-B-32"} <= set(refused)
    assert all("cannot be used: " in each and "; take one with" in each for each in refused.values())
    for name, network in taken.items():
        normalisations = {
            (tuple(each.get("mean") or OPENAI_MEAN), tuple(each.get("std") or OPENAI_STD))
            for each in _PRETRAINED.get(name, {}).values()
        }
        own = tuple(network.get("image_mean", OPENAI_MEAN)), tuple(network.get("image_std", OPENAI_STD))
        assert not normalisations or own in normalisations


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-g-14", "RN50"])
def test_a_model_by_name_has_the_shapes_that_open_clip_gives_it(name: str):
    config = open_clip.get_model_config(name)
    assert config is not None
    with torch.device("meta"):
        ours = ClipModel(clip_network(network_of_model(name, "stage.clip.model"))).network
        theirs = open_clip.CLIP(**config)
    ours_shapes, shapes = ({key: each.shape for key, each in model.state_dict().items()} for model in (ours, theirs))
    assert ours_shapes | {"logit_scale": torch.Size([])} == shapes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "ViT-B-23"}, r"stage\.clip\.model=ViT-B-23 is no model of open_clip; did you mean ViT-B-32"),
        ({"model": "coca_ViT-B-32"}, r"stage\.clip\.model=coca_ViT-B-32 cannot be used: it is a CoCa"),
        ({"model": "ViT-B-16-SigLIP"}, r"captions are tokenised by Hugging Face's timm/ViT-B-16-SigLIP"),
        ({"checkpoint": "/no/such"}, r"stage\.clip\.checkpoint=/no/such cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_built(values, message: str):
    with pytest.raises(UserError, match=message) as error:
        dictated("stage.clip", {"model": None, "checkpoint": None, **values})
    assert "\n" not in str(error.value)


def test_a_folder_with_a_config_needs_no_name_and_one_without_says_what_is_missing(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds neither open_clip_config\.json .* as stage\.clip\.model"):
        dictated("stage.clip", {"model": None, "checkpoint": tmp_path})
    write_local_dir(tmp_path, CONFIGS["vit"])
    assert dictated("stage.clip", {"model": None, "checkpoint": str(tmp_path)})["network"]["vision_width"] == 32
    with pytest.raises(UserError, match="has a config of its own; leave model out"):
        dictated("stage.clip", {"model": "ViT-B-32", "checkpoint": str(tmp_path)})


@pytest.mark.parametrize("model", ["ViT-B-32-quickgelu", "ViT-S-16-alt", "ViT-bigG-14"])
def test_the_shapes_of_a_vit_are_known_without_building_it(model: str):
    network = clip_network(network_of_model(model, "here"))
    built = without_weights(lambda: ClipModel(network))
    shapes = {key: tuple(each.shape) for key, each in built.network.state_dict().items()}
    assert vit_shapes(network.model_dump(), BPE_VOCABULARY) == shapes
