"""The batch that every stage reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.data.decode import DecodeFault
from pipeline.data.draws import SampleDraws


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Captioned pictures, B of them, S pixels wide and high.

    `sample` is the row in the index, `sample_seed` the seed of what the sample draws in this epoch (see `SampleDraws`):
    both stay on the CPU, where they are looked up and drawn from, whatever device the pictures are on. `faults` counts
    the samples that are shown in the place of one that cannot be used. `tokens` and `normals` are what the stage has
    the loader make ahead (`MadeAhead`): the captions as a text tower takes them, and normal draws by purpose.
    """

    image: Tensor  # uint8 [B, 3, S, S], RGB
    caption: tuple[str, ...]  # B captions
    sample: Tensor  # int64 [B]
    sample_seed: Tensor  # int64 [B]
    faults: Mapping[DecodeFault, int] = field(default_factory=dict)
    tokens: Tensor | None = None  # int64 [B, L]
    normals: Mapping[str, Tensor] = field(default_factory=dict)  # float32 [B, ...]

    def __len__(self) -> int:
        return len(self.caption)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageBatch":
        """The batch with its tensors on another device, but for rows and seeds."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ImageBatch":
        """The batch with its tensors in pinned memory, but for rows and seeds; the DataLoader calls this."""
        return self._with_each(Tensor.pin_memory)

    def split(self, samples: int) -> "list[ImageBatch]":
        """The batch in pieces of `samples`, of which the last may be short; they tell of no faults."""
        places = [slice(start, start + samples) for start in range(0, len(self), samples)]
        return [
            ImageBatch(
                self.image[place],
                self.caption[place],
                self.sample[place],
                self.sample_seed[place],
                tokens=None if self.tokens is None else self.tokens[place],
                normals={purpose: drawn[place] for purpose, drawn in self.normals.items()},
            )
            for place in places
        ]

    def token_ids(self) -> Tensor:
        """The captions' token ids, int64 [B, L], of a stage that gave its loader a tokenizer."""
        assert self.tokens is not None, "the stage gave its loader no tokenizer"
        return self.tokens

    def draws(self) -> SampleDraws:
        """What its samples draw, on the device of the pictures."""
        return SampleDraws(self.sample_seed, self.image.device, self.normals)

    def image_signed(self) -> Tensor:
        """The pictures as networks take them: float32 [B, 3, S, S] in [-1, 1]."""
        return signed(self.image)

    def _with_each(self, moved: Callable[[Tensor], Tensor]) -> "ImageBatch":
        tokens = None if self.tokens is None else moved(self.tokens)
        normals = {purpose: moved(drawn) for purpose, drawn in self.normals.items()}
        return replace(self, image=moved(self.image), tokens=tokens, normals=normals)


def signed(image: Tensor) -> Tensor:
    """Pictures uint8 [..., S, S] as networks take them: float32 [..., S, S] in [-1, 1]."""
    return image.to(torch.float32).div_(127.5).sub_(1.0)
