"""The stage `judge`: settings and what it gives. Imports no torch."""

from typing import Annotated

from pydantic import Field

from pipeline.config import NotNegativeFloat, Positive, Seed, Settings, TrainingStageSettings
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Better, StageDeclaration


class JudgeDataSettings(Settings):
    """Real pictures that the judge learns from and is measured on: drawn scenes of one object, of all pairs."""

    samples: Positive
    validation_samples: Positive
    image_size: Annotated[Positive, Field(ge=64)]
    seed: Seed
    shard_samples: Positive


class JudgeSettings(TrainingStageSettings):
    """A classifier of drawn scenes: `width` channels, pictures brought to `image_size` pixels.

    It learns to read pictures that were reduced to each of `seen_at` pixels. `max_noise` is the largest standard
    deviation of the Gaussian noise that it learns to look past.
    """

    data: JudgeDataSettings
    image_size: Positive
    seen_at: tuple[Positive, ...]
    width: Positive
    max_noise: NotNegativeFloat


class JudgeNumbers(Numbers):
    """The attributes that it reads, in the order of its labels."""

    attributes: tuple[str, ...]


JUDGE = StageDeclaration(
    version=1,
    settings=JudgeSettings,
    run="stages.judge.train:run",
    rehearse="stages.judge.train:rehearse",
    output="judge",
    numbers=JudgeNumbers,
    better={"*_at_*": Better.HIGH},
)
