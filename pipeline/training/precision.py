"""bf16 in products alone; or throughout, with less casting than autocast has: weights are cast ahead of their use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pipeline.config import Precision, TrainerSettings

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Their kernels take bf16 and compute the statistics in float32."""

_CAST = (nn.Linear, _ConvNd, nn.MultiheadAttention, *_NORMS)
"""Whose weights are cast: what is added to activations stays float32, and of a vocabulary's table few rows are read."""

_Place = tuple[nn.Module, str, Tensor]
"""A parameter's module, its name there, and what the module computes with in its place."""


class CastableNetwork:
    """A network that can compute with bf16 copies in place of its float32 weights. Autocast does the rest.

    The cast is in autograd's graph: the weights stay float32, and so do their gradients, which are added up over
    micro-batches and processes. Parameters of one element are factors, and are computed with in float32.
    """

    def __init__(self, network: nn.Module, *, has_whole_weights: bool = True) -> None:
        """Where weights are whole only while their layer is at work, norms cast their own, and autocast the others."""
        self._places = [
            (module, name, parameter)
            for module in network.modules()
            if has_whole_weights and isinstance(module, _CAST)
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter.dtype is torch.float32 and parameter.numel() > 1
        ]
        weights = dict.fromkeys(weight for _, _, weight in self._places)
        self._trained = [weight for weight in weights if weight.requires_grad]
        # As parameters, whose shapes a compiler takes as fixed where it leaves those of tensors open.
        self._frozen: dict[nn.Parameter, Tensor] = {
            weight: nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
            for weight in weights
            if not weight.requires_grad
        }
        for module in network.modules():
            if isinstance(module, _NORMS):
                norm = _norm if has_whole_weights else _norm_with_its_own_casts
                module.forward = partial(norm, module, module.forward)  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def with_cast_weights(self) -> Iterator[None]:
        """Compute with copies: of what trains with new ones, of what is frozen with those made once.

        What several uses of a weight in here give of its gradient is added up in bf16.
        """
        copies = self._frozen | {weight: weight.to(torch.bfloat16) for weight in self._trained}
        with in_place([(module, name, copies[weight]) for module, name, weight in self._places]):
            yield


def _norm(norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Normalise in bf16 where the weights are; on GPUs autocast would have it done, and handed on, in float32."""
    if not isinstance(norm.weight, Tensor) or norm.weight.dtype is not torch.bfloat16:
        return forward(x)
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.to(torch.bfloat16))


def _norm_with_its_own_casts(norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same, with weights that are there from here on."""
    own = [(norm, name, each.to(torch.bfloat16)) for name, each in norm.named_parameters(recurse=False)]
    with in_place(own):
        return _norm(norm, forward, x)


def multiply_in_bf16(networks: Iterable[nn.Module], settings: TrainerSettings, device_type: str) -> None:
    """Have layers multiply in bf16, by `trainer.precision=bf16-products`, and give float32.

    A CPU without instructions for it multiplies in float32: that is faster there, and no less exact.
    """
    if settings.precision is not Precision.BFLOAT16_PRODUCTS or not _multiplies_bf16(device_type):
        return
    for network in networks:
        for module in network.modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                module.forward = partial(_in_bf16, module.forward)  # pyright: ignore[reportAttributeAccessIssue]


def _in_bf16(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
        return forward(x).float()


def _multiplies_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def copies_in(network: nn.Module) -> list[_Place]:
    """The copies that a network has in place of weights now."""
    return [
        (module, name, tensor)
        for module in network.modules()
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.dtype is torch.bfloat16
    ]


@contextmanager
def in_place(places: Sequence[_Place]) -> Iterator[None]:
    """Have copies in the places of their weights."""
    before = [module._parameters[name] for module, name, _ in places]
    for module, name, tensor in places:
        module._parameters[name] = tensor  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for (module, name, _), weight in zip(places, before, strict=True):
            module._parameters[name] = weight


@contextmanager
def float32_products(settings: TrainerSettings, *, is_cuda: bool) -> Iterator[None]:
    """Compute what is left of float32 products in TF32 where a training rounds to bf16 anyway, and on GPUs alone."""
    if not is_cuda or settings.precision is not Precision.BFLOAT16_MIXED:
        yield
        return
    before = torch.get_float32_matmul_precision()
    # Convolutions are computed so by default.
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
