"""CLIP: open_clip's towers, tokenizer and losses. The one door to open_clip."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from pathlib import Path
from typing import Self, cast

import torch
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    build_zero_shot_classifier,
    create_model,
    get_tokenizer,
)
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.weights import require_fit
from stages.clip.files import read_clip_weights
from stages.clip.names import LOGIT_BIAS, MAY_EXCEED
from stages.clip.settings import (
    ClipNetwork,
    ClipNetworkSettings,
    ContrastiveLoss,
    OpenClipNetworkSettings,
    clip_network,
    tower_configs,
)
from stages.clip.sources import OPENAI_MEAN, OPENAI_STD, SET_SIZES, ClipSource
from stages.weights import CPU, give_weights, read_weights, shapes_of, without_weights

ClipBlock = ResidualAttentionBlock
"""What both towers consist of."""

WEIGHTS_FILE = "clip.safetensors"
SETTINGS_FILE = "clip.json"
_LENGTHS = 16
_CACHED_CAPTIONS = 65536
"""Tokenising a caption costs as much as a few per cent of a small CLIP's step, and small data sets come round often."""

MAX_LOGIT_SCALE = math.log(100.0)
"""The logarithm of the largest factor on the similarities (arXiv 2103.00020, section 2.5)."""


@dataclass(frozen=True)
class ClipTokenizer:
    """open_clip's tokenizer, which cleans captions: mended Unicode, entities resolved, spaces collapsed, lower case."""

    context_length: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids int64 [B, L], padded with 0, cut to the context length with the end-of-text token kept."""
        return torch.tensor([_token_ids(caption, self.context_length) for caption in captions], dtype=torch.int64)

    def plain_token_ids(self, caption: str) -> list[int]:
        """The ids of all of a caption's own tokens, without those of its begin and end, and not cut."""
        return _tokenizer().encode(caption)

    @property
    def special_tokens(self) -> dict[int, str]:
        """The ids that mean a caption's begin and end, and what in a caption is read as them."""
        tokenizer = _tokenizer()
        return {each: tokenizer.decoder[each] for each in (tokenizer.sot_token_id, tokenizer.eot_token_id)}


