"""The stage `prior`: settings, what it needs and gives. Imports no torch."""

from pathlib import Path

from pipeline.config import Fraction, Positive, PositiveFloat, Settings
from pipeline.workflow.declaration import Better, ForeignWeights, Input, StageDeclaration, Workflow
from stages.clip.settings import OnClipNumbers, check_initial
from stages.diffusers_folder import DIFFUSERS, labelled, network_folder, of_scheduler, origin, read_config
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


def prior_folder(folder: Path, key: str) -> Path:
    """Where a diffusers pipeline has its prior."""
    return network_folder(folder, ("prior",), "PriorTransformer", key)


def in_folder(folder: Path, key: str) -> ForeignWeights:
    """The prior of a diffusers folder, with the statistics of the embeddings that it was trained on."""
    found = prior_folder(folder, key)
    config = read_config(found)
    network = {
        "layers": config.get("num_layers", 20),
        "heads": config.get("num_attention_heads", 32),
        "head_dim": config.get("attention_head_dim", 64),
    }
    dictated = {"network": network, **of_scheduler(folder, "prior_scheduler")}
    sizes = {"embed_dim": config.get("embedding_dim", 768), "context_length": config.get("num_embeddings", 77)}
    width, embed_dim, context_length = network["heads"] * network["head_dim"], *sizes.values()
    shapes = {
        "proj_in.weight": (width, embed_dim),
        "positional_embedding": (1, context_length + config.get("additional_embeddings", 4), width),
        f"transformer_blocks.{network['layers'] - 1}.attn1.to_q.weight": (width, width),
    }
    return ForeignWeights(labelled({"prior": found}), dictated, sizes, shapes)


def check(path: str, settings: PriorSettings, workflow: Workflow) -> None:
    """Schedule, objective and sampler fit each other, and there is something to train, or weights in its place."""
    check_diffusion(path, settings, settings.sampler)
    check_initial(path, settings, workflow)


PRIOR = StageDeclaration(
    version=1,
    settings=PriorSettings,
    run="stages.prior.train:run",
    rehearse="stages.prior.train:rehearse",
    output="prior",
    inputs=(Input("data"), Input("clip"), Input("embeddings")),
    numbers=OnClipNumbers,
    check=check,
    inherits=("network", "objective.prediction_type", "schedule"),
    foreign={DIFFUSERS: in_folder},
    origin=origin,
    better={"cosine_to_image": Better.HIGH},
)
