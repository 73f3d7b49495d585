"""Where a CLIP can come from: open_clip's models by name, and files and folders on disk. Imports no torch.

What is here reads configs alone: which sizes a CLIP has, which files hold its weights, and why one cannot be used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.workflow.artifacts import file_sha256
from pipeline.workflow.weights import WEIGHTS_SUFFIXES, Shape, weight_shapes
from stages.diffusers_folder import read_json

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BPE_VOCABULARY = 49408
"""Tokens of open_clip's own tokenizer."""

SET_SIZES = "set stage.clip.model to open_clip's name of the checkpoint's model, or stage.clip.network to its sizes"
"""What helps where a file is of another CLIP."""

OPEN_CLIP_CONFIG = "open_clip_config.json"
# In the order in which open_clip itself looks for them.
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PIPELINE_TOWERS = TEXT_ENCODER, IMAGE_ENCODER = "text_encoder", "image_encoder"
"""Folders of a diffusers pipeline."""

# What open_clip takes for sizes that a config leaves out, and transformers for theirs.
_VISION_SIZES = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT_SIZES = {"context_length": 77, "vocab_size": BPE_VOCABULARY, "width": 512, "heads": 8, "layers": 12}
_PLAIN = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "mlp_ratio": (4.0,),
    "proj_type": ("linear",),
}
_TRANSFORMERS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TRANSFORMERS_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **_TRANSFORMERS}
_TRANSFORMERS_TEXT |= {"max_position_embeddings": 77, "vocab_size": BPE_VOCABULARY}
_TRANSFORMERS_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **_TRANSFORMERS}
_TRANSFORMERS_VISION |= {"image_size": 224, "patch_size": 32}
_AS_THEY_ARE, _HALF = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_PIXELS = {
    **dict.fromkeys(("MobileCLIP-", "MobileCLIP2-B", "MobileCLIP2-S0", "MobileCLIP2-S2"), _AS_THEY_ARE),
    "PE-Core-": _HALF,
}
"""Mean and deviation of the pixels of models, by how their names begin, that are not normalised as OpenAI's.

open_clip writes them beside the addresses of weights, and not into the models' configs.
"""