@dataclass(frozen=True)
class ShortTokenizer(ClipTokenizer):
    """The same without what is padding in all captions of a batch, to a multiple of 16 columns.

    In a causal transformer nothing depends on what follows the end-of-text token, which has the highest id of all. A
    compiled network meets few lengths this way, and no GPU is asked for the longest.
    """

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids int64 [B, L], padded with 0."""
        tokens = super().__call__(captions)
        longest = int(tokens.argmax(dim=-1).max()) + 1
        return tokens[:, : -(-longest // _LENGTHS) * _LENGTHS]


class Towers(StrEnum):
    """Which parts of a CLIP are in memory. TEXT has no image tower at all."""

    BOTH = "both"
    TEXT = "text"


@dataclass(frozen=True)
class TextEncoding:
    """A caption as CLIP sees it.

    `embed` [B, E] is the projection (not normalised), `hidden` [B, L, E] the state of every token after the last layer
    norm, projected too where states are not as wide as embeddings, `mask` bool [B, L] true up to and including the
    end-of-text token.
    """

    embed: Tensor
    hidden: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> "TextEncoding":
        """Some of its captions."""
        return TextEncoding(self.embed[rows], self.hidden[rows], self.mask[rows])

    @classmethod
    def stacked(cls, parts: "Sequence[TextEncoding]") -> "TextEncoding":
        """The captions of all parts, one part after the other."""
        embeds, hiddens, masks = zip(*((each.embed, each.hidden, each.mask) for each in parts), strict=True)
        return cls(torch.cat(embeds), torch.cat(hiddens), torch.cat(masks))

    def where(self, condition: Tensor, other: "TextEncoding") -> "TextEncoding":
        """This one's captions where `condition` bool [B] is true, else the other's; one of the two may have B = 1."""
        return TextEncoding(
            torch.where(condition[:, None], self.embed, other.embed),
            torch.where(condition[:, None, None], self.hidden, other.hidden),
            torch.where(condition[:, None], self.mask, other.mask),
        )


class ClipModel(nn.Module):
    """open_clip's `CLIP` behind settings. Embeddings are not normalised: L2 normalisation is for similarities alone."""

    def __init__(
        self,
        settings: ClipNetwork,
        loss: ContrastiveLoss = ContrastiveLoss.CONTRASTIVE,
        towers: Towers = Towers.BOTH,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.loss = loss
        self.tokenize = ClipTokenizer(settings.context_length)
        self.network = _build(settings, loss)
        if towers is Towers.TEXT:
            self.network.visual = cast(VisionTransformer, None)
        of_openai = (OPENAI_MEAN, OPENAI_STD)
        of_pixels = (
            (settings.image_mean, settings.image_std) if isinstance(settings, OpenClipNetworkSettings) else of_openai
        )
        mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in of_pixels)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.train()

    @property
    def towers(self) -> Towers:
        """Which towers this model holds."""
        return Towers.TEXT if cast("nn.Module | None", self.network.visual) is None else Towers.BOTH

    @property
    def training_tokenizer(self) -> ClipTokenizer:
        """The tokenizer for training: without what pads all captions of a batch, where that changes nothing."""
        is_causal = cast("Tensor | None", self.network.attn_mask) is not None
        return ShortTokenizer(self.settings.context_length) if is_causal else self.tokenize

    def train(self, mode: bool = True) -> Self:
        """As of any module, but batch normalisation keeps its statistics: those of a micro-batch depend on its size."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        """The factor on the similarities (already exponentiated), float [1]."""
        return self.network.logit_scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias on the logits, float [1]; None for the contrastive loss."""
        return self.network.logit_bias

    def encode_image(self, image: Tensor) -> Tensor:
        """Embeddings float [B, E] of square pictures float [B, 3, S, S] in [-1, 1]; any S; differentiable.

        Pictures of another size than the tower's are resized (bicubic, antialiased), then normalised as OpenAI's CLIP.
        """
        size = self.settings.image_size
        if image.shape[-1] != size or image.shape[-2] != size:
            image = F.interpolate(image.float(), size=(size, size), mode="bicubic", antialias=True)
        normalised = (image * 0.5 + 0.5 - self.pixel_mean) / self.pixel_std
        return self.network.encode_image(normalised)

    def encode_text(self, tokens: Tensor) -> TextEncoding:
        """The encoding of token ids int64 [B, L] from `tokenize`; L may be cut to the longest of these captions."""
        network = self.network
        length = tokens.shape[1]
        # open_clip's own `encode_text` does not hand out the token states.
        transformer, token_embedding = cast(nn.Module, network.transformer), cast(nn.Module, network.token_embedding)
        causal = cast("Tensor | None", network.attn_mask)
        mask = None if causal is None else causal[:length, :length]
        position = cast(Tensor, network.positional_embedding)[:length]
        hidden = transformer(token_embedding(tokens) + position, attn_mask=mask)
        hidden = cast(nn.Module, network.ln_final)(hidden)
        # The end-of-text token has the highest id of all.
        end = tokens.argmax(dim=-1)
        pooled = hidden[torch.arange(len(tokens), device=tokens.device), end]
        mask = torch.arange(length, device=tokens.device)[None, :] <= end[:, None]
        projection = cast(Tensor, network.text_projection)
        if self.settings.text_width != self.settings.embed_dim:
            hidden = hidden @ projection
        return TextEncoding(embed=pooled @ projection, hidden=hidden, mask=mask)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text embeddings, float [B, E] each: what the contrastive losses take. `tokens` as `encode_text`."""
        return self.encode_image(image), self.encode_text(tokens).embed

    def save(self, directory: Path) -> None:
        """Write `clip.safetensors`, in the layout of open_clip's `CLIP`, and `clip.json`."""
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        save_file(weights, directory / WEIGHTS_FILE)
        description = {"network": self.settings.model_dump(mode="json"), "loss": self.loss.value}
        (directory / SETTINGS_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, towers: Towers = Towers.BOTH, device: torch.device = CPU) -> Self:
        """Read what `save` wrote. With `Towers.TEXT` the image tower is not read."""
        description = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        settings = clip_network(description["network"])
        model = without_weights(lambda: cls(settings, ContrastiveLoss(description["loss"]), towers))
        path = directory / WEIGHTS_FILE
        weights = read_weights(path, device, lambda name: towers is Towers.BOTH or not name.startswith("visual."))
        give_weights(model.network, _fitting(model.network, weights, str(path)))
        return model.to(device)


def load_clip(artifact: Artifact, towers: Towers = Towers.BOTH, device: torch.device = CPU) -> ClipModel:
    """The CLIP of an artifact."""
    return ClipModel.load(artifact.path, towers, device).eval()


def load_any_open_clip(
    path: Path, model_name: str, device: torch.device
) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """A model of whatever kind open_clip knows, with its tokenizer: of a directory that has an `open_clip_config.json`,
    or of a file of `model_name`'s weights. Whatever open_clip raises is raised.
    """
    is_directory = path.is_dir()
    name = f"{LOCAL_DIR_PREFIX}{path.absolute()}" if is_directory else model_name
    model = create_model(name, pretrained=None if is_directory else str(path), device=device)
    return model.eval(), get_tokenizer(name)


