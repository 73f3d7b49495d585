"""How well a CLIP finds pictures by captions and captions by pictures."""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def retrieval_recall(image_embed: Tensor, text_embed: Tensor, pool: int) -> dict[str, float]:
    """Recall at 1, 5 and 10 of retrieval in both directions, averaged; in [0, 1]. See `retrieval_hits`."""
    return {name: float(hits.float().mean()) for name, hits in retrieval_hits(image_embed, text_embed, pool).items()}


def retrieval_hits(image_embed: Tensor, text_embed: Tensor, pool: int) -> dict[str, Tensor]:
    """Whether each pair was found among the first 1, 5 and 10, bool [N, 2]: its picture by its caption, and back.

    `image_embed` and `text_embed` float [N, E] are L2-normalised and belong together by row. Once among consecutive
    pools of `pool` rows (the last, smaller one is left out if there are others), as `R@1/64`, and once among all N, as
    `R@1/all`. Equal captions count as misses of each other.
    """
    samples = len(image_embed)
    size = min(pool, samples)
    pools = samples // size
    shape = (pools, size, -1)
    pooled_ranks = _ranks(image_embed[: pools * size].reshape(shape), text_embed[: pools * size].reshape(shape))
    all_ranks = _ranks(image_embed[None], text_embed[None])
    ranks = {str(size): pooled_ranks.flatten(1).T, "all": all_ranks.flatten(1).T}
    return {f"R@{at}/{among}": found < at for among, found in ranks.items() for at in RECALL_AT}


def _ranks(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """How many wrong candidates are at least as similar as the right one; [P, N, E] twice -> int64 [2, P, N]."""
    similarity = text_embed @ image_embed.transpose(1, 2)
    right = similarity.diagonal(dim1=1, dim2=2)
    text_to_image = (similarity >= right[:, :, None]).sum(2) - 1
    image_to_text = (similarity >= right[:, None, :]).sum(1) - 1
    return torch.stack([text_to_image, image_to_text])
