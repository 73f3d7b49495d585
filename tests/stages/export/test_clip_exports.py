"""What open_clip and transformers make of an exported CLIP is what ours makes of it."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from stages.clip.network import ClipModel
from stages.clip.settings import ClipNetworkSettings, ContrastiveLoss
from stages.export.open_clip_directory import save_open_clip
from stages.export.transformers_clip import save_transformers_clip

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a small red circle", "", "one two three four five six seven eight nine ten eleven twelve"]
SETTINGS = ClipNetworkSettings(
    embed_dim=32,
    image_size=16,
    patch_size=8,
    vision_width=48,
    vision_layers=2,
    vision_heads=3,
    text_width=32,
    text_layers=2,
    text_heads=4,
    context_length=12,
    quick_gelu=False,
    initial_position_gain=1.0,
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Of embeddings whose entries are about 1."""


def clip_model(*, quick_gelu: bool = False, loss: ContrastiveLoss = ContrastiveLoss.CONTRASTIVE) -> ClipModel:
    torch.manual_seed(0)
    model = ClipModel(SETTINGS.model_copy(update={"quick_gelu": quick_gelu}), loss).eval()
    # open_clip starts biases at zero, where a wrong mapping would go unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def picture(size: int) -> Image.Image:
    """Smooth, as pictures are."""
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (size, size), mode="bicubic").clamp(0, 1)
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())


def as_ours(image: Image.Image) -> torch.Tensor:
    """Float [1, 3, S, S] in [-1, 1]."""
    return torch.tensor(list(image.tobytes())).reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 127.5 - 1


def loaded_by_open_clip(directory: Path, **options: Any) -> tuple[Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}", **options)
    return model.eval(), preprocess


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_gives_the_same_embeddings(quick_gelu: bool, dtype: torch.dtype, tmp_path: Path):
    ours = clip_model(quick_gelu=quick_gelu)
    save_open_clip(tmp_path, ours, dtype)
    assert {each.dtype for each in load_file(tmp_path / "open_clip_model.safetensors").values()} == {dtype}
    model, preprocess = loaded_by_open_clip(tmp_path)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS)
    assert torch.equal(tokens, ours.tokenize(CAPTIONS))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(model.encode_text(tokens), ours.encode_text(tokens).embed, rtol=0, atol=tolerance)
    image = picture(16)
    torch.testing.assert_close(
        model.encode_image(preprocess(image)[None]), ours.encode_image(as_ours(image)), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(model.logit_scale.exp(), ours.logit_scale[0], rtol=1e-2, atol=0)


@torch.no_grad()
def test_both_preprocess_pictures_of_other_sizes_almost_as_ours(tmp_path: Path):
    """A picture of uneven sides is cut to its central square by all; what is left is how Pillow and torch round."""
    ours = clip_model()
    (tmp_path / "open_clip").mkdir()
    save_open_clip(tmp_path / "open_clip", ours, torch.float32)
    save_transformers_clip(tmp_path / "transformers", ours, torch.float32)
    wide = picture(64).resize((96, 64))
    own = ours.encode_image(as_ours(wide.crop((16, 0, 80, 64))))
    model, preprocess = loaded_by_open_clip(tmp_path / "open_clip")
    theirs = [model.encode_image(preprocess(wide)[None])]
    processed = CLIPProcessor.from_pretrained(tmp_path / "transformers")(images=wide, return_tensors="pt")
    whole = CLIPModel.from_pretrained(tmp_path / "transformers")
    theirs.append(whole.get_image_features(processed.pixel_values).pooler_output)
    for each in theirs:
        assert torch.cosine_similarity(each, own) > 0.9999
    default: Any = image_transform_v2(open_clip.transform.PreprocessCfg(size=16), is_train=False)
    torch.testing.assert_close(preprocess(wide), default(wide), rtol=0, atol=1e-6)


@torch.no_grad()
def test_open_clip_knows_siglip_s_bias(tmp_path: Path):
    ours = clip_model(loss=ContrastiveLoss.SIGLIP)
    save_open_clip(tmp_path, ours, torch.float32)
    model, _ = loaded_by_open_clip(tmp_path)
    assert ours.logit_bias is not None
    torch.testing.assert_close(model.logit_bias, ours.logit_bias[0])
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["init_logit_bias"] < -9


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_gives_the_same_embeddings_and_logits(quick_gelu: bool, dtype: torch.dtype, tmp_path: Path):
    ours = clip_model(quick_gelu=quick_gelu)
    save_transformers_clip(tmp_path, ours, dtype)
    assert {each.dtype for each in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert CLIPModel.from_pretrained(tmp_path).dtype is dtype
    model: Any = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    processor: Any = CLIPProcessor.from_pretrained(tmp_path)
    image = picture(16)
    inputs = processor(text=CAPTIONS, images=image, padding="max_length", truncation=True, return_tensors="pt")
    out = model(**inputs)
    image_embed, text_embed = ours.encode_image(as_ours(image)), ours.encode_text(ours.tokenize(CAPTIONS)).embed
    unit = torch.nn.functional.normalize
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.text_embeds, unit(text_embed), rtol=0, atol=tolerance)
    torch.testing.assert_close(out.image_embeds, unit(image_embed), rtol=0, atol=tolerance)
    logits = ours.logit_scale * unit(image_embed) @ unit(text_embed).T
    # The scale on them is about 14.
    torch.testing.assert_close(out.logits_per_image, logits, rtol=0, atol=14 * tolerance)
    assert inputs.input_ids.shape == (3, SETTINGS.context_length)
