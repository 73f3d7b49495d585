"""What a diffusers folder says, such as `kakaobrain/karlo-v1-alpha` or an export. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.weights import Shape

DIFFUSERS = "diffusers"
"""The scheme of `initial` for such a folder: `diffusers:PATH`."""

CONFIG_FILE = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_CLASS = "_class_name"


def network_folder(folder: Path, names: Sequence[str], class_name: str, key: str) -> Path:
    """Where a network is: the pipeline's folder `names`, the first that is there, or `folder` itself.

    `key` is what a message begins with, such as "stage.prior.initial=diffusers:karlo". Raises `UserError` where there
    is none, or one of another class.
    """
    places = [*(folder / name for name in names), folder]
    found = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    if found is None:
        sought = " or ".join(f"{name}/{CONFIG_FILE}" for name in names)
        raise UserError(f"{key} has no {sought}; give a folder of diffusers")
    own = read_config(found).get(_CLASS)
    if own != class_name:
        raise UserError(f"{key}: {found} holds a {own} and no {class_name}; give the folder of the pipeline")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a network or a scheduler in its folder. Raises `UserError` where it cannot be read."""
    files = (folder / CONFIG_FILE, folder / "scheduler_config.json")
    return read_json(next((each for each in files if each.is_file()), folder))


def read_json(file: Path) -> dict[str, Any]:
    """What a config says. Raises `UserError` where it cannot be read, or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a folder that is whole") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no config; give a folder that is whole")
    return content


def weights_files(folder: Path) -> tuple[Path, ...]:
    """The files with a network's weights: one, or the pieces that an index names. Raises `UserError` where none is."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            pieces = sorted(set(read_json(index)["weight_map"].values()))
            return tuple(folder / piece for piece in pieces)
    raise UserError(f"{folder} has no {_WEIGHTS[0]}; fetch the whole folder")


def labelled(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The weights' files of networks by what a fingerprint calls them, which is not where they are."""
    return {
        f"{name}/{number}": file
        for name, folder in folders.items()
        for number, file in enumerate(weights_files(folder))
    }


def of_scheduler(folder: Path, name: str) -> dict[str, Any]:
    """The settings, by dotted key, that a pipeline's scheduler says; none where it is not there."""
    if not (folder / name / "scheduler_config.json").is_file():
        return {}
    config = read_config(folder / name)
    kind = "linear" if config.get("beta_schedule") == "linear" else "cosine"
    schedule = {
        "kind": kind,
        "timesteps": config.get("num_train_timesteps", 1000),
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
    }
    return {"objective.prediction_type": config.get("prediction_type", "epsilon"), "schedule": schedule}


def unet_settings(config: Mapping[str, Any], plain: str, attending: str, key: str) -> dict[str, Any]:
    """The settings of a U-Net whose levels are of two types, without and with attention."""
    types = config["down_block_types"]
    other = [each for each in types if each not in (plain, attending)]
    if other:
        raise UserError(f"{key} has blocks of type {other[0]}, and the networks here {plain} and {attending}")
    return {
        "channels": config["block_out_channels"],
        "layers_per_block": config.get("layers_per_block", 2),
        "attention": [each == attending for each in types],
        "attention_head_dim": config.get("attention_head_dim") or 8,
        "norm_groups": config.get("norm_num_groups", 32),
        "dropout": config.get("dropout", 0.0),
        "resnet_time_scale_shift": config.get("resnet_time_scale_shift", "default"),
    }


def unet_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of those weights of a U-Net that tell its levels, and that each has as many layers as it should."""
    last = config.get("layers_per_block", 2) - 1
    return {
        f"down_blocks.{level}.resnets.{last}.conv2.weight": (channels, channels, 3, 3)
        for level, channels in enumerate(config["block_out_channels"])
    }


def origin(artifact: Artifact) -> str:
    """What a card says of a network that was started from others' weights, whose licence goes with it."""
    initial = artifact.manifest.config.get("initial") or ""
    scheme, _, address = initial.partition(":")
    if not initial:
        return ""
    started = f"`{artifact.manifest.stage}` was started from"
    if scheme != DIFFUSERS:
        return f"{started} `{initial}`; what that run's card says of licences holds too."
    return (
        f"{started} the diffusers folder `{Path(address).name}`; its licence and its training data's are not known "
        "here, and hold for all that was made from it."
    )
