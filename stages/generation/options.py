"""What may be asked of a run's networks when pictures are made. Imports no torch."""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import field_validator

from pipeline.config import SEED_LIMIT, Settings, validate
from pipeline.errors import UserError
from stages.decoder.settings import DecoderOptions, DecoderSettings
from stages.diffusion.settings import DiffusionStageSettings, SamplerOptions, SamplerSettings, Solver, check_steps
from stages.prior.settings import PriorOptions, PriorSettings
from stages.upsampler.settings import UpsamplerSettings

KINDS = ("clip", "prior", "decoder", "upsampler")
"""The kinds of stages whose networks make the chain."""

BATCH_SIZE = 16
MAX_COUNT = 100_000


class GenerationOptions(Settings):
    """What a caller may ask for instead of the run's own samplers.

    `upsampler` holds one for each upsampler; the last stands for those that follow, and none keeps their own. Guidance
    leads away from `negative_caption`.
    """

    prior: PriorOptions = PriorOptions()
    decoder: DecoderOptions = DecoderOptions()
    upsampler: tuple[SamplerOptions, ...] = ()
    negative_caption: str = ""

    @field_validator("upsampler", mode="before")
    @classmethod
    def _one_is_for_all(cls, given: Any) -> Any:
        return (given,) if isinstance(given, dict | SamplerOptions) else given

    def of_upsampler(self, place: int) -> SamplerOptions:
        """Those of the upsampler at that place of the chain."""
        return self.upsampler[min(place, len(self.upsampler) - 1)] if self.upsampler else SamplerOptions()

    def check(
        self, prior: PriorSettings | None, decoder: DecoderSettings, upsamplers: Sequence[UpsamplerSettings]
    ) -> None:
        """Raise `UserError` where networks with these settings, the upsamplers in their order, are not sampled so."""
        sampled: list[tuple[str, DiffusionStageSettings, SamplerSettings]] = [
            ("decoder", decoder, self.decoder.over(decoder.sampler)),
            *(("upsampler", each, self.of_upsampler(at).over(each.sampler)) for at, each in enumerate(upsamplers)),
        ]
        if prior is not None:
            sampled.append(("prior", prior, self.prior.over(prior.sampler)))
        for name, settings, sampler in sampled:
            check_steps(f"{name}.steps", settings.schedule, sampler.steps)

    def with_decoder_eta(self, eta: float) -> "GenerationOptions":
        """The same with DDIM's steps of that eta in the decoder: what its inversion is of."""
        decoder = validate(DecoderOptions, {**self.decoder.model_dump(), "solver": Solver.DDIM, "eta": eta}, "decoder")
        return self.model_copy(update={"decoder": decoder})


OWN_SAMPLERS = GenerationOptions()


class Judge(StrEnum):
    """The CLIP that picks the best of several pictures: the run's own, or the one that nothing was fitted to."""

    CLIP = "clip"
    JUDGE_CLIP = "judge_clip"


class Preset(StrEnum):
    """Numbers of steps by name: the paper's (its table 3), or its shorter ones for the decoder alone."""

    PAPER = "paper"
    FAST = "fast"

    @property
    def options(self) -> GenerationOptions:
        """The steps of prior, decoder and upsamplers; a schedule that has fewer timesteps refuses them."""
        decoder_steps = {Preset.PAPER: 250, Preset.FAST: 27}[self]
        return GenerationOptions(
            prior=PriorOptions(steps=64),
            decoder=DecoderOptions(steps=decoder_steps),
            upsampler=(SamplerOptions(steps=27), SamplerOptions(steps=15)),
        )


def require_count(count: int, named: str = "count=") -> None:
    """Raise `UserError` if so many pictures cannot be made; `named` is what stands before the number that was given."""
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"{named}{count} is no number of pictures; give 1 to {MAX_COUNT}")


def require_seed(seed: int, named: str = "seed=") -> None:
    """Raise `UserError` if it is no seed."""
    if not 0 <= seed < SEED_LIMIT:
        raise UserError(f"{named}{seed} is no seed of 64 bits; give 0 to {SEED_LIMIT - 1}")


def require_share(share: float, named: str) -> None:
    """Raise `UserError` if it is not in [0, 1]."""
    if not (math.isfinite(share) and 0.0 <= share <= 1.0):
        raise UserError(f"{named}{share} is no share; give 0 to 1")
