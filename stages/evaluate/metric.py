"""What a metric of made pictures is. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Made:
    """Pictures made from B validation captions beside the real ones, float32 in [-1, 1]."""

    captions: tuple[str, ...]
    real: "Tensor"  # [B, 3, S, S]
    base: "Tensor"  # [B, 3, s, s], from the decoder
    final: "Tensor"  # [B, 3, S, S], after the upsamplers


@dataclass(frozen=True, eq=False)
class InClip:
    """Embeddings of N captions, real pictures and those made, in one CLIP: float32 [N, E] each, of length 1."""

    text: "Tensor"
    real: "Tensor"
    made: "Tensor"


@dataclass(frozen=True, eq=False)
class Embeds:
    """The embeddings of all pictures that were made: `sampled` are the prior's, not normalised, None without one.

    `in_clip` has those in the run's own CLIP under "", and those in the one that nothing was fitted to under
    "judge_clip/", where there is one. `retrieval_pool` is the stage's setting.
    """

    in_clip: Mapping[str, InClip]
    sampled: "Tensor | None"  # float32 [N, E]
    retrieval_pool: int


class Metric(ABC):
    """A metric of made pictures. The module of each in `metrics/` defines one, `METRIC`.

    Planning reads these modules too, so they import torch inside of functions alone. `better` says which way results
    improve, by shell patterns of their names.
    """

    better: ClassVar[Mapping[str, Better]] = {}

    def add(self, made: Made) -> None:  # noqa: B027 - most metrics have no need of it
        """Take in a batch of pictures, of which nothing else is kept."""

    @abstractmethod
    def results(self, embeds: Embeds) -> dict[str, float]:
        """The metrics of all pictures by name, most telling first; none where they cannot be told."""
