"""The stage `prior`: settings, what it needs and gives. Imports no torch."""

from pipeline.config import Fraction, Positive, PositiveFloat, Settings
from pipeline.workflow.declaration import Better, Input, StageDeclaration
from stages.clip.settings import OnClipNumbers
from stages.diffusion.settings import DiffusionStageSettings, SamplerOptions, SamplerSettings, check_diffusion


class PriorNetworkSettings(Settings):
    """diffusers' `PriorTransformer`; its width is heads x head_dim."""

    layers: Positive
    heads: Positive
    head_dim: Positive


class PriorSamplerSettings(SamplerSettings):
    """`candidates` image embeddings are drawn and the one closest to the text embedding is kept (the paper: 2)."""

    candidates: Positive
    clip_sample_range: PositiveFloat


class PriorOptions(SamplerOptions):
    """What may be asked for instead of `PriorSamplerSettings`; None keeps those."""

    candidates: Positive | None = None


class PriorSettings(DiffusionStageSettings):
    """p(z_i | caption): predicts the whitened image embedding by mean squared error."""

    network: PriorNetworkSettings
    caption_dropout: Fraction
    sampler: PriorSamplerSettings


PRIOR = StageDeclaration(
    version=1,
    settings=PriorSettings,
    run="stages.prior.train:run",
    rehearse="stages.prior.train:rehearse",
    output="prior",
    inputs=(Input("data"), Input("clip"), Input("embeddings")),
    numbers=OnClipNumbers,
    check=lambda path, settings, _workflow: check_diffusion(path, settings, settings.sampler),
    better={"cosine_to_image": Better.HIGH},
)
