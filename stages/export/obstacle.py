"""What diffusers' stock pipelines cannot hold, known from settings alone. Imports no torch."""

from collections.abc import Sequence

from pipeline.workflow.declaration import Workflow
from stages.clip.settings import ClipNetwork, ClipSettings, OpenClipNetworkSettings
from stages.decoder.networks.unet import UNetDecoderSettings
from stages.decoder.settings import DecoderCondition, DecoderSettings
from stages.diffusion.settings import PredictionType, ScheduleKind
from stages.prior.settings import PriorSettings
from stages.upsampler.settings import UpsamplerSettings


def obstacle(
    prior: PriorSettings | None,
    decoder: DecoderSettings,
    upsamplers: Sequence[UpsamplerSettings],
    clip: ClipNetwork | None = None,
) -> str | None:
    """Why the stock pipelines cannot hold networks of these settings; None if they can.

    Of the upsamplers, the one that continues from the decoder has a place in them; others do not matter.
    """
    if prior is None or decoder.condition is not DecoderCondition.IMAGE_EMBED:
        return "it needs a prior, and a decoder on image embeddings"
    if isinstance(clip, OpenClipNetworkSettings):
        return "its CLIP is a ViT and a causal text transformer, and this one has other towers"
    if clip is not None and clip.text_width != clip.embed_dim:
        return f"its CLIP's token states are as wide as its embeddings, here {clip.text_width} and {clip.embed_dim}"
    if not isinstance(decoder.network, UNetDecoderSettings):
        return "its decoder is a U-Net, and this one is another network"
    upsampler = next((each for each in upsamplers if each.low_size == decoder.image_size), None)
    if upsampler is None:
        return "it needs an upsampler"
    for name, settings in (("prior", prior), ("decoder", decoder), ("upsampler", upsampler)):
        if settings.schedule.kind is not ScheduleKind.COSINE or settings.schedule.zero_terminal_snr:
            return f"its scheduler knows the cosine schedule alone, and that of the {name} is another"
        if settings.objective.prediction_type is PredictionType.V_PREDICTION:
            return f"its scheduler knows no v_prediction, and the {name} predicts v"
    return None


def obstacle_of(workflow: Workflow) -> str | None:
    """The same of a workflow that is only planned; None too where there is nothing to judge."""
    decoder = next(iter(workflow.of(DecoderSettings).values()), None)
    if decoder is None:
        return None
    prior = next(iter(workflow.of(PriorSettings).values()), None)
    clip = next((each.settings for each in workflow.stages.values() if each.kind == "clip"), None)
    towers = clip.network if isinstance(clip, ClipSettings) else None
    return obstacle(prior, decoder, list(workflow.of(UpsamplerSettings).values()), towers)