class Layout(StrEnum):
    """By whom the names of weights in a file are."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class ClipSource:
    """A CLIP on disk: its weights' files, which may be several, and its network's settings where a config says them."""

    layout: Layout
    files: tuple[Path, ...]
    network: Mapping[str, Any] | None = None

    def shapes(self) -> dict[str, Shape]:
        """Of all weights, by the names in their files, without what wraps a model there. Raises `UserError`."""
        found = {name: shape for file in self.files for name, shape in weight_shapes(file).items()}
        return {open_clip_name(name): shape for name, shape in found.items()}

    def digest(self) -> Any:
        """What counts in a fingerprint: the contents of the files, wherever they are and whatever they are called."""
        digests = [file_sha256(file) for file in self.files]
        return digests[0] if len(digests) == 1 else digests


def open_clip_name(name: str) -> str:
    """A weight's name without what DistributedDataParallel, `torch.compile` and open_clip's `CustomTextCLIP` prefix."""
    for prefix in ("module.", "_orig_mod.", "text."):
        name = name.removeprefix(prefix)
    return name


@cache
def open_clip_models() -> Mapping[str, Path]:
    """The files of open_clip's model configs, by the models' names."""
    package = find_spec("open_clip")
    assert package is not None, "open_clip is a dependency"
    folders = [Path(each) / "model_configs" for each in package.submodule_search_locations or ()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


def network_of_model(model: str, path: str) -> dict[str, Any]:
    """The settings of the network that open_clip calls so; `path` is where the name stands ("stage.clip.model")."""
    names = open_clip_models()
    name = model.replace("/", "-")
    if name not in names:
        close = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`open_clip.list_models()` has the names"
        raise UserError(f"{path}={model} is no model of open_clip; {hint}")
    pixels = next((each for begins, each in _PIXELS.items() if name.startswith(begins)), None)
    return network_of_config(read_json(names[name]), f"{path}={model}", pixels)


def clip_source(location: Path, path: str) -> ClipSource:
    """What is at `location`, a file or a folder; `path` is the key it was given as ("stage.clip.checkpoint").

    Raises `UserError` where nothing there is a CLIP.
    """
    said = f"{path}={location}"
    if not location.exists():
        raise UserError(
            f"{said} cannot be read (No such file or directory); give the path of a local open_clip checkpoint, or of "
            "a folder that open_clip, transformers or diffusers wrote"
        )
    if not location.is_dir():
        return ClipSource(Layout.OPEN_CLIP, (location,))
    if (location / OPEN_CLIP_CONFIG).is_file():
        config = read_json(location / OPEN_CLIP_CONFIG)
        model = config.get("model_cfg")
        if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
            raise UserError(f"{said}: its {OPEN_CLIP_CONFIG} has no whole model_cfg; write it as open_clip does")
        preprocess = config.get("preprocess_cfg") or {}
        pixels = _pixels(preprocess.get("mean"), preprocess.get("std"))
        weights = _open_clip_weights(location, said)
        return ClipSource(Layout.OPEN_CLIP, (weights,), network_of_config(model, said, pixels))
    if (location / TEXT_ENCODER).is_dir():
        return _pipeline_source(location, said)
    config_file = location / "config.json"
    if config_file.is_file():
        config = read_json(config_file)
        if config.get("model_type") != "clip" or "text_config" not in config:
            raise UserError(f"{said} holds a {config.get('model_type')} and no CLIPModel of transformers")
        text, vision = ({**(config.get(f"{each}_config_dict") or {}), **config[f"{each}_config"]} for each in _TOWERS)
        network = network_of_transformers(text, vision, config.get("projection_dim", 512), said)
        _require_openai_pixels(location / "preprocessor_config.json", said)
        return ClipSource(Layout.TRANSFORMERS, (_first_of(location, _TRANSFORMERS_WEIGHTS, said),), network)
    raise UserError(
        f"{said} holds neither {OPEN_CLIP_CONFIG} (open_clip), config.json (transformers) nor {TEXT_ENCODER}/ "
        f"(diffusers); give the weights' file, and its model as {path.rpartition('.')[0]}.model"
    )


_TOWERS = ("text", "vision")


def _pipeline_source(location: Path, said: str) -> ClipSource:
    """Both towers of a diffusers pipeline."""
    if not (location / IMAGE_ENCODER).is_dir():
        raise UserError(
            f"{said} has a {TEXT_ENCODER}/ and no {IMAGE_ENCODER}/, and a CLIP is both; give the folder of an "
            "image variation pipeline, or an open_clip checkpoint of the same CLIP"
        )
    text, vision = (read_json(location / each / "config.json") for each in PIPELINE_TOWERS)
    network = network_of_transformers(text, vision, text.get("projection_dim", 512), said)
    _require_openai_pixels(location / "feature_extractor" / "preprocessor_config.json", said)
    files = (_first_of(location / each, _TRANSFORMERS_WEIGHTS, said) for each in PIPELINE_TOWERS)
    return ClipSource(Layout.TRANSFORMERS, tuple(files), network)


def network_of_config(config: Mapping[str, Any], said: str, pixels: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """The settings of the network that a model config of open_clip describes; `pixels` are their mean and deviation.

    Raises `UserError`, which begins with `said`, where it cannot encode captions for a prior and a decoder.
    """
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    reason = _unusable(config, vision, text)
    if reason is not None:
        raise UserError(f"{said} cannot be used: {reason}; take one with open_clip's own text transformer")
    mean, std = pixels or (OPENAI_MEAN, OPENAI_STD)
    vision.pop("timm_model_pretrained", None)
    sizes, image_size = {**_VISION_SIZES, **vision}, _square(vision.get("image_size", 224), said)
    text_sizes = {**_TEXT_SIZES, **text}
    common = {
        "embed_dim": config["embed_dim"],
        "image_size": image_size,
        "context_length": text_sizes["context_length"],
        "text_width": text_sizes["width"],
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }
    special = _special(vision, _VISION_SIZES), _special(text, _TEXT_SIZES)
    if any(special) or isinstance(sizes["layers"], list) or (tuple(mean), tuple(std)) != (OPENAI_MEAN, OPENAI_STD):
        pixel_statistics = {"image_mean": list(mean), "image_std": list(std)}
        return {"kind": "open_clip", **common, **pixel_statistics, "vision": vision, "text": text}
    return {
        "kind": "vit",
        **common,
        "patch_size": sizes["patch_size"],
        "vision_width": sizes["width"],
        "vision_layers": sizes["layers"],
        "vision_heads": sizes["width"] // sizes["head_width"],
        "vision_mlp_ratio": sizes["mlp_ratio"],
        "text_layers": text_sizes["layers"],
        "text_heads": text_sizes["heads"],
        "initial_position_gain": 1.0,
    }


def network_of_transformers(
    text: Mapping[str, Any], vision: Mapping[str, Any], projection_dim: int, said: str
) -> dict[str, Any]:
    """The settings of the network of transformers' `CLIPTextConfig` and `CLIPVisionConfig`."""
    text, vision = {**_TRANSFORMERS_TEXT, **text}, {**_TRANSFORMERS_VISION, **vision}
    acts = {text["hidden_act"], vision["hidden_act"]}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"{said} has the activations {', '.join(sorted(acts))}, and open_clip's towers gelu or quick_gelu"
        )
    odd = {
        "text_config.intermediate_size": (text["intermediate_size"], 4 * text["hidden_size"]),
        "text_config.layer_norm_eps": (text["layer_norm_eps"], 1e-5),
        "vision_config.layer_norm_eps": (vision["layer_norm_eps"], 1e-5),
    }
    for key, (found, expected) in odd.items():
        if found != expected:
            raise UserError(f"{said} has {key} {found}, and open_clip's towers {expected}; it cannot be used")
    width = vision["hidden_size"]
    config = {
        "embed_dim": projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": width,
            "layers": vision["num_hidden_layers"],
            "head_width": width // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision["intermediate_size"], width),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
        },
    }
    return network_of_config(config, said)


