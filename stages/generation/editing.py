"""What the image embedding z_i and the noise x_T of a picture are good for (unCLIP, section 3), and edits of a part.

Every function takes pictures float32 [B, 3, S, S] in [-1, 1] at the chain's final size, and makes as many or more of
that size. Seeds are those of what is drawn; equal ones give equal noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.draws import SampleDraws
from stages.captions import NO_CAPTION
from stages.clip.network import TextEncoding
from stages.decoder.network import Condition
from stages.decoder.sample import Beginning
from stages.generation.options import GenerationOptions
from stages.generation.picture import Noise
from stages.generation.text_to_image import Generated, TextToImage
from stages.pictures import resize


@dataclass(frozen=True, eq=False)
class Latents:
    """A picture as unCLIP has it: z_i [B, E], not normalised, and x_T [B, 3, s, s] of the decoder."""

    image_embed: Tensor
    x_T: Tensor  # noqa: N815 (the paper's symbol)

    def expand(self, count: int) -> "Latents":
        """Those of one picture, `count` times."""
        return Latents(self.image_embed.expand(count, -1), self.x_T.expand(count, -1, -1, -1))


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation of vectors float [1, D], at shares [N] of the way: float [N, D] (unCLIP, section 3.2).

    Lengths are interpolated too. Opposite and parallel vectors are mixed in a straight line.
    """
    share = share[:, None]
    angle = torch.acos(F.cosine_similarity(first, second, dim=-1).clamp(-1.0, 1.0))[..., None]
    direct = F.normalize(first, dim=-1) * (1 - share) + F.normalize(second, dim=-1) * share
    round_ = (
        F.normalize(first, dim=-1) * torch.sin((1 - share) * angle)
        + F.normalize(second, dim=-1) * torch.sin(share * angle)
    ) / torch.sin(angle)
    length = first.norm(dim=-1, keepdim=True) * (1 - share) + second.norm(dim=-1, keepdim=True) * share
    return length * torch.where(torch.sin(angle) < _PARALLEL, direct, round_)


_PARALLEL = 1e-4


@torch.no_grad()
def encode(chain: TextToImage, image: Tensor, options: GenerationOptions) -> Latents:
    """z_i by CLIP and x_T by DDIM inversion of the decoder, without a caption."""
    image_embed = chain.clip.encode_image(image).float()
    condition = Condition(image_embed, _no_caption(chain, len(image)))
    low = resize(image, chain.decoder.settings.image_size)
    return Latents(image_embed, chain.decoder.invert(condition, low, options.decoder, options.negative_caption))


@torch.no_grad()
def decode(chain: TextToImage, latents: Latents, seeds: Sequence[int], options: GenerationOptions) -> Generated:
    """Pictures of B latents. With the decoder's eta = 0 they are what `encode` took; more spreads them out."""
    return chain.draw(
        latents.image_embed,
        _no_caption(chain, len(seeds)),
        _draws(chain, seeds),
        options,
        Beginning(x_T=latents.x_T),
    )


def interpolate(first: Latents, second: Latents, share: Tensor, noise: Noise) -> Latents:
    """The latents on the way from one picture to another, at shares [N] of it (unCLIP, section 3.2)."""
    image_embed = slerp(first.image_embed, second.image_embed, share)
    if noise is Noise.FIXED:
        return Latents(image_embed, first.x_T.expand(len(share), -1, -1, -1))
    mixed = slerp(first.x_T.flatten(1), second.x_T.flatten(1), share)
    return Latents(image_embed, mixed.unflatten(1, first.x_T.shape[1:]))


@torch.no_grad()
def caption_latents(chain: TextToImage, caption: str, seed: int, options: GenerationOptions) -> Latents:
    """z_i of one caption by the prior, and noise x_T, as `seed` draws them."""
    draws = _draws(chain, [seed])
    image_embed = chain.image_embed(chain.captions.encode([caption]), draws, options)
    size = chain.decoder.settings.image_size
    return Latents(image_embed, draws.normal("decoder", (3, size, size)))


@torch.no_grad()
def text_diff(chain: TextToImage, image_embed: Tensor, source: str, target: str, share: Tensor) -> Tensor:
    """z_i [1, E] turned along z_d = z_t(target) - z_t(source) by shares [N] of the way to it: float [N, E] (unCLIP,
    section 3.3; the paper goes to 0.25 to 0.5)."""
    text = chain.captions.encode([target, source]).embed.float()
    direction = F.normalize(text[:1], dim=-1) - F.normalize(text[1:], dim=-1)
    # As long as z_i is, so that turning keeps its length.
    direction = F.normalize(direction, dim=-1) * image_embed.norm(dim=-1, keepdim=True)
    return slerp(image_embed, direction, share)


@torch.no_grad()
def inpaint(
    chain: TextToImage,
    image: Tensor,
    unknown: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    options: GenerationOptions,
) -> Generated:
    """Pictures [B] for captions, in which `image` stays where `unknown` bool [B, 1, S, S] is false, exactly.

    At every step of the decoder and of the upsamplers what is known of x_0 takes the place of what was predicted. A
    pixel of a small picture is known where all of it is.
    """
    draws, text = _draws(chain, seeds), chain.captions.encode(captions)

    def known(x_0: Tensor) -> Tensor:
        size = x_0.shape[-1]
        hidden = F.adaptive_max_pool2d(unknown.to(x_0), size) if size < unknown.shape[-1] else unknown.to(x_0)
        return torch.where(hidden > 0, x_0, resize(image, size) if size != image.shape[-1] else image)

    image_embed = chain.image_embed(text, draws, options)
    return chain.draw(image_embed, text, draws, options, Beginning(known=known), known)


@torch.no_grad()
def image_to_image(
    chain: TextToImage,
    image: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    strength: float,
    options: GenerationOptions,
) -> Generated:
    """Pictures for captions that are begun from `image` under noise, a `strength` in (0, 1] of the decoder's steps from
    the end (arXiv 2108.01073)."""
    draws, text = _draws(chain, seeds), chain.captions.encode(captions)
    beginning = Beginning(image=resize(image, chain.decoder.settings.image_size), strength=strength)
    return chain.draw(chain.image_embed(text, draws, options), text, draws, options, beginning)


def _no_caption(chain: TextToImage, count: int) -> TextEncoding:
    return chain.captions.encode_all_as(NO_CAPTION, count)


def _draws(chain: TextToImage, seeds: Sequence[int]) -> SampleDraws:
    return SampleDraws(torch.tensor(list(seeds), dtype=torch.int64), chain.device)
