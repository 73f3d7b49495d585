"""A pipeline that was exported comes back as the networks that it was, and a folder says what settings go with it."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import UserError
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.declaration import StageDeclaration
from pipeline.workflow.initial import find_initial
from stages.decoder import settings as decoder_settings
from stages.decoder.network import UNetDecoder, read_decoder_folder
from stages.diffusers_folder import of_scheduler
from stages.prior import settings as prior_settings
from stages.prior.network import build_prior, read_prior_folder
from stages.prior.settings import PriorNetworkSettings
from stages.unet import UNetSettings
from stages.upsampler import settings as upsampler_settings
from stages.upsampler.network import build_upsampler, read_upsampler_folder

UNET = UNetSettings(
    channels=(16, 32), layers_per_block=1, attention=(False, True), attention_head_dim=8, norm_groups=8, dropout=0.0
)
PLAIN = UNET.model_copy(update={"attention": (False, False), "resnet_time_scale_shift": "default"})

N = TypeVar("N", bound=nn.Module)


def scrambled(network: N) -> N:
    with torch.no_grad():
        for each in network.parameters():
            each.add_(0.05 * torch.randn_like(each))
    return network.eval()


def is_equal(network: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(each, weights[name]) for name, each in own.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in karlo's layout: a decoder with tokens of their own width, an upsampler that adds the timestep."""
    directory = tmp_path_factory.mktemp("karlo")
    torch.manual_seed(0)
    prior = scrambled(build_prior(PriorNetworkSettings(layers=1, heads=2, head_dim=8), 24, 12))
    prior.save_pretrained(directory / "prior")
    decoder = UNetDecoder(UNET, 8, 24, cross_attention_dim=40)
    scrambled(decoder)
    decoder.unet.save_pretrained(directory / "decoder")
    decoder.text_proj.save(directory / "text_proj")
    upsampler = scrambled(build_upsampler(PLAIN, 16))
    upsampler.save_pretrained(directory / "super_res_first")
    for name, prediction in (("prior", "sample"), ("decoder", "epsilon"), ("super_res", "epsilon")):
        scheduler = directory / f"{name}_scheduler"
        scheduler.mkdir()
        config = {"_class_name": "UnCLIPScheduler", "num_train_timesteps": 500, "prediction_type": prediction}
        (scheduler / "scheduler_config.json").write_text(json.dumps(config))
    return directory


def test_a_folder_dictates_sizes_schedule_and_what_is_predicted(folder: Path):
    prior = prior_settings.in_folder(folder, "here").dictated
    decoder = decoder_settings.in_folder(folder, "here").dictated
    upsampler = upsampler_settings.in_folder(folder, "here").dictated

    schedule = {"kind": "cosine", "timesteps": 500, "zero_terminal_snr": False}
    assert prior == {
        "network": {"layers": 1, "heads": 2, "head_dim": 8},
        "objective.prediction_type": "sample",
        "schedule": schedule,
    }
    assert decoder["objective.prediction_type"] == "epsilon"
    assert (decoder["image_size"], decoder["network"]["cross_attention_dim"]) == (8, 40)
    assert UNetSettings.model_validate(upsampler["network"]) == PLAIN
    assert (upsampler["low_size"], upsampler["high_size"]) == (8, 16)
    assert prior_settings.in_folder(folder, "here").numbers == {"embed_dim": 24, "context_length": 12}
    assert decoder_settings.in_folder(folder, "here").numbers == {"embed_dim": 24}


