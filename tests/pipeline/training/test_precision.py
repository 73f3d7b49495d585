"""bf16: weights are cast once a micro-batch, normalisation stays in bf16, and whatever is kept stays float32.

Or products alone are in bf16.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import Precision
from pipeline.training.compiling import checkpoint_activations
from pipeline.training.precision import CastableNetwork, float32_products, multiply_in_bf16
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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """How far bf16 is off depends on the numbers, which were those that other tests had left to be drawn."""
    torch.manual_seed(0)


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


def test_a_weight_is_cast_once_for_a_micro_batch_and_its_gradient_is_added_up_in_float32():
    narrow, whole, apart = networks(3)
    castable, each_apart = CastableNetwork(narrow), CastableNetwork(apart)
    pieces = torch.randn(4, 16, 8).unbind()
    sums = [torch.zeros_like(each) for each in apart.parameters()]
    with Operators() as operators:
        for piece in pieces:
            with castable.with_cast_weights():
                backward(narrow, piece)
    assert {operators.casts[each.data_ptr()] for each in narrow.parameters() if each.numel() > 1} == {len(pieces)}
    assert operators.norm_types == {torch.bfloat16}
    for piece in pieces:
        whole(piece).square().mean().backward()
        apart.zero_grad()
        with each_apart.with_cast_weights():
            backward(apart, piece)
        sums = [total + own for total, own in zip(sums, gradients(apart), strict=True)]
    for own, total, true in zip(gradients(narrow), sums, gradients(whole), strict=True):
        assert own.dtype is torch.float32
        assert torch.equal(own, total)
        assert float((own - true).norm()) <= 0.03 * float(true.norm())
    assert all(isinstance(each, nn.Parameter) and each.dtype is torch.float32 for each in narrow.parameters())


def test_where_weights_are_not_whole_norms_and_autocast_cast_them_to_the_same_bits():
    ahead, at_use = networks(2)
    x = torch.randn(16, 8)
    castables = (CastableNetwork(ahead), CastableNetwork(at_use, has_whole_weights=False))
    for network, castable in zip((ahead, at_use), castables, strict=True):
        with Operators() as operators, castable.with_cast_weights():
            backward(network, x)
        assert operators.norm_types == {torch.bfloat16}
    assert all(map(torch.equal, gradients(ahead), gradients(at_use)))


def test_a_block_that_is_computed_again_has_the_weights_of_its_forward_pass():
    plain, checkpointed = networks(2)
    checkpoint_activations(checkpointed, (Block,))
    x = torch.randn(16, 8)
    for network in (plain, checkpointed):
        with CastableNetwork(network).with_cast_weights(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
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
        with castable.with_cast_weights():
            backward(network, torch.randn(16, 8))
    assert graphs == 1


def test_a_frozen_network_is_cast_once_but_for_factors_and_vocabularies():
    network = nn.Sequential(nn.Embedding(5, 8), Block(), nn.Linear(8, 1)).requires_grad_(False)
    weights_of = dict(network.named_parameters())
    with Operators() as operators:
        castable = CastableNetwork(network)
        for _ in range(3):
            with castable.with_cast_weights(), torch.autocast("cpu", torch.bfloat16):
                network(torch.arange(5))
    casts = {name: operators.casts[each.data_ptr()] for name, each in weights_of.items()}
    assert casts == dict.fromkeys(casts, 1) | {"0.weight": 0, "2.bias": 3}


@pytest.mark.parametrize("precision", [Precision.BFLOAT16_MIXED, Precision.BFLOAT16_PRODUCTS])
def test_a_training_in_bf16_that_is_stopped_resumes_to_the_same_bits_and_keeps_all_of_its_state_in_float32(
    tmp_path: Path, precision: Precision
):
    def stage(name: str):
        return frozen(tmp_path / name, dropout=0.3, micro_batch_size=4, precision=precision)

    assert run(stage("whole")) is Outcome.FINISHED, read_failure(stage("whole").work)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage("stopped")) is Outcome.INTERRUPTED
    kept = [load_file(file) for file in stage("stopped").work.glob("checkpoints/*.ckpt/*.safetensors")]
    assert {key.split("|")[1] for state in kept for key in state} == {"weight", "ema", "exp_avg", "exp_avg_sq", "step"}
    assert {tensor.dtype for state in kept for tensor in state.values()} == {torch.float32}
    SCRIPT.at_samples = None
    assert run(stage("stopped")) is Outcome.FINISHED
    assert are_equal(weights(stage("stopped")), weights(stage("whole")))
    assert {each.dtype for each in weights(stage("whole")).values()} == {torch.float32}


class Seen(TorchDispatchMode):
    """The types that products and norms are given."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.dtype for each in args if isinstance(each, Tensor)}
        self.types.setdefault(func.overloadpacket.__name__, set()).update(given)
        return func(*args, **(kwargs or {}))


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))


PRODUCTS = tiny.TRAINER.model_copy(update={"precision": Precision.BFLOAT16_PRODUCTS})


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16"])
def test_products_alone_are_in_bf16_where_a_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, instruction: str
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, instruction: True})
    network, x = convolutional(), torch.randn(5, 3, 4, 4)
    rounded = {name: each.detach().bfloat16() for name, each in network.named_parameters()}
    hidden = nn.functional.conv2d(x.bfloat16(), rounded["0.weight"], rounded["0.bias"]).float()
    hidden = network[1:4](hidden)
    expected = nn.functional.linear(hidden.bfloat16(), rounded["4.weight"], rounded["4.bias"])
    multiply_in_bf16([network], PRODUCTS, "cpu")
    with Seen() as seen:
        made = network(x)
        made.square().mean().backward()
    assert made.dtype is torch.float32
    assert torch.equal(made, expected.float())
    assert seen.types["convolution"] == seen.types["addmm"] == {torch.bfloat16}
    assert seen.types["native_group_norm"] == {torch.float32}
    assert {each.dtype for each in gradients(network)} == {torch.float32}
    assert len(gradients(network)) == len(list(network.parameters()))


def test_a_processor_without_the_instructions_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    network, x = convolutional(), torch.randn(5, 3, 4, 4)
    expected = network(x)
    multiply_in_bf16([network], PRODUCTS, "cpu")
    assert torch.equal(network(x), expected)


def test_no_other_precision_changes_how_layers_multiply(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    network, x = convolutional(), torch.randn(5, 3, 4, 4)
    expected = network(x)
    for precision in set(Precision) - {Precision.BFLOAT16_PRODUCTS}:
        multiply_in_bf16([network], tiny.TRAINER.model_copy(update={"precision": precision}), "cpu")
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("is_cuda", [True, False])
def test_float32_products_are_rounded_to_tf32_where_bf16_is_on_a_gpu(precision: Precision, is_cuda: bool):
    settings = tiny.TRAINER.model_copy(update={"precision": precision})
    rounds = is_cuda and precision is Precision.BFLOAT16_MIXED
    before = torch.get_float32_matmul_precision()
    with float32_products(settings, is_cuda=is_cuda):
        assert torch.get_float32_matmul_precision() == ("high" if rounds else before)
    assert torch.get_float32_matmul_precision() == before
