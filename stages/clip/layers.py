"""The order of the layers in CLIP's towers, for a learning rate that decays from layer to layer."""

import re
from collections.abc import Iterable

from pipeline.errors import UserError

_BLOCK = re.compile(r"(?:.*\.)?(?:resblocks|blocks)\.(\d+)\..*")
_BEFORE_THE_BLOCKS = re.compile(
    r"(?:.*\.)?(?:conv1|class_embedding|positional_embedding|token_embedding|ln_pre|patch_embed|cls_token|pos_embed)"
    r"(?:\..*)?"
)
_IMAGE_TOWER = "network.visual."


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """How many layers follow that of each parameter of a `ClipModel` in its tower, as BEiT counts (2106.08254).

    What is before the blocks is one layer below the first of them, and what is after them has none above.
    Raises `UserError` for a tower without numbered blocks.
    """
    names = list(names)
    above: dict[str, int] = {}
    for is_image in (True, False):
        tower = [name for name in names if name.startswith(_IMAGE_TOWER) == is_image]
        numbers = {name: int(found[1]) for name in tower if (found := _BLOCK.fullmatch(name))}
        if not numbers:
            raise UserError(
                "optimizer.layer_decay counts the blocks of transformers, and one of these towers has none; use "
                "optimizer.learning_rate_factors"
            )
        blocks = 1 + max(numbers.values())
        for name in tower:
            if name in numbers:
                above[name] = blocks - numbers[name]
            else:
                above[name] = blocks + 1 if _BEFORE_THE_BLOCKS.fullmatch(name) else 0
    return above
