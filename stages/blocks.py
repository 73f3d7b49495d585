"""The repeated blocks of our networks: what `trainer.compile=blocks` compiles, and what is computed again."""

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from stages.clip.network import ClipBlock

BLOCKS: tuple[type[nn.Module], ...] = (ClipBlock, BasicTransformerBlock, ResnetBlock2D, Attention)