@pytest.mark.parametrize(
    ("stage", "network", "changes", "said"),
    [
        (prior_settings.PRIOR, "prior", {}, None),
        (decoder_settings.DECODER, "decoder", {}, None),
        (upsampler_settings.UPSAMPLER, "super_res_first", {}, None),
        (prior_settings.PRIOR, "prior", {"num_layers": 2}, r"lacks transformer_blocks\.1\.attn1\.to_q\.weight"),
        (
            prior_settings.PRIOR,
            "prior",
            {"embedding_dim": 32},
            r"proj_in\.weight has shape \[16, 24\] there and \[16, 32\]",
        ),
        (decoder_settings.DECODER, "decoder", {"block_out_channels": [16, 64]}, r"down_blocks\.1\.resnets\.0\.conv2"),
        (upsampler_settings.UPSAMPLER, "super_res_first", {"layers_per_block": 2}, r"lacks down_blocks\.0\.resnets\.1"),
    ],
)
def test_weights_of_other_sizes_than_their_configs_say_are_refused_when_a_run_is_planned(
    folder: Path, tmp_path: Path, stage: StageDeclaration, network: str, changes: dict[str, object], said: str | None
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = copy / network / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        find_initial(f"diffusers:{copy}", "it", "it", stage, "new", ArtifactStore(tmp_path))


def test_the_networks_of_a_folder_are_read_bit_for_bit(folder: Path):
    prior = build_prior(PriorNetworkSettings(layers=1, heads=2, head_dim=8), 24, 12)
    decoder = UNetDecoder(UNET, 8, 24, cross_attention_dim=40)
    upsampler = build_upsampler(PLAIN, 16)

    prior.load_state_dict(read_prior_folder(prior, folder))
    decoder.load_state_dict(read_decoder_folder(decoder, folder))
    upsampler.load_state_dict(read_upsampler_folder(upsampler, folder))

    assert is_equal(prior, load_file(folder / "prior" / "diffusion_pytorch_model.safetensors"))
    assert is_equal(decoder.unet, load_file(folder / "decoder" / "diffusion_pytorch_model.safetensors"))
    assert is_equal(decoder.text_proj, load_file(folder / "text_proj" / "diffusion_pytorch_model.safetensors"))
    assert is_equal(upsampler, load_file(folder / "super_res_first" / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(decoder.image_decorrelation.matrix, torch.eye(24))


def test_of_a_learned_variance_the_mean_is_taken(folder: Path, tmp_path: Path):
    (tmp_path / "text_proj").symlink_to(folder / "text_proj")
    decoder = UNetDecoder(UNET, 8, 24, cross_attention_dim=40)
    wide = type(decoder.unet).from_config({**decoder.unet.config, "out_channels": 6})
    assert isinstance(wide, nn.Module)
    torch.manual_seed(1)
    scrambled(wide)
    wide.half().save_pretrained(tmp_path / "decoder")

    decoder.load_state_dict(read_decoder_folder(decoder, tmp_path))

    assert torch.equal(decoder.unet.conv_out.weight, wide.conv_out.weight[:3].float())
    assert torch.equal(decoder.unet.conv_in.weight, wide.conv_in.weight.float())


def test_the_weights_may_be_in_pieces_and_count_by_what_is_in_them(folder: Path, tmp_path: Path):
    prior = build_prior(PriorNetworkSettings(layers=1, heads=2, head_dim=8), 24, 12)
    prior.load_state_dict(read_prior_folder(prior, folder))
    prior.save_pretrained(tmp_path, max_shard_size="8KB")

    assert len(prior_settings.in_folder(tmp_path, "here").files) > 1
    assert is_equal(prior, read_prior_folder(prior, tmp_path))


def test_a_folder_that_cannot_be_used_is_refused_in_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^here has no prior/config\.json; give a folder of diffusers$"):
        prior_settings.in_folder(tmp_path, "here")
    with pytest.raises(UserError, match="holds a UNet2DConditionModel and no PriorTransformer"):
        prior_settings.in_folder(folder / "decoder", "here")
    config = json.loads((folder / "super_res_first" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"flip_sin_to_cos": False}))
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.safetensors"):
        upsampler_settings.in_folder(tmp_path, "here")
    with pytest.raises(UserError, match="its config has flip_sin_to_cos False, and the network here True"):
        read_upsampler_folder(build_upsampler(PLAIN, 16), tmp_path)
    assert of_scheduler(tmp_path, "prior_scheduler") == {}
