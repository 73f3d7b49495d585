"""A network's weights in an artifact."""

from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.training.context import StageContext
from pipeline.workflow.artifacts import Artifact

WEIGHTS_FILE = "weights.safetensors"
CPU = torch.device("cpu")

Network = TypeVar("Network", bound=nn.Module)


def save_weights(context: StageContext, network: nn.Module) -> None:
    """Write a network's weights into the artifact that is being built; its settings are in the manifest."""
    if context.is_first_process:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        save_file(weights, context.output / WEIGHTS_FILE)


def load_weights(network: Network, artifact: Artifact, device: torch.device = CPU) -> Network:
    """The network with the weights that an artifact holds, ready to be used on `device`."""
    network.load_state_dict(load_file(artifact.path / WEIGHTS_FILE))
    return network.to(device=device).eval()
