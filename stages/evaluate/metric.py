"""What a metric of made pictures is. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better, resolve

if TYPE_CHECKING:
    from torch import Tensor

CLIP, JUDGE_CLIP = "clip", "judge_clip"
INCEPTION, DINOV2, OPEN_CLIP = "inception", "dinov2", "open_clip"
OF_FILES = (INCEPTION, DINOV2, OPEN_CLIP)
ENCODERS = (CLIP, JUDGE_CLIP, *OF_FILES)
"""What turns pictures into features: the run's own CLIP, the one that nothing was fitted to, and those of files."""


@dataclass(frozen=True, eq=False)
class Made:
    """Pictures made from B validation captions beside the real ones, float32 in [-1, 1]."""

    captions: tuple[str, ...]
    real: "Tensor"  # [B, 3, S, S]
    base: "Tensor"  # [B, 3, s, s], from the decoder
    final: "Tensor"  # [B, 3, S, S], after the upsamplers


@dataclass(frozen=True, eq=False)
class Features:
    """N real pictures and those made from their captions in one encoder: float32 [N, F] each.

    A CLIP's are of length 1, and it has the captions too, as `text`.
    """

    real: "Tensor"
    made: "Tensor"
    text: "Tensor | None" = None


@dataclass(frozen=True, eq=False)
class Embeds:
    """The features of all pictures that were made, by encoder: `CLIP` always, the others where there is one.

    `sampled` are the prior's embeddings, not normalised, None without one. `retrieval_pool` is the stage's setting.
    """

    by_encoder: Mapping[str, Features]
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
        """The metrics of all pictures by name, most telling first; none where they cannot be told.

        `x_low` and `x_high` are the ends of x's 95 % interval.
        """


class FeatureMetric(Metric):
    """A metric of the features in one encoder: its usual one, or the one after the @ of `name@encoder`.

    In another one than the usual its results are named `encoder/name`.
    """

    usual_encoder: ClassVar[str]

    def __init__(self, encoder: str | None = None) -> None:
        self.encoder = encoder or self.usual_encoder
        self.prefix = "" if self.encoder == self.usual_encoder else f"{self.encoder}/"

    def results(self, embeds: Embeds) -> dict[str, float]:
        """None without the encoder."""
        found = embeds.by_encoder.get(self.encoder)
        return {f"{self.prefix}{name}": value for name, value in (self.of(found) if found else {}).items()}

    @abstractmethod
    def of(self, features: Features) -> dict[str, float]:
        """The results by their plain names."""


class Distance(FeatureMetric):
    """How far the made pictures are from the real ones, with intervals by the jackknife."""

    def of(self, features: Features) -> dict[str, float]:
        """None of fewer than four pictures."""
        from stages.evaluate.estimate import jackknife

        if len(features.real) < 4:
            return {}
        found = jackknife(lambda rows: self.between(features.made[rows], features.real[rows]), len(features.real))
        return {key: value for name, estimate in found.items() for key, value in estimate.named(name).items()}

    @abstractmethod
    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """By name, of features float [N, F] and [M, F]."""


def distance_of(name: str, encoder: str, function: str) -> type[Distance]:
    """A metric called `name` of all made pictures from the real ones of their captions, the lower the better.

    `encoder` is its usual one, `function` the "module:function" of (made, real) -> float, imported when first needed.
    """

    class OneDistance(Distance):
        usual_encoder: ClassVar = encoder
        better: ClassVar = dict.fromkeys((name, f"*/{name}"), Better.LOW)

        def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
            return {name: resolve(function)(made, real)}

    return OneDistance
