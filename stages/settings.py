"""The settings of every stage, typed. Their defaults are in `conf/stage/` and `conf/model/`. Imports no torch."""

from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import (
    RUNTIME,
    Fraction,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Settings,
    TrainingStageSettings,
)


class PredictionType(StrEnum):
    """What a diffusion network predicts; the values are diffusers' names."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V_PREDICTION = "v_prediction"


class ScheduleKind(StrEnum):
    """The shape of the cumulative noise schedule alpha_bar."""

    COSINE = "cosine"
    LINEAR = "linear"


class ScheduleSettings(Settings):
    """The forward process: how much noise each timestep holds."""

    kind: ScheduleKind
    timesteps: Positive
    zero_terminal_snr: bool


class ObjectiveSettings(Settings):
    """What the network is trained to predict, and how timesteps are weighted."""

    prediction_type: PredictionType
    min_snr_gamma: PositiveFloat | None


class SamplerSettings(Settings):
    """Defaults of the reverse process: DDIM with `eta` (1 is ancestral sampling, 0 is deterministic)."""

    steps: Positive
    eta: Fraction
    guidance_scale: NotNegativeFloat


DEFAULT_CAPTION = "txt"

# --- prepare ---------------------------------------------------------------------------------------------------------


class SourceSettings(Settings):
    """What every source of captioned pictures has."""

    split_key: str
    validation_fraction: Fraction


class ScenesSettings(SourceSettings):
    """Pictures drawn at run time: one or two coloured shapes on a background, captioned in several phrasings."""

    source: Literal["scenes"]
    samples: Positive
    unseen_samples: NotNegative
    image_size: Annotated[Positive, Field(ge=64)]
    two_objects_share: Fraction
    seed: Seed
    shard_samples: Positive


class EmojiSettings(SourceSettings):
    """Twemoji pictures with the names that the Unicode consortium gives them (pictures CC-BY 4.0)."""

    source: Literal["emoji"]
    languages: tuple[str, ...]
    max_glyphs: Positive | None
    sequences: bool
    image_size: Positive
    background: str
    shard_samples: Positive


class WebDatasetSettings(SourceSettings):
    """The user's own shards: directories, brace patterns or URLs, as img2dataset writes them.

    `weights` say how often an epoch shows the samples of each of `shards`. `caption` is the extension of the captions'
    files, or `json:field`; `captions` are several of these, with the weights by which one is drawn at each showing.
    `index_dir` is where the index is, if not beside the shards. Remote shards are kept in `cache_dir` once they were
    read, at most `cache_gib` of them.
    """

    source: Literal["webdataset"]
    shards: Annotated[str | tuple[str, ...], RUNTIME]
    weights: tuple[Annotated[Decimal, Field(gt=0, le=1000, allow_inf_nan=False)], ...] | None
    caption: str
    captions: dict[str, Annotated[PositiveFloat, Field(le=1e6)]] | None
    index_dir: Annotated[Path | None, RUNTIME]
    allow_shell_urls: Annotated[bool, RUNTIME]
    cache_dir: Annotated[Path, RUNTIME]
    cache_gib: Annotated[PositiveFloat | None, RUNTIME]

    @model_validator(mode="after")
    def _is_said_once(self) -> Self:
        if self.captions is not None and self.caption != DEFAULT_CAPTION:
            raise ValueError(
                f"data.caption={self.caption} and data.captions={self.captions} both say where captions are; set one"
            )
        if self.captions is not None and not self.captions:
            raise ValueError("data.captions={} names none; give for example 'data.captions={txt: 1}'")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(
                f"data.weights has {len(self.weights)} entries for {len(self.parts)} parts of data.shards; give one "
                "each, as in 'data.shards=[/data/a,/data/b]' 'data.weights=[1,0.5]'"
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The directories, patterns and URLs that `shards` names."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards

    @property
    def caption_weights(self) -> dict[str, float]:
        """Where captions are, with weights."""
        return self.captions if self.captions is not None else {self.caption: 1.0}


DataSettings = Annotated[ScenesSettings | EmojiSettings | WebDatasetSettings, Field(discriminator="source")]


class PrepareSettings(Settings):
    """Makes or takes in the shards, and splits their samples."""

    data: DataSettings


# --- clip, embed -----------------------------------------------------------------------------------------------------


class ContrastiveLoss(StrEnum):
    """CLIP's softmax loss or SigLIP's sigmoid loss; both are open_clip's."""

    CONTRASTIVE = "contrastive"
    SIGLIP = "siglip"


class ClipNetworkSettings(Settings):
    """An open_clip ViT and its text transformer. `diffusers` needs text_width == embed_dim.

    `initial_position_gain` multiplies the positional embeddings with which open_clip begins. A short training that
    begins with weak ones learns what is in a picture long before it learns where.
    """

    embed_dim: Positive
    image_size: Positive
    patch_size: Positive
    vision_width: Positive
    vision_layers: Positive
    vision_heads: Positive
    text_width: Positive
    text_layers: Positive
    text_heads: Positive
    context_length: Positive
    quick_gelu: bool
    initial_position_gain: PositiveFloat


