"""bf16 on a GPU: where autocast alone would normalise in float32, cast weights have it stay in bf16."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.precision import CastableNetwork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("has_whole_weights", [True, False])
def test_norms_stay_in_bf16_and_gradients_are_those_of_float32_to_rounding(has_whole_weights: bool):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.SiLU(), nn.Flatten(), nn.LayerNorm(32 * 36), nn.Linear(32 * 36, 4)
    ).cuda()
    x = torch.randn(16, 3, 8, 8, device="cuda")
    weights = list(network.parameters())
    expected = torch.autograd.grad(network(x).square().mean(), weights)
    castable = CastableNetwork(network, has_whole_weights=has_whole_weights)
    types: list[torch.dtype] = []

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        types.append(output.dtype)

    for each in network:
        each.register_forward_hook(note)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False), castable.with_cast_weights():
        loss = network(x).float().square().mean()
    gradients = torch.autograd.grad(loss, weights)
    assert set(types) == {torch.bfloat16}
    for own, true in zip(gradients, expected, strict=True):
        assert own.dtype is torch.float32
        assert float((own - true).norm()) <= 0.05 * float(true.norm())
