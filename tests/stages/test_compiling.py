"""Every network that trains is one graph for `torch.compile`, and has blocks: to compile, and to compute again."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Compile, Precision
from pipeline.training.compiling import blocks_of, checkpoint_activations, compiled
from pipeline.training.precision import CastableNetwork, multiply_in_bf16
from stages.blocks import BLOCKS
from stages.clip.network import ClipModel, TextEncoding
from stages.clip.settings import ClipSettings
from stages.decoder.network import Condition, build_decoder
from stages.decoder.settings import DecoderSettings
from stages.judge.network import Judge
from stages.judge.settings import JudgeSettings
from stages.prior.network import build_prior, denoise_prior
from stages.prior.settings import PriorSettings
from stages.upsampler.network import build_upsampler, denoise_upsampler
from stages.upsampler.settings import UpsamplerSettings
from tests.support import tiny
from tests.support.tiny_runs import plan_stages

B, MOST = 2, 12
UNETS = ("decoder", "upsampler")


@dataclass(frozen=True)
class Trained:
    """A network with new weights, and a call of such a one for some samples, as its stage does it."""

    network: nn.Module
    forward: Callable[[Any, int], Tensor]

    def call(self) -> Tensor:
        return self.forward(self.network, B)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    stages = plan_stages(tmp_path_factory.mktemp("planned"))
    torch.manual_seed(0)

    clip_settings = ClipSettings.model_validate(stages["clip"].settings)
    clip = ClipModel(clip_settings.network)
    size, embed_dim = clip_settings.network.image_size, clip_settings.network.embed_dim
    tokens = clip.tokenize(["a big blue ring", "a small red square on the left"] * MOST)[:MOST]
    image = torch.randn(MOST, 3, size, size)

    length, width = tokens.shape[1], clip_settings.network.text_width
    mask = torch.ones(MOST, length, dtype=torch.bool)
    text = TextEncoding(torch.randn(MOST, embed_dim), torch.randn(MOST, length, width), mask)
    timestep, noisy_embed = torch.arange(MOST) + 3, torch.randn(MOST, embed_dim)
    prior = build_prior(PriorSettings.model_validate(stages["prior"].settings).network, embed_dim, length)

    decoder_settings = DecoderSettings.model_validate(stages["decoder"].settings)
    decoder = build_decoder(decoder_settings, embed_dim)
    noisy = torch.randn(MOST, 3, decoder_settings.image_size, decoder_settings.image_size)
    image_embed, dropped = torch.randn(MOST, embed_dim), torch.arange(MOST) % 2 == 0

    def condition(n: int) -> Condition:
        return Condition(image_embed[:n], text[:n], dropped[:n])

    upsampler_settings = UpsamplerSettings.model_validate(stages["upsampler"].settings)
    upsampler = build_upsampler(upsampler_settings.network, upsampler_settings.high_size)
    crop, low = torch.randn(2, MOST, 3, upsampler_settings.crop_size, upsampler_settings.crop_size)

    judge_settings = JudgeSettings.model_validate(stages["judge"].settings)
    judge = Judge(judge_settings)
    judged = torch.randn(MOST, 3, judge_settings.image_size, judge_settings.image_size)
    return {
        "clip": Trained(clip, lambda network, n: torch.cat(network(image[:n], tokens[:n]))),
        "prior": Trained(prior, lambda network, n: denoise_prior(network, noisy_embed[:n], timestep[:n], text[:n])),
        "decoder": Trained(decoder, lambda network, n: network(noisy[:n], timestep[:n], condition(n))),
        "upsampler": Trained(upsampler, lambda network, n: denoise_upsampler(network, crop[:n], timestep[:n], low[:n])),
        "judge": Trained(judge, lambda network, n: torch.cat(network(judged[:n]), dim=1)),
    }


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler", "judge"])
def test_a_network_that_trains_is_one_graph(trained: dict[str, Trained], stage: str):
    require_one_graph(trained[stage].call)


@pytest.mark.parametrize("stage", ["clip", "decoder"])
def test_with_cast_weights_it_is_one_graph_too(trained: dict[str, Trained], stage: str):
    # A copy, for its norms get another `forward`.
    network = copy.deepcopy(trained[stage].network)
    castable = CastableNetwork(network)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), castable.with_cast_weights():
        require_one_graph(lambda: trained[stage].forward(network, MOST))


@pytest.mark.parametrize("stage", ["clip", "decoder"])
def test_with_products_in_bf16_it_is_one_graph_too(
    trained: dict[str, Trained], stage: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    network = copy.deepcopy(trained[stage].network)
    precision = {"precision": Precision.BFLOAT16_PRODUCTS}
    multiply_in_bf16([network], tiny.TRAINER.model_copy(update=precision), "cpu")
    require_one_graph(lambda: trained[stage].forward(network, MOST))


def require_one_graph(call: Callable[[], Tensor]) -> None:
    torch._dynamo.reset()
    explained = torch._dynamo.explain(call)()
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@pytest.mark.parametrize("stage", ["clip", "prior", *(pytest.param(each, marks=pytest.mark.slow) for each in UNETS)])
@torch.no_grad()
def test_the_blocks_of_an_evaluation_are_compiled_in_the_first_one(
    trained: dict[str, Trained], stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count))
    network, forward = copy.deepcopy(trained[stage].network).eval(), trained[stage].forward
    expected = {samples: forward(network, samples) for samples in (MOST, 7, 5)}
    module: Any = SimpleNamespace(network=network, frozen_networks=(), block_classes=BLOCKS)

    def evaluate(*batches: int) -> int:
        evaluated = copy.deepcopy(network)
        with module.evaluating(evaluated):
            for samples in batches:
                torch.testing.assert_close(forward(evaluated, samples), expected[samples])
        return graphs

    with compiled(module, Compile.BLOCKS, tmp_path):
        forward(network, 7)
        after_training = graphs
        torch.compiler.set_stance("eager_on_recompile")
        first = evaluate(MOST, 7)
        assert first > after_training
        assert [evaluate(MOST, 7), evaluate(7, 5), evaluate(MOST, 5)] == 3 * [first]
        forward(network, 5)
        assert graphs == first
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_checkpointed_blocks_keep_less_and_give_the_same_gradients(trained: dict[str, Trained], stage: str):
    network, call = trained[stage].network, trained[stage].call
    assert blocks_of(network, BLOCKS)
    kept, gradients = _kept_bytes_and_gradients(network, call)
    checkpoint_activations(network, BLOCKS)
    kept_less, same_gradients = _kept_bytes_and_gradients(network, call)
    assert kept_less < kept / 2
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


def _kept_bytes_and_gradients(network: nn.Module, call: Callable[[], Tensor]) -> tuple[int, dict[str, Tensor]]:
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = call().square().mean()
    loss.backward()
    return kept, {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