class ClipSettings(TrainingStageSettings):
    """CLIP, trained here, started from a local open_clip checkpoint, or (`max_samples: 0`) replaced by it."""

    network: ClipNetworkSettings
    loss: ContrastiveLoss
    checkpoint: Annotated[Path | None, RUNTIME]  # counted by its contents


class EmbedSettings(Settings):
    """Image and text embeddings of every sample, as CLIP's projections give them (not normalised)."""

    batch_size: Annotated[Positive, RUNTIME]
    part_samples: Annotated[Positive, RUNTIME]


# --- prior -----------------------------------------------------------------------------------------------------------


class PriorNetworkSettings(Settings):
    """diffusers' `PriorTransformer`; its width is heads x head_dim."""

    layers: Positive
    heads: Positive
    head_dim: Positive


class PriorSamplerSettings(SamplerSettings):
    """`candidates` image embeddings are drawn and the one closest to the text embedding is kept (the paper: 2)."""

    candidates: Positive
    clip_sample_range: PositiveFloat


class PriorSettings(TrainingStageSettings):
    """p(z_i | caption): predicts the whitened image embedding by mean squared error."""

    network: PriorNetworkSettings
    schedule: ScheduleSettings
    objective: ObjectiveSettings
    caption_dropout: Fraction
    sampler: PriorSamplerSettings


# --- decoder ---------------------------------------------------------------------------------------------------------


class DecoderCondition(StrEnum):
    """Which CLIP embedding conditions the decoder: the image's (unCLIP) or the caption's (GLIDE-like, no prior)."""

    IMAGE_EMBED = "image_embed"
    TEXT_EMBED = "text_embed"


class UNetSettings(Settings):
    """A diffusers U-Net: `channels` per resolution level, each level half the size of the one before."""

    channels: tuple[Positive, ...]
    layers_per_block: Positive
    attention: tuple[bool, ...]
    attention_head_dim: Positive
    norm_groups: Positive
    dropout: Fraction


class ClipLossSettings(Settings):
    """L_clip = E[-w(t) sim(x0_hat, caption)], weighted by lambda (`weight`). Zero loads no image tower.

    `timestep_power` p gives w(t) = alpha_bar_t^p: x0_hat means little at high noise. `sample_share` is the probability
    that a sample carries the loss (the rest are made up for, so that its mean stays).
    """

    weight: NotNegativeFloat
    timestep_power: NotNegativeFloat
    sample_share: Annotated[Fraction, Field(gt=0.0)]


class DecoderSamplerSettings(SamplerSettings):
    """`clip_guidance_scale` scales the gradient of sim(x0_hat, caption) at every step; 0 is off."""

    clip_guidance_scale: NotNegativeFloat


class DecoderSettings(TrainingStageSettings):
    """L = L_diffusion + lambda L_clip on CLIP's embedding and the caption's tokens."""

    image_size: Positive
    condition: DecoderCondition
    network: UNetSettings
    schedule: ScheduleSettings
    objective: ObjectiveSettings
    clip_loss: ClipLossSettings
    caption_dropout: Fraction
    image_embed_dropout: Fraction
    sampler: DecoderSamplerSettings


# --- upsampler -------------------------------------------------------------------------------------------------------


class Degradation(StrEnum):
    """How the condition is degraded in training: Gaussian blur (unCLIP's first upsampler) or BSR-style (its second)."""

    BLUR = "blur"
    BSR = "bsr"


class UpsamplerSettings(TrainingStageSettings):
    """Diffusion from `low_size` to `high_size`, trained on random crops of `crop_size` at the high resolution."""

    low_size: Positive
    high_size: Positive
    crop_size: Positive
    degradation: Degradation
    network: UNetSettings
    schedule: ScheduleSettings
    objective: ObjectiveSettings
    sampler: SamplerSettings


# --- judge, evaluate, export -----------------------------------------------------------------------------------------


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


class EvaluateSettings(Settings):
    """How good a run is, on held-out pictures and captions.

    `samples` pictures are made from validation captions, and `judged_samples` more from captions of one fully described
    object for each kind of pairs, seen and never seen, where there is a judge.
    """

    retrieval_pool: Positive
    retrieval_samples: Positive
    samples: Positive
    judged_samples: Positive
    grid_captions: Positive
    batch_size: Annotated[Positive, RUNTIME]


class ExportSettings(Settings):
    """Gathers a run's weights and configs in one directory; unCLIP runs load in diffusers' stock `UnCLIPPipeline`."""

    include_clip_image_tower: bool