def _ratio(part: int, whole: int) -> float:
    """What open_clip multiplies `whole` by, and rounds down, to have `part`."""
    exact = part / whole
    return exact if int(whole * exact) == part else (part + 0.5) / whole


def _unusable(config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """Why a model's captions cannot be encoded here; None if they can."""
    if "multimodal_cfg" in config:
        return "it is a CoCa, whose text tower looks at a caption through a token of its own"
    if text.get("hf_model_name"):
        return f"its text tower is Hugging Face's {text['hf_model_name']}, of which there is no file here"
    if text.get("hf_tokenizer_name"):
        return f"its captions are tokenised by Hugging Face's {text['hf_tokenizer_name']}, not by open_clip's own BPE"
    if text.get("vocab_size", BPE_VOCABULARY) != BPE_VOCABULARY:
        return f"it knows {text['vocab_size']} tokens, and open_clip's own BPE has {BPE_VOCABULARY}"
    if text.get("pool_type", "argmax") != "argmax" or text.get("embed_cls") or text.get("proj_type") == "none":
        return "its text tower gives a caption's embedding otherwise than from its end token"
    if text.get("proj_bias") or text.get("output_tokens") or vision.get("output_tokens"):
        return "its towers give something else than embeddings"
    return None


def _special(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tower's config makes it another than the plain transformer."""
    rest = {name: value for name, value in config.items() if name not in sizes}
    return {name: value for name, value in rest.items() if value and value not in _PLAIN.get(name, ())}


def _square(size: Any, said: str) -> int:
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) > 1:
        raise UserError(f"{said} takes pictures of {'x'.join(map(str, size))} pixels, and all pictures here are square")
    return sides.pop()


def _open_clip_weights(folder: Path, said: str) -> Path:
    there = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    there.sort(key=lambda name: not name.endswith(".safetensors"))
    return _first_of(folder, (*_OPEN_CLIP_WEIGHTS, *there), said)


def _first_of(folder: Path, names: tuple[str, ...], said: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{said}: no weights are in {folder}; there should be {names[0]}")
    return found


def _pixels(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Sequence[float], Sequence[float]]:
    """What pixels are normalised by: OpenAI's numbers where a file has them rounded to float32, or none."""
    of_openai = (*OPENAI_MEAN, *OPENAI_STD)
    found = (*(mean or OPENAI_MEAN), *(std or OPENAI_STD))
    if all(isclose(one, other, rel_tol=1e-6) for one, other in zip(found, of_openai, strict=True)):
        return OPENAI_MEAN, OPENAI_STD
    return found[:3], found[3:]


def _require_openai_pixels(file: Path, said: str) -> None:
    if not file.is_file():
        return
    config = read_json(file)
    found = _pixels(config.get("image_mean"), config.get("image_std"))
    if found != (OPENAI_MEAN, OPENAI_STD):
        raise UserError(f"{said} normalises pixels by {found}, and not as OpenAI's CLIP; it cannot be used")
