"""From artifacts to networks. A network that does not fit the CLIP beside it is refused."""

from pathlib import Path

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import validate
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact
from stages.clip.network import ClipModel, Towers
from stages.decoder.network import Decoder
from stages.embed.embeddings import Embeddings, load_embeddings
from stages.judge.network import Judge, build_judge
from stages.prior.network import build_prior
from stages.settings import DecoderSettings, JudgeSettings, PriorSettings, UpsamplerSettings
from stages.upsampler.network import build_upsampler

WEIGHTS_FILE = "weights.safetensors"
CPU = torch.device("cpu")


def save_weights(network: nn.Module, directory: Path) -> None:
    """Write a network's weights; its settings are in the manifest."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)


def require_same_clip(artifact: Artifact, clip: Artifact) -> None:
    """Raise `UserError` unless `artifact` was made with that CLIP."""
    its_own, here = artifact.numbers["clip"], clip.manifest.fingerprint
    if artifact.numbers["embed_dim"] != clip.numbers["embed_dim"]:
        raise UserError(
            f"{artifact.path} works on embeddings of width {artifact.numbers['embed_dim']} and {clip.path} gives "
            f"{clip.numbers['embed_dim']}; train stage {artifact.manifest.stage} on that CLIP"
        )
    if its_own != here:
        raise UserError(
            f"{artifact.path} was made with the CLIP {its_own[:12]}, not with {here[:12]}; "
            f"train stage {artifact.manifest.stage} on that CLIP"
        )


def clip_numbers(clip: Artifact) -> dict[str, object]:
    """What a network that works on a CLIP's embeddings says of it in its manifest."""
    return {"clip": clip.manifest.fingerprint, "embed_dim": clip.numbers["embed_dim"]}


def load_clip(artifact: Artifact, towers: Towers = Towers.BOTH, device: torch.device = CPU) -> ClipModel:
    """The CLIP of an artifact."""
    return ClipModel.load(artifact.path, towers).to(device).eval()


def load_clip_embeddings(artifact: Artifact, clip: Artifact) -> Embeddings:
    """The embeddings of an artifact, which must be that CLIP's."""
    require_same_clip(artifact, clip)
    return load_embeddings(artifact.path)


def load_prior(artifact: Artifact, clip: Artifact, device: torch.device = CPU) -> PriorTransformer:
    """The prior of an artifact, with the statistics of its embeddings in it."""
    require_same_clip(artifact, clip)
    settings = prior_settings(artifact)
    prior = build_prior(settings.network, clip.numbers["embed_dim"], clip.numbers["context_length"])
    _load(prior, artifact.path, device)
    return prior


def load_decoder(artifact: Artifact, clip: Artifact, device: torch.device = CPU) -> Decoder:
    """The decoder of an artifact."""
    require_same_clip(artifact, clip)
    settings = decoder_settings(artifact)
    decoder = Decoder(settings.network, settings.image_size, clip.numbers["embed_dim"])
    _load(decoder, artifact.path, device)
    return decoder


def load_upsampler(artifact: Artifact, device: torch.device = CPU) -> UNet2DModel:
    """The upsampler of an artifact."""
    settings = upsampler_settings(artifact)
    upsampler = build_upsampler(settings.network, settings.high_size)
    _load(upsampler, artifact.path, device)
    return upsampler


def load_judge(artifact: Artifact, device: torch.device = CPU) -> Judge:
    """The judge of an artifact."""
    judge = build_judge(validate(JudgeSettings, artifact.manifest.config, str(artifact.path)))
    _load(judge, artifact.path, device)
    return judge


def prior_settings(artifact: Artifact) -> PriorSettings:
    """The settings that a prior was trained with."""
    return validate(PriorSettings, artifact.manifest.config, str(artifact.path))


def decoder_settings(artifact: Artifact) -> DecoderSettings:
    """The settings that a decoder was trained with."""
    return validate(DecoderSettings, artifact.manifest.config, str(artifact.path))


def upsampler_settings(artifact: Artifact) -> UpsamplerSettings:
    """The settings that an upsampler was trained with."""
    return validate(UpsamplerSettings, artifact.manifest.config, str(artifact.path))


def _load(network: nn.Module, directory: Path, device: torch.device) -> None:
    network.load_state_dict(load_file(directory / WEIGHTS_FILE))
    network.to(device=device).eval()
