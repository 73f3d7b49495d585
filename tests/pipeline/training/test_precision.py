"""bf16: weights are cast once a step, normalisation stays in bf16, and whatever is kept stays float32."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import Precision
from pipeline.training.compiling import checkpoint_activations
from pipeline.training.precision import CastableNetwork, float32_products
from pipeline.workflow.progress import Outcome, read_failure
from tests.support import tiny
from tests.support.tiny import SCRIPT, are_equal, frozen, run, weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Operators(TorchDispatchMode):
    """Counts how often each weight is cast to bf16, and keeps the types that norms are given."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: Counter[int] = Counter()
        self.norm_types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.casts[args[0].data_ptr()] += 1
        if func is torch.ops.aten.native_layer_norm.default:
            self.norm_types |= {args[0].dtype, args[2].dtype}
        return func(*args, **kwargs)


def networks(count: int) -> list[nn.Sequential]:
    made = [nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 1)) for _ in range(count)]
    for each in made[1:]:
        each.load_state_dict(made[0].state_dict())
    return made


def backward(network: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = network(x).float().square().mean()
    loss.backward()


def gradients(network: nn.Module) -> list[Tensor]:
    return [each.grad for each in network.parameters() if each.grad is not None]


def test_a_weight_is_cast_once_for_all_micro_batches_and_its_gradient_is_added_up_in_float32():
    narrow, whole, apart = networks(3)
    castable = CastableNetwork(narrow)
    pieces = torch.randn(4, 16, 8).unbind()
    with Operators() as operators:
        copies = castable.cast_trained()
        for piece in pieces:
            with castable.computing_with(copies):
                backward(narrow, piece)
    assert {operators.casts[each.data_ptr()] for each in narrow.parameters() if each.numel() > 1} == {1}
    assert operators.norm_types == {torch.bfloat16}
    for piece in pieces:
        whole(piece).square().mean().backward()
    sums = [torch.zeros_like(each) for each in apart.parameters()]
    for piece in pieces:
        apart.zero_grad()
        again = CastableNetwork(apart)
        with again.computing_with(again.cast_trained()):
            backward(apart, piece)
        sums = [total + own for total, own in zip(sums, gradients(apart), strict=True)]
    for own, total, true in zip(gradients(narrow), sums, gradients(whole), strict=True):
        assert own.dtype is torch.float32
        assert torch.equal(own, total)
        assert float((own - true).norm()) <= 0.03 * float(true.norm())
    assert all(isinstance(each, nn.Parameter) and each.dtype is torch.float32 for each in narrow.parameters())


def test_a_block_that_is_computed_again_has_the_weights_of_its_forward_pass():
    plain, checkpointed = networks(2)
    checkpoint_activations(checkpointed, (Block,))
    x = torch.randn(16, 8)
    for network in (plain, checkpointed):
        castable = CastableNetwork(network)
        copies = castable.cast_trained()
        with castable.computing_with(copies), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = network(x).float().square().mean()
        loss.backward()
    assert all(map(torch.equal, gradients(plain), gradients(checkpointed)))


def test_a_compiled_network_with_cast_weights_is_one_graph_in_all_steps():
    (network,) = networks(1)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    castable = CastableNetwork(network)
    network.compile(backend=count)
    torch._dynamo.reset()
    for _ in range(4):
        with castable.computing_with(castable.cast_trained()):
            backward(network, torch.randn(16, 8))
    assert graphs == 1


def test_a_frozen_network_is_cast_once_but_for_factors_and_vocabularies():
    network = nn.Sequential(nn.Embedding(5, 8), Block(), nn.Linear(8, 1)).requires_grad_(False)
    castable = CastableNetwork(network)
    copies = castable.cast_frozen()
    assert not castable.cast_trained()
    with castable.computing_with(copies):
        types = {name: each.dtype for name, each in network.named_parameters()}
        with Operators() as operators, torch.autocast("cpu", torch.bfloat16):
            network(torch.arange(5))
    assert {name for name, kind in types.items() if kind is torch.float32} == {"0.weight", "2.bias"}
    cast = {name for name, each in network.named_parameters() if operators.casts[each.data_ptr()]}
    assert cast <= {"2.bias"}


def test_a_training_in_bf16_that_is_stopped_resumes_to_the_same_bits(tmp_path: Path):
    def stage(name: str):
        return frozen(tmp_path / name, dropout=0.3, micro_batch_size=4, precision=Precision.BFLOAT16_MIXED)

    assert run(stage("whole")) is Outcome.FINISHED, read_failure(stage("whole").work)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage("stopped")) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    assert run(stage("stopped")) is Outcome.FINISHED
    assert are_equal(weights(stage("stopped")), weights(stage("whole")))
    assert {each.dtype for each in weights(stage("whole")).values()} == {torch.float32}


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("is_cuda", [True, False])
def test_float32_products_are_rounded_to_tf32_where_bf16_is_on_a_gpu(precision: Precision, is_cuda: bool):
    settings = tiny.TRAINER.model_copy(update={"precision": precision})
    rounds = is_cuda and precision is Precision.BFLOAT16_MIXED
    before = torch.get_float32_matmul_precision()
    with float32_products(settings, is_cuda=is_cuda):
        assert torch.get_float32_matmul_precision() == ("high" if rounds else before)
    assert torch.get_float32_matmul_precision() == before
