"""A network's weights, from an artifact."""

from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.workflow.artifacts import WEIGHTS_FILE, Artifact

CPU = torch.device("cpu")

Network = TypeVar("Network", bound=nn.Module)


def load_weights(network: Network, artifact: Artifact, device: torch.device = CPU) -> Network:
    """The network with the weights that an artifact holds, ready to be used on `device`."""
    network.load_state_dict(load_file(artifact.path / WEIGHTS_FILE))
    return network.to(device=device).eval()


def bytes_of(*networks: nn.Module) -> int:
    """What the weights of networks take, in memory and in a file."""
    return sum(each.nbytes for network in networks for each in network.state_dict().values())
