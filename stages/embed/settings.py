"""The stage `embed`: settings, what it needs and gives. Imports no torch."""

from typing import Annotated

from pipeline.config import RUNTIME, Positive, Settings
from pipeline.workflow.declaration import Input, StageDeclaration
from stages.clip.settings import OnClipNumbers


class EmbedSettings(Settings):
    """Image and text embeddings of every sample, as CLIP's projections give them (not normalised)."""

    batch_size: Annotated[Positive, RUNTIME]
    part_samples: Annotated[Positive, RUNTIME]


class EmbedNumbers(OnClipNumbers):
    """Which CLIP's embeddings these are, their width, and how many."""

    samples: int


EMBED = StageDeclaration(
    version=1,
    settings=EmbedSettings,
    run="stages.embed.run:run",
    rehearse="stages.embed.run:rehearse",
    output="embeddings",
    inputs=(Input("data"), Input("clip")),
    numbers=EmbedNumbers,
)
