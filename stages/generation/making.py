"""From recipes to pictures, a batch at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from stages.generation import editing
from stages.generation.grid import to_pil
from stages.generation.picture import Operation, Recipe
from stages.generation.text_to_image import Generated, TextToImage

Make = Callable[[Sequence[Recipe]], Generated]
"""Recipes of one batch -> their pictures."""


def make(chain: TextToImage, recipes: Sequence[Recipe], sources: Tensor, batch_size: int) -> Iterator[Image.Image]:
    """The pictures of recipes that differ in captions, seed and share alone, `batch_size` at a time.

    `sources` are the pictures that they are made from, float32 [N, 3, S, S] in [-1, 1], on the chain's device.

    Raises:
        UserError: guidance was so strong that no numbers are left.
    """
    make_batch = _maker(chain, recipes[0], sources)
    for first in range(0, len(recipes), batch_size):
        pictures = make_batch(recipes[first : first + batch_size]).final
        if not pictures.isfinite().all():
            raise UserError("what the networks drew is not finite; give smaller scales of guidance")
        yield from map(to_pil, pictures)


def evaluations(chain: TextToImage, recipe: Recipe) -> tuple[int, int]:
    """How often networks are evaluated at first, for what pictures are made from, and then for each batch."""
    options = recipe.options
    prior = 0
    if chain.prior is not None and recipe.operation in _BY_THE_PRIOR:
        sampler = options.prior.over(chain.prior.settings.sampler)
        prior = sampler.steps
    decoder = options.decoder.over(chain.decoder.settings.sampler).steps
    upsamplers = sum(
        options.of_upsampler(place).over(each.settings.sampler).steps for place, each in enumerate(chain.upsamplers)
    )
    by_inversion = {Operation.VARIATION: 1, Operation.TEXT_DIFF: 1, Operation.INTERPOLATION: 2}
    inverted = by_inversion.get(recipe.operation, 0)
    by_caption = 2 if recipe.operation is Operation.CAPTION_INTERPOLATION else 0
    each = 0 if by_caption else prior
    return inverted * decoder + by_caption * prior, each + round(recipe.strength * decoder) + upsamplers


_BY_THE_PRIOR = (
    Operation.TEXT_TO_IMAGE,
    Operation.CAPTION_INTERPOLATION,
    Operation.INPAINTING,
    Operation.IMAGE_TO_IMAGE,
)


def _maker(chain: TextToImage, recipe: Recipe, sources: Tensor) -> Make:
    """What makes batches of such recipes; what all of them need is computed here, once."""
    options = recipe.options
    match recipe.operation:
        case Operation.TEXT_TO_IMAGE:
            return lambda batch: chain.generate(_captions(batch), _seeds(batch), options)
        case Operation.VARIATION:
            latents = editing.encode(chain, sources, options.with_decoder_eta(0.0))
            return lambda batch: editing.decode(chain, latents.expand(len(batch)), _seeds(batch), options)
        case Operation.INTERPOLATION:
            ends = [editing.encode(chain, source[None], options) for source in sources]
            return _between(chain, ends, recipe)
        case Operation.CAPTION_INTERPOLATION:
            first, second = recipe.captions
            # Of one seed both would begin with one noise, and nothing would be left to interpolate.
            seeds = recipe.seed, recipe.seed ^ 1
            ends = [
                editing.caption_latents(chain, caption, seed, options)
                for caption, seed in zip((first, second), seeds, strict=True)
            ]
            return _between(chain, ends, recipe)
        case Operation.TEXT_DIFF:
            source, target = recipe.captions
            latents = editing.encode(chain, sources, options)

            def turn(batch: Sequence[Recipe]) -> Generated:
                turned = editing.text_diff(chain, latents.image_embed, source, target, _shares(batch, chain))
                same_noise = latents.expand(len(batch)).x_T
                return editing.decode(chain, editing.Latents(turned, same_noise), _seeds(batch), options)

            return turn
        case Operation.INPAINTING:
            image, is_drawn = sources[:1], (sources[1:].mean(1, keepdim=True) > 0.0)
            return lambda batch: editing.inpaint(chain, image, is_drawn, _captions(batch), _seeds(batch), options)
        case Operation.IMAGE_TO_IMAGE:
            return lambda batch: editing.image_to_image(
                chain, sources, _captions(batch), _seeds(batch), recipe.strength, options
            )


def _between(chain: TextToImage, ends: Sequence[editing.Latents], recipe: Recipe) -> Make:
    first, second = ends

    def at_shares(batch: Sequence[Recipe]) -> Generated:
        latents = editing.interpolate(first, second, _shares(batch, chain), recipe.noise)
        return editing.decode(chain, latents, _seeds(batch), recipe.options)

    return at_shares


def _captions(batch: Sequence[Recipe]) -> list[str]:
    return [caption for recipe in batch for caption in recipe.captions]


def _seeds(batch: Sequence[Recipe]) -> list[int]:
    return [recipe.seed for recipe in batch]


def _shares(batch: Sequence[Recipe], chain: TextToImage) -> Tensor:
    return torch.tensor([recipe.share for recipe in batch], device=chain.device)
