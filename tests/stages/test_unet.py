import pytest

from pipeline.errors import UserError
from stages.unet import UNetSettings, check_unet


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
