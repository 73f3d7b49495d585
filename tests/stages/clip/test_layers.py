import pytest

from pipeline.errors import UserError
from stages.clip.layers import layers_above
from stages.clip.network import ClipModel
from stages.clip.settings import clip_network
from stages.clip.sources import network_of_config
from tests.stages.clip.test_sources import CONFIGS, TEXT, VIT


def names_of(config) -> list[str]:
    model = ClipModel(clip_network(network_of_config({"embed_dim": 32, **config}, "here")))
    return [name for name, _ in model.named_parameters()]


def test_layers_are_counted_from_the_top_of_each_tower():
    above = layers_above(names_of({"vision_cfg": VIT | {"layers": 3}, "text_cfg": TEXT | {"layers": 2}}))

    assert above["network.visual.transformer.resblocks.2.mlp.c_fc.weight"] == 1
    assert above["network.visual.transformer.resblocks.0.attn.in_proj_bias"] == 3
    before_the_image_s = ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.bias")
    assert {above[f"network.visual.{name}"] for name in before_the_image_s} == {4}
    assert above["network.transformer.resblocks.1.ln_1.weight"] == 1
    assert {above[f"network.{name}"] for name in ("token_embedding.weight", "positional_embedding")} == {3}
    after = ("visual.ln_post.weight", "visual.proj", "ln_final.weight", "text_projection", "logit_scale")
    assert {above[f"network.{name}"] for name in after} == {0}


def test_the_blocks_of_timm_s_towers_are_counted_and_towers_without_blocks_are_refused():
    above = layers_above(names_of(CONFIGS["custom text"]))
    assert above["network.visual.trunk.blocks.0.attn.qkv.weight"] == max(above.values()) - 1
    assert above["network.visual.trunk.pos_embed"] == max(above.values())
    with pytest.raises(UserError, match=r"optimizer\.layer_decay counts the blocks of transformers"):
        layers_above(names_of(CONFIGS["resnet"]))
