import pytest

from pipeline.errors import UserError
from stages.clip.settings import ClipNetworkSettings, check_network


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
    ],
)
def test_towers_that_cannot_be_built_are_refused(changes, message):
    check_network("stage.clip.network", clip_network())

    with pytest.raises(UserError, match=r"^stage\.clip\.network\..*" + message):
        check_network("stage.clip.network", clip_network(**changes))
