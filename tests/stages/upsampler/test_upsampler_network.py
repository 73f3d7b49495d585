import pytest
import torch
from torch.nn import functional as F

from pipeline.errors import UserError
from stages.pictures import resize
from stages.unet import UNetSettings
from stages.upsampler.network import build_upsampler, denoise_upsampler
from stages.upsampler.settings import Degradation, UpsamplerSettings, check_sizes

UNET = UNetSettings(
    channels=(16, 32), layers_per_block=1, attention=(False, True), attention_head_dim=8, norm_groups=8, dropout=0.0
)


UPSAMPLER = UNET.model_copy(update={"attention": (False, False)})


def without_gradient(network):
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


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
        network=UPSAMPLER,
    )
    if message is None:
        check_sizes("stage.upsampler", settings)
        return

    with pytest.raises(UserError, match=message):
        check_sizes("stage.upsampler", settings)