def zero_shot_classifier(clip: ClipModel, names: Sequence[str]) -> Tensor:
    """One embedding of length 1 for each class, float [E, K]: the mean over OpenAI's 80 sentences."""
    return build_zero_shot_classifier(
        clip.network, clip.tokenize, names, OPENAI_IMAGENET_TEMPLATES, device=clip.pixel_mean.device
    )


def imagenet_class_names() -> list[str]:
    """What OpenAI calls the thousand classes of ImageNet, in the order of their numbers."""
    return list(IMAGENET_CLASSNAMES)


ContrastiveObjective = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(image_embed [B, E], text_embed [B, E], logit_scale [1], logit_bias [1] | None) -> the mean loss, a scalar."""


def contrastive_loss(kind: ContrastiveLoss, rank: int, world_size: int) -> ContrastiveObjective:
    """open_clip's loss over the global batch; embeddings need not be normalised.

    With several ranks each one's loss covers its own rows against the columns of all, so that the gradients, averaged
    over ranks as DDP does, are those of the global batch.
    """
    match kind:
        case ContrastiveLoss.CONTRASTIVE:
            objective = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        case ContrastiveLoss.SIGLIP:
            objective = SigLipLoss(rank=rank, world_size=world_size)

    def loss(image_embed: Tensor, text_embed: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
        # In float32 under autocast too: the softmax over a large batch needs the digits.
        with torch.autocast(image_embed.device.type, enabled=False):
            image_unit = F.normalize(image_embed.float(), dim=-1)
            text_unit = F.normalize(text_embed.float(), dim=-1)
            return objective(image_unit, text_unit, logit_scale, logit_bias)

    return loss


def load_clip_source(
    source: ClipSource, settings: ClipNetwork, loss: ContrastiveLoss = ContrastiveLoss.CONTRASTIVE
) -> ClipModel:
    """A model with the weights of a CLIP that others made.

    Raises `UserError` if they cannot be read without running code in a file, or their shapes are not those of
    `settings`.
    """
    model = ClipModel(settings, loss)
    counters = [name for name in model.network.state_dict() if name.endswith("num_batches_tracked")]
    said = str(source.files[0])
    weights = _fitting(model.network, read_clip_weights(source), said, may_lack=(LOGIT_BIAS, *counters))
    model.network.load_state_dict(weights, strict=False)
    return model


def _fitting(
    network: CLIP, weights: Mapping[str, Tensor], said: str, may_lack: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Those of a file's weights that the network has, in its shapes. Raises `UserError` where they are not all."""
    own = network.state_dict()
    require_fit(shapes_of(own), shapes_of(weights), said, SET_SIZES, may_lack, MAY_EXCEED)
    return {name: tensor.reshape(own[name].shape) for name, tensor in weights.items() if name in own}


def _build(settings: ClipNetwork, loss: ContrastiveLoss) -> CLIP:
    vision, text = tower_configs(settings)
    match loss:
        case ContrastiveLoss.CONTRASTIVE:
            logit_scale, logit_bias = math.log(1 / 0.07), None
        case ContrastiveLoss.SIGLIP:
            # arXiv 2303.15343, section 3.2
            logit_scale, logit_bias = math.log(10.0), -10.0
    network = CLIP(
        settings.embed_dim,
        CLIPVisionCfg(**vision),
        CLIPTextCfg(**text),
        quick_gelu=settings.quick_gelu,
        init_logit_scale=logit_scale,
        init_logit_bias=logit_bias,
        # DeepSpeed cannot shard scalar parameters.
        nonscalar_logit_scale=True,
    )
    if isinstance(settings, ClipNetworkSettings):
        with torch.no_grad():
            for positions in (network.positional_embedding, network.visual.positional_embedding):
                cast(Tensor, positions).mul_(settings.initial_position_gain)
    return network


@dataclass(frozen=True)
class BpeVocabulary:
    """open_clip's byte-pair encoding under the names that transformers uses: token -> id, and the merges in order."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]


def bpe_vocabulary() -> BpeVocabulary:
    """The vocabulary of `ClipModel.tokenize`, from the file that open_clip brings along."""
    tokenizer = _tokenizer()
    special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    ids = {special.get(number, token): number for token, number in tokenizer.encoder.items()}
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return BpeVocabulary(ids, [(left, right) for left, right in pairs])


@lru_cache(maxsize=_CACHED_CAPTIONS)
def _token_ids(caption: str, context_length: int) -> tuple[int, ...]:
    return tuple(_tokenizer()([caption], context_length=context_length)[0].tolist())


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()
