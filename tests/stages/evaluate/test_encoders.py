"""Encoders of others, built with random weights and read from files as theirs are."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import inception_v3
from transformers import Dinov2Config, Dinov2Model

from pipeline.errors import UserError
from stages.clip.network import ClipModel, zero_shot_classifier
from stages.clip.settings import ClipNetworkSettings
from stages.clip.zero_shot import class_names, right_within
from stages.evaluate.encoders import Encoder, load_encoder, of_clip
from stages.evaluate.evaluation import ssim_of_each
from stages.evaluate.metric import INCEPTION
from stages.evaluate.settings import EncoderSettings, encoder_digests
from stages.weights import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NETWORK = ClipNetworkSettings(
    embed_dim=16, image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2, text_width=16,
    text_layers=1, text_heads=2, context_length=77, quick_gelu=False, initial_position_gain=1.0,
)  # fmt: skip


def pictures(count: int = 3, size: int = 24) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's network has torchvision's names and shapes, for the 1008 classes of its time."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def open_clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("open_clip")
    mean_and_std = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    config = {"model_cfg": TOWERS, "preprocess_cfg": mean_and_std}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**TOWERS)
    save_file(
        {name: each.contiguous() for name, each in model.state_dict().items()},
        directory / "open_clip_model.safetensors",
    )
    return directory


def test_fid_s_inception_comes_from_a_file_and_gives_its_2048_features(inception_file: Path):
    encoder = load_encoder(INCEPTION, EncoderSettings(inception=inception_file), CPU)
    features = encoder.image(pictures())
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float32
    assert encoder.text is None
    # It sees whole pixel values: what rounds to the same picture is the same picture.
    whole = torch.arange(192.0).reshape(1, 3, 8, 8) / 127.5 - 1
    assert torch.equal(encoder.image(whole), encoder.image(whole + 1e-3))


def test_dinov2_gives_the_class_token_of_transformers(tmp_path: Path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    EncoderSettings(dinov2=tmp_path).require_contents("dinov2")
    features = load_encoder("dinov2", EncoderSettings(dinov2=tmp_path), CPU).image(pictures(size=224))
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = network((pictures(size=224) / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)


def test_any_open_clip_is_read_from_its_directory(open_clip_directory: Path):
    encoder = load_encoder("open_clip", EncoderSettings(open_clip=open_clip_directory), CPU)
    name = f"local-dir:{open_clip_directory}"
    model: Any = open_clip.create_model(name)
    tokenize = open_clip.get_tokenizer(name)
    mean, std = (
        torch.tensor(each).reshape(1, 3, 1, 1) for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    image = (pictures(size=32) / 2 + 0.5 - mean) / std
    assert torch.allclose(encoder.image(pictures(size=32)), model.eval().encode_image(image, normalize=True), atol=1e-5)
    assert encoder.text is not None
    expected = model.encode_text(tokenize(["a ring", "two"]), normalize=True)
    assert torch.allclose(encoder.text(["a ring", "two"]), expected, atol=1e-5)


def test_a_file_of_open_clip_s_needs_its_model_s_name(open_clip_directory: Path, tmp_path: Path):
    (tmp_path / "tiny-of-a-test.json").write_text(json.dumps(TOWERS))
    open_clip.add_model_config(tmp_path / "tiny-of-a-test.json")
    file = open_clip_directory / "open_clip_model.safetensors"
    with pytest.raises(UserError, match=r"encoders\.open_clip .* is a file, which does not say of which model"):
        EncoderSettings(open_clip=file).find("open_clip")
    of_file = load_encoder("open_clip", EncoderSettings(open_clip=file, open_clip_model="tiny-of-a-test"), CPU)
    of_directory = load_encoder("open_clip", EncoderSettings(open_clip=open_clip_directory), CPU)
    assert torch.equal(of_file.image(pictures()), of_directory.image(pictures()))
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_encoder("open_clip", EncoderSettings(open_clip=file, open_clip_model="no-such"), CPU)


def test_without_inception_s_file_it_is_said_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"neither given by --inception nor in {tmp_path}/hub/checkpoints as weights-"
    ) as e:
        EncoderSettings().find(INCEPTION, "--")
    assert "\n" not in str(e.value)
    cached = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert EncoderSettings().find(INCEPTION) == cached


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "does not hold FID's Inception"),
        ("open_clip", "open_clip cannot load"),
        ("dinov2", "holds no DINOv2"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(name: str, message: str, tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"nothing")
    settings = EncoderSettings.model_validate({name: path, "open_clip_model": "ViT-B-32"})
    with pytest.raises(UserError, match=message):
        load_encoder(name, settings, CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "does not hold FID's Inception; give"),
        ("open_clip", "its open_clip_config.json has no model_cfg"),
        ("dinov2", "holds no DINOv2: its config.json is not of one"),
    ],
)
def test_another_network_is_told_from_the_encoder_before_either_is_loaded(name: str, message: str, tmp_path: Path):
    if name == INCEPTION:
        given = tmp_path / "inception.pth"
        torch.save({"fc.weight": torch.empty(1000, 2048), "fc.bias": torch.empty(1000)}, given)
    else:
        given = tmp_path
        (given / "config.json").write_text(json.dumps({"model_type": "clip"}))
        (given / "open_clip_config.json").write_text("[]")
    with pytest.raises(UserError, match=message) as refused:
        EncoderSettings.model_validate({name: given}).require_contents(name)
    assert "\n" not in str(refused.value)


def test_an_encoder_that_is_whole_passes_what_looks_at_it_before(inception_file: Path, open_clip_directory: Path):
    settings = EncoderSettings(inception=inception_file, open_clip=open_clip_directory)
    for name in ("inception", "open_clip"):
        settings.require_contents(name)


def test_an_encoder_counts_by_what_it_holds_and_not_by_where_it_is(open_clip_directory: Path, tmp_path: Path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in open_clip_directory.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    digest, of_copy = (
        encoder_digests(EncoderSettings(open_clip=each), ["open_clip"]) for each in (open_clip_directory, copied)
    )
    assert digest == of_copy
    (copied / "open_clip_config.json").write_text("{}")
    assert encoder_digests(EncoderSettings(open_clip=copied), ["open_clip"]) != digest


@torch.no_grad()
def test_zero_shot_classes_are_the_mean_of_openai_s_sentences_and_the_nearest_is_found():
    torch.manual_seed(0)
    clip = ClipModel(NETWORK).eval()
    names = ["big ring", "small square", "house"]
    classes = zero_shot_classifier(clip, names)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    embeds = clip.encode_text(clip.tokenize([each("house") for each in templates])).embed
    house = torch.nn.functional.normalize(embeds, dim=-1).mean(0)
    assert torch.allclose(classes[:, 2], house / house.norm(), atol=1e-5)
    encoder: Encoder = of_clip(clip)
    nearest = (encoder.image(pictures()) @ classes).argmax(1)
    assert right_within(clip, pictures(), classes, nearest, 1).all()
    assert not right_within(clip, pictures(), classes, (nearest + 1) % 3, 1).any()
    assert right_within(clip, pictures(), classes, (nearest + 1) % 3, 5).all()


def test_classes_are_called_by_their_directories_or_by_imagenet_s_names(tmp_path: Path):
    assert class_names([tmp_path / "big_ring", tmp_path / "house"]) == ["big ring", "house"]
    numbers = [tmp_path / f"n{number:08}" for number in range(1000)]
    assert class_names(numbers)[:2] == ["tench", "goldfish"]


def test_ssim_is_torchmetrics_s_of_each_picture():
    real = pictures(3, 32)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    each = [
        structural_similarity_index_measure(a[None], b[None], data_range=2.0)
        for a, b in zip(blurred, real, strict=True)
    ]
    assert torch.allclose(ssim_of_each(blurred, real), torch.tensor(each), rtol=1e-5)
    assert ssim_of_each(real, real).tolist() == pytest.approx([1, 1, 1])
