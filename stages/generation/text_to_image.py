"""The whole chain of one run: caption, text embedding, prior, decoder, upsamplers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.draws import SampleDraws
from pipeline.errors import UserError
from pipeline.forecast.rehearsal import Rehearsal
from pipeline.workflow.artifacts import Artifact
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, TextEncoding, load_clip
from stages.clip.settings import ClipSettings
from stages.decoder.network import Condition, build_decoder, load_decoder
from stages.decoder.sample import FROM_NOISE, Beginning, DecoderSampler
from stages.decoder.settings import DecoderCondition, DecoderSettings
from stages.diffusion.sampler import Constrain, NetworkSampler
from stages.generation.options import KINDS, GenerationOptions
from stages.prior.network import build_prior, load_prior
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorSettings
from stages.upsampler.network import build_upsampler, load_upsampler
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerNumbers, UpsamplerSettings


@dataclass(frozen=True)
class Generated:
    """Pictures float32 in [-1, 1]: `base` [B, 3, s, s] from the decoder, `final` [B, 3, S, S] after the upsamplers."""

    image_embed: Tensor  # float32 [B, E], what the decoder was conditioned on
    base: Tensor
    final: Tensor


@dataclass(frozen=True)
class TextToImage:
    """The networks of one run, chained. What is drawn for a picture follows from its seed alone."""

    clip: ClipModel
    prior: PriorSampler | None
    decoder: DecoderSampler
    upsamplers: Sequence[UpsamplerSampler]

    @property
    def captions(self) -> CaptionEncoder:
        """Captions through the run's CLIP."""
        return CaptionEncoder(self.clip)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.clip.pixel_mean.device

    @property
    def samplers(self) -> list[NetworkSampler[Any, Any]]:
        """Those of all its networks, in the order of their work."""
        return [*([self.prior] if self.prior else []), self.decoder, *self.upsamplers]

    @property
    def final_size(self) -> int:
        """The side of its pictures in pixels."""
        return self.upsamplers[-1].settings.high_size if self.upsamplers else self.decoder.settings.image_size

    @torch.no_grad()
    def generate(self, captions: Sequence[str], seeds: Sequence[int], options: GenerationOptions) -> Generated:
        """Pictures for B captions with B seeds; a picture does not depend on the others of its batch."""
        draws = SampleDraws(torch.tensor(list(seeds), dtype=torch.int64), self.device)
        text = self.captions.encode(captions)
        return self.draw(self.image_embed(text, draws, options), text, draws, options)

    @torch.no_grad()
    def image_embed(self, text: TextEncoding, draws: SampleDraws, options: GenerationOptions) -> Tensor:
        """What the decoder is conditioned on for B captions, float32 [B, E]: the prior's, or the captions' own."""
        if self.prior is None:
            return text.embed
        return self.prior.sample(text, draws, options.prior, options.negative_caption)

    @torch.no_grad()
    def draw(
        self,
        image_embed: Tensor,
        text: TextEncoding,
        draws: SampleDraws,
        options: GenerationOptions,
        beginning: Beginning = FROM_NOISE,
        known: Constrain | None = None,
    ) -> Generated:
        """Pictures for embeddings float [B, E] and captions; `known` is what must stay at the upsamplers' sizes."""
        base = self.decoder.sample(
            Condition(image_embed, text), draws, options.decoder, options.negative_caption, beginning
        )
        final = base
        for place, upsampler in enumerate(self.upsamplers):
            final = upsampler.sample(final, draws, options.of_upsampler(place), known)
        return Generated(image_embed, base, final)


def untrained_chain(rehearsal: Rehearsal) -> TextToImage:
    """The networks that a stage's inputs will have, untrained."""
    (clip_stage,), (decoder_stage,), prior_stage = (
        rehearsal.inputs["clip"],
        rehearsal.inputs["decoder"],
        rehearsal.optional_input("prior"),
    )
    towers, decoder_settings = clip_stage.settings_as(ClipSettings).network, decoder_stage.settings_as(DecoderSettings)
    prior_settings = prior_stage.settings_as(PriorSettings) if prior_stage else None
    upsampling = [each.settings_as(UpsamplerSettings) for each in rehearsal.inputs["upsampler"]]
    with rehearsal.building():
        clip = ClipModel(towers)
        prior = build_prior(prior_settings.network, towers.embed_dim, towers.context_length) if prior_settings else None
        decoder = build_decoder(decoder_settings, towers.embed_dim)
        upsamplers = [build_upsampler(each.network, each.high_size) for each in upsampling]
    return TextToImage(
        clip.eval(),
        PriorSampler(prior.eval(), prior_settings, CaptionEncoder(clip)) if prior and prior_settings else None,
        DecoderSampler(decoder.eval(), decoder_settings, clip),
        [UpsamplerSampler(each.eval(), own) for each, own in zip(upsamplers, upsampling, strict=True)],
    )


def in_chain(upsamplers: Sequence[Artifact], base_size: int) -> list[Artifact]:
    """The upsamplers in the order in which they continue from `base_size`."""
    remaining = {each.numbers(UpsamplerNumbers).low_size: each for each in upsamplers}
    chain: list[Artifact] = []
    size = base_size
    while remaining:
        if size not in remaining:
            raise UserError(
                f"no upsampler of the run continues from {size} pixels; those left begin at {list(remaining)}"
            )
        chain.append(remaining.pop(size))
        size = chain[-1].numbers(UpsamplerNumbers).high_size
    return chain


def inputs_by_kind(artifacts: Collection[Artifact]) -> dict[str, tuple[Artifact, ...]]:
    """A run's artifacts as `chain_of_inputs` takes them."""
    return {kind: tuple(each for each in artifacts if each.manifest.kind == kind) for kind in KINDS}


def chain_of_inputs(inputs: Mapping[str, tuple[Artifact, ...]], device: torch.device) -> TextToImage:
    """The networks behind a stage's inputs `clip`, `prior`, `decoder` and `upsampler`.

    Raises:
        UserError: they do not fit each other.
    """
    (clip,), (decoder,), prior = inputs["clip"], inputs["decoder"], next(iter(inputs["prior"]), None)
    model, settings = load_clip(clip, device=device), decoder.settings(DecoderSettings)
    if (settings.condition is DecoderCondition.IMAGE_EMBED) != (prior is not None):
        raise UserError(
            f"{decoder.path} is conditioned on {settings.condition.value} and the run has "
            f"{'a' if prior else 'no'} prior; use the prior of its own workflow"
        )
    captions = CaptionEncoder(model)
    return TextToImage(
        model,
        PriorSampler(load_prior(prior, clip, device), prior.settings(PriorSettings), captions) if prior else None,
        DecoderSampler(load_decoder(decoder, clip, device), settings, model),
        [
            UpsamplerSampler(load_upsampler(each, device), each.settings(UpsamplerSettings))
            for each in in_chain(inputs["upsampler"], settings.image_size)
        ],
    )
