"""A network's weights, from an artifact."""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.workflow.artifacts import WEIGHTS_FILE, Artifact
from pipeline.workflow.weights import SAFETENSORS, Shape, weight_shapes

CPU = torch.device("cpu")

Network = TypeVar("Network", bound=nn.Module)


def load_weights(build: Callable[[], Network], artifact: Artifact, device: torch.device = CPU) -> Network:
    """The network that `build` makes, with the weights that an artifact holds, ready to be used on `device`.

    Raises `UserError` where the artifact's weights are not those of such a network.
    """
    network, path = without_weights(build), artifact.path / WEIGHTS_FILE
    try:
        give_weights(network, read_weights(path, device))
    except RuntimeError as error:
        said = shorten(" ".join(str(error).splitlines()[1:]), 200)
        raise UserError(
            f"{path} does not fit the network of its settings ({said}); train stage {artifact.manifest.stage} again"
        ) from error
    return network.to(device=device).eval()


def without_weights(build: Callable[[], Network]) -> Network:
    """The network that `build` makes, without memory for its parameters; buffers are as it makes them.

    Of parameters no initial value is computed. No random number is taken from torch's generator.
    """
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return build()


def give_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Have a network use these tensors, in its own types, where they are. It must have the same names and shapes.

    Raises `RuntimeError` where it has not.
    """
    own = network.state_dict()
    cast = {name: each.to(own[name].dtype) if name in own else each for name, each in weights.items()}
    network.load_state_dict(cast, assign=True)


def read_weights(path: Path, device: torch.device, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names are `wanted`, on `device`; the host has one at a time besides."""
    with safe_open(path, framework="pt", backend="pread") as file:
        names = [name for name in list(file.keys()) if wanted(name)]
        # Copied on a CPU too: as they come they begin at any address, by which products round.
        return {name: file.get_tensor(name).to(device, copy=True) for name in names}


def read_plain_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a file that others may have made. Raises `UserError` for what `weight_shapes` does not take."""
    weight_shapes(file)
    if file.suffix == SAFETENSORS:
        return load_file(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of weights, by name."""
    return {name: tuple(each.shape) for name, each in weights.items()}


def bytes_of(*networks: nn.Module) -> int:
    """What the weights of networks take, in memory and in a file."""
    return sum(each.nbytes for network in networks for each in network.state_dict().values())
