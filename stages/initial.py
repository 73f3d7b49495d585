"""Networks that start from weights that are there: an artifact's, or those of a diffusers folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from pipeline.config import TrainingStageSettings
from pipeline.errors import UserError
from pipeline.training.context import StageContext
from pipeline.workflow.artifacts import WEIGHTS_FILE
from pipeline.workflow.weights import require_fit
from stages.diffusers_folder import read_config, weights_files
from stages.weights import read_plain_weights, shapes_of

_FREE = {"sample_size", "out_channels", "dropout", "downsample_type", "upsample_type"}
"""What a network's config may say otherwise: no weight and no result of the blocks that are used here depends on it."""

_LAST_LAYER = ("conv_out.weight", "conv_out.bias")


def load_initial(context: StageContext, network: nn.Module, read_folder: Callable[[Path], dict[str, Tensor]]) -> bool:
    """Give a new network the weights that `initial` names; False where it names none.

    `read_folder` gives those of a diffusers folder by the network's own names. Of the other training's optimiser
    nothing is taken along. Raises `UserError` where the weights do not fit.
    """
    settings = context.settings
    assert isinstance(settings, TrainingStageSettings)
    if settings.initial is None:
        return False
    artifact, key = context.initial, f"stage.{context.frozen.stage}.initial={settings.initial}"
    if artifact is not None:
        weights = read_plain_weights(artifact.path / WEIGHTS_FILE)
    else:
        weights = read_folder(Path(settings.initial.partition(":")[2]))
    remedy = "set the sizes of this stage's network, and of the CLIP that it works on, to those there"
    require_fit(shapes_of(network.state_dict()), shapes_of(weights), key, remedy)
    network.load_state_dict(weights)
    print(f"starting from {settings.initial}", flush=True)
    return True


def folder_weights(folder: Path, network: nn.Module, *, mean_of: int | None = None) -> dict[str, Tensor]:
    """The weights of one network of a diffusers folder, float32, for `network` of the same class or its likeness.

    `mean_of` is the number of output channels that predict a mean: what follows them, a learned variance, is left out.
    Raises `UserError` where the two networks' configs differ in anything that counts.
    """
    if isinstance(network, ConfigMixin):
        _require_same_config(folder, network)
    weights = {name: each.float() for file in weights_files(folder) for name, each in read_plain_weights(file).items()}
    if mean_of is not None:
        weights |= {name: weights[name][:mean_of].clone() for name in _LAST_LAYER}
    return weights


def _require_same_config(folder: Path, network: ConfigMixin) -> None:
    with torch.device("meta"):
        theirs = type(network).from_config(read_config(folder))
    for name, own in _public(network.config).items():
        found = _public(theirs.config).get(name)  # pyright: ignore[reportAttributeAccessIssue]
        if found != own:
            raise UserError(f"{folder}: its config has {name} {found}, and the network here {own}; it cannot be used")


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
        if not name.startswith("_") and name not in _FREE
    }
