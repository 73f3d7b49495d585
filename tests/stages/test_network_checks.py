import subprocess
import sys

import pytest
import torch

from pipeline.errors import UserError
from stages.clip.network import TextEncoding
from stages.clip.settings import ClipNetworkSettings, check_network
from stages.decoder.network import Condition, UNetDecoder
from stages.diffusion.settings import (
    DiffusionStageSettings,
    ObjectiveSettings,
    PredictionType,
    SamplerSettings,
    ScheduleKind,
    ScheduleSettings,
    check_diffusion,
)
from stages.unet import UNetSettings, check_unet
from stages.upsampler.settings import Degradation, UpsamplerSettings, check_sizes


def unet(**changes):
    sizes = {
        "channels": (16, 32),
        "layers_per_block": 1,
        "attention": (False, True),
        "attention_head_dim": 8,
        "norm_groups": 8,
        "dropout": 0.0,
    }
    return UNetSettings(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("network", "image_size", "context_length", "message"),
    [
        (unet(), 15, 24, r"^stage\.decoder\.image_size 15 is not divisible by 2.*use 14 or 16"),
        (unet(channels=(16, 32, 32), attention=(False, True)), 16, 24, r"attention has 2 entries but channels has 3"),
        (unet(channels=(12, 32)), 16, 24, r"channels\[0\] 12 is not divisible by norm_groups 8; use 8 or 16"),
        (unet(attention_head_dim=12), 16, 24, r"channels\[1\] 32 is not divisible by attention_head_dim 12"),
        (unet(), 12, 32, r"attention\[1\] works on 36 picture tokens.*context_length 32 \+ 4"),
        (unet(attention=(False, False)), 12, 32, r"attention\[1\] works on 36 picture tokens"),
        (unet(attention=(True, True)), 6, 32, r"attention\[0\] works on 36 picture tokens"),
    ],
)
def test_a_network_that_cannot_run_is_refused_in_one_line(network, image_size, context_length, message):
    with pytest.raises(UserError, match=message) as error:
        check_unet(network, image_size, "stage.decoder.network", "stage.decoder.image_size", context_length)

    assert "\n" not in str(error.value)


def run_decoder(image_size, context_length):
    decoder = UNetDecoder(unet(), image_size, embed_dim=16)
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
        check_unet(unet(), 12, "network", "image_size", context_length)
        run_decoder(image_size=12, context_length=context_length)


def clip_network(**changes):
    sizes = {
        "embed_dim": 64,
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 96,
        "vision_layers": 1,
        "vision_heads": 3,
        "text_width": 64,
        "text_layers": 1,
        "text_heads": 4,
        "context_length": 16,
        "quick_gelu": False,
        "initial_position_gain": 1.0,
    }
    return ClipNetworkSettings(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 7}, r"image_size 32 is not divisible by patch_size 7; use 28 or 35"),
        ({"vision_heads": 5}, r"vision_width 96 is not divisible by vision_heads 5; use a width of 95 or 100"),
        ({"text_heads": 5}, r"text_width 64 is not divisible by text_heads 5"),
        ({"embed_dim": 128}, r"text_width 64 must equal embed_dim 128"),
    ],
)
def test_towers_that_cannot_be_built_are_refused(changes, message):
    check_network("stage.clip.network", clip_network())

    with pytest.raises(UserError, match=r"^stage\.clip\.network\..*" + message):
        check_network("stage.clip.network", clip_network(**changes))


COSINE = ScheduleSettings(kind=ScheduleKind.COSINE, timesteps=1000, zero_terminal_snr=False)
V_PREDICTION = ObjectiveSettings(prediction_type=PredictionType.V_PREDICTION, min_snr_gamma=None)


@pytest.mark.parametrize(
    ("schedule", "objective", "steps", "message"),
    [
        (
            COSINE.model_copy(update={"zero_terminal_snr": True}),
            V_PREDICTION.model_copy(update={"prediction_type": PredictionType.EPSILON}),
            20,
            "epsilon cannot be used with schedule.zero_terminal_snr",
        ),
        (COSINE.model_copy(update={"kind": ScheduleKind.LINEAR, "timesteps": 20}), V_PREDICTION, 5, "too few"),
        (COSINE.model_copy(update={"timesteps": 50}), V_PREDICTION, 64, "steps 64 is more than the schedule's 50"),
    ],
)
def test_a_diffusion_that_cannot_work_is_refused(schedule, objective, steps, message):
    def check(schedule, objective, steps):
        settings = DiffusionStageSettings.model_construct(schedule=schedule, objective=objective)
        check_diffusion("stage.decoder", settings, SamplerSettings(steps=steps, eta=0.0, guidance_scale=1.0))

    check(COSINE, V_PREDICTION, 64)

    with pytest.raises(UserError, match=message):
        check(schedule, objective, steps)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 64, 32), "low_size 64 must be below high_size 64"),
        ((16, 64, 128), "crop_size 128 is larger than high_size 64"),
        ((16, 64, 30), "crop_size 30 is no whole number of low-resolution pixels"),
        ((21, 63, 30), "high_size 63 is not divisible by 2"),
        ((21, 42, 14), None),
    ],
)
def test_upsampler_sizes_that_do_not_fit_are_refused(sizes, message):
    low_size, high_size, crop_size = sizes
    settings = UpsamplerSettings.model_construct(
        low_size=low_size,
        high_size=high_size,
        crop_size=crop_size,
        degradation=Degradation.BLUR,
        network=unet(attention=(False, False)),
    )
    if message is None:
        check_sizes("stage.upsampler", settings)
        return

    with pytest.raises(UserError, match=message):
        check_sizes("stage.upsampler", settings)


def test_the_catalog_imports_no_torch():
    program = "import sys, stages.catalog; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
