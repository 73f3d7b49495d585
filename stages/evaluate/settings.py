"""The stage `evaluate`: settings, what it needs and gives. Imports no torch."""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import field_validator

from pipeline.config import ADDED_LATER, RUNTIME, Positive, Settings
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Arity, Better, Input, StageDeclaration, Workflow, modules_in
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.fingerprint import counted_settings
from pipeline.workflow.weights import weight_shapes
from stages.evaluate.metric import DINOV2, ENCODERS, INCEPTION, JUDGE_CLIP, OF_FILES, OPEN_CLIP, FeatureMetric, Metric

METRICS: dict[str, type[Metric]] = {
    name: module.METRIC for name, module in modules_in("stages.evaluate.metrics").items()
}

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""One and the same: FID's Inception by torch-fidelity's name, and by pytorch-fid's."""

_INCEPTION_HEAD = ("fc.weight", (1008, 2048))
"""TensorFlow's classes, of which torchvision's own Inception has 1,000."""
_DINOV2_TYPES = ("dinov2", "dinov2_with_registers")

OPEN_CLIP_CONFIG = "open_clip_config.json"
_WEIGHTS = (".bin", ".json", ".pt", ".pth", ".safetensors")
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class EncoderSettings(Settings):
    """Where the encoders of others are: a file of FID's Inception, a directory of transformers' with a DINOv2, and a
    directory or a file of open_clip's, of which a file needs its model's name too.
    """

    inception: Path | None = None
    dinov2: Path | None = None
    open_clip: Path | None = None
    open_clip_model: str | None = None

    def find(self, name: str, option: str = "encoders.") -> Path:
        """Where an encoder is. Raises `UserError` that says where it was looked for.

        `option` is how it would be given, up to its name: "stage.evaluate.encoders.", or "--" on the command line.
        """
        given: Path | None = getattr(self, name)
        asked = f"{option}{name.replace('_', '-') if option.startswith('-') else name}"
        if given is None and name == INCEPTION:
            cached = [_hub_cache() / file for file in INCEPTION_FILES]
            found = next((path for path in cached if path.is_file()), None)
            if found is None:
                raise UserError(
                    f"FID's Inception is neither given by {asked} nor in {_hub_cache()} as {INCEPTION_FILES[0]}; "
                    "get that file from torch-fidelity's releases"
                )
            return found
        if given is None:
            raise UserError(f"a metric needs the encoder {name}; give where it is by {asked}")
        if not given.exists():
            raise UserError(f"{asked} {given} does not exist; give where the encoder {name} is")
        if name == OPEN_CLIP and given.is_dir() and not (given / OPEN_CLIP_CONFIG).is_file():
            raise UserError(f"{asked} {given} has no {OPEN_CLIP_CONFIG}; give a directory of open_clip's, or a file")
        if name == OPEN_CLIP and given.is_file() and self.open_clip_model is None:
            model = f"{asked}-model" if option.startswith("-") else f"{asked}_model"
            raise UserError(f"{asked} {given} is a file, which does not say of which model; set {model} too")
        return given

    def require_contents(self, name: str, option: str = "encoders.") -> None:
        """Raise `UserError` as `find` does, or where what is there can be seen, without torch, to be something else."""
        path = self.find(name, option)
        if name == INCEPTION and weight_shapes(path).get(_INCEPTION_HEAD[0]) != _INCEPTION_HEAD[1]:
            raise UserError(f"{path} does not hold FID's Inception; give torch-fidelity's file {INCEPTION_FILES[0]}")
        if name == DINOV2 and _value_in(path / "config.json", "model_type") not in _DINOV2_TYPES:
            raise UserError(
                f"{path} holds no DINOv2: its config.json is not of one; give a directory as transformers saves it"
            )
        if (
            name == OPEN_CLIP
            and path.is_dir()
            and not isinstance(_value_in(path / OPEN_CLIP_CONFIG, "model_cfg"), dict)
        ):
            raise UserError(f"{path}: its {OPEN_CLIP_CONFIG} has no model_cfg; give a directory as open_clip saves it")


def _value_in(file: Path, key: str) -> Any:
    """The value of a key in a file of JSON; None where there is no such file or key."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def _hub_cache() -> Path:
    """Where torch.hub keeps files, told without torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser() / "hub" / "checkpoints"


class EvaluateSettings(Settings):
    """How good a run is, on held-out pictures and captions.

    `samples` pictures are made from validation captions, and `judged_samples` more from captions of one fully described
    object for each kind of pairs, seen and never seen, where there is a judge. `metrics` are measured on the former, by
    their names, or as `name@encoder` in another encoder than the metric's usual one. `encoders` says where those are
    that others trained. `classes` is a directory with one of pictures for each class, for CLIP's zero-shot accuracy.
    """

    retrieval_pool: Positive
    retrieval_samples: Positive
    samples: Positive
    judged_samples: Positive
    grid_captions: Positive
    batch_size: Annotated[Positive, RUNTIME]
    metrics: Annotated[tuple[str, ...], ADDED_LATER] = ("similarity", "prior", "frechet")
    encoders: Annotated[EncoderSettings, RUNTIME] = EncoderSettings()  # counted by their contents
    classes: Annotated[Path | None, RUNTIME] = None  # counted by its pictures' names and sizes

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            metric_of(name)
        return names

    @property
    def encoders_of_files(self) -> list[str]:
        """Those of others that the metrics need."""
        return encoders_of(self.metrics)


def metric_of(text: str) -> Metric:
    """The metric of that name, or `name@encoder`. Raises `ValueError` for what is none."""
    name, at, encoder = text.partition("@")
    kind = METRICS.get(name)
    if kind is None:
        raise ValueError(f"{name!r} is no metric; there are {', '.join(METRICS)}")
    if not at:
        return kind()
    if not issubclass(kind, FeatureMetric):
        raise ValueError(f"{text!r}: {name} is of no encoder in particular; write {name}")
    if encoder not in ENCODERS:
        raise ValueError(f"{text!r}: {encoder!r} is no encoder; there are {', '.join(ENCODERS)}")
    return kind(encoder)


def encoders_of(metrics: Iterable[str]) -> list[str]:
    """The encoders of files that these metrics need, each once."""
    found = [each.encoder for each in map(metric_of, metrics) if isinstance(each, FeatureMetric)]
    return [name for name in dict.fromkeys(found) if name in OF_FILES]


def classes_in(directory: Path, option: str) -> list[Path]:
    """The sorted directories of a folder of classes. Raises `UserError` where there are none with pictures."""
    if not directory.is_dir():
        raise UserError(f"{option} {directory} is no directory; give one with a directory of pictures for each class")
    found = sorted(each for each in directory.iterdir() if each.is_dir() and pictures_in(each))
    if len(found) < 2:
        raise UserError(
            f"{option} {directory} has {len(found)} directories with pictures; give one with a directory for each class"
        )
    return found


def pictures_in(directory: Path) -> list[Path]:
    """The pictures that lie in a directory, by their names' endings, sorted."""
    return sorted(each for each in directory.iterdir() if each.suffix.lower() in _PICTURES)


def check(path: str, settings: EvaluateSettings, workflow: Workflow) -> None:
    """The encoders and the classes are there."""
    for name in settings.encoders_of_files:
        settings.encoders.require_contents(name, f"{path}.encoders.")
    named = next((each for each in settings.metrics if each.endswith(f"@{JUDGE_CLIP}")), None)
    if named is not None and JUDGE_CLIP not in workflow.kinds:
        raise UserError(f"{path}.metrics has {named} and the workflow no stage judge_clip; use another encoder")
    if settings.classes is not None:
        classes_in(settings.classes, f"{path}.classes")


def identity(settings: EvaluateSettings) -> dict[str, Any]:
    """The files that are measured with count by what they hold, not by where they are."""
    counted = counted_settings(settings)
    if settings.encoders_of_files:
        counted["encoders"] = encoder_digests(settings.encoders, settings.encoders_of_files)
    if settings.classes is not None:
        pictures = [each for found in classes_in(settings.classes, "classes") for each in pictures_in(found)]
        listing = [f"{each.relative_to(settings.classes)} {each.stat().st_size}" for each in pictures]
        counted["classes"] = sha256("\n".join(listing).encode()).hexdigest()
    return counted


def encoder_digests(encoders: EncoderSettings, names: Iterable[str]) -> dict[str, str]:
    """What each of these encoders is: a SHA-256 of its file, or of the files of its directory."""
    found = {}
    for name in names:
        path = encoders.find(name)
        model = f"{encoders.open_clip_model} " if name == OPEN_CLIP and path.is_file() else ""
        files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.suffix in _WEIGHTS)
        try:
            digests = [file_sha256(each) if path.is_file() else f"{each.name} {file_sha256(each)}" for each in files]
        except OSError as error:
            raise UserError(f"encoders.{name} {path} cannot be read ({error.strerror}); give another") from error
        found[name] = model + (digests[0] if path.is_file() else sha256("\n".join(digests).encode()).hexdigest())
    return found


class EvaluateNumbers(Numbers):
    """How many pictures were made for it."""

    samples: int


MEASURED: dict[str, Better] = {
    **{f"{pairs}/{size}/*": Better.HIGH for pairs in ("seen", "unseen") for size in ("base", "final")},
    **{name: better for metric in METRICS.values() for name, better in metric.better.items()},
    "clip/R@*": Better.HIGH,
    "zero_shot/*": Better.HIGH,
    "upsampler/psnr_db": Better.HIGH,
    "upsampler/ssim": Better.HIGH,
}
"""Which way results improve, by shell patterns of their names."""

EVALUATE = StageDeclaration(
    version=3,
    settings=EvaluateSettings,
    run="stages.evaluate.run:run",
    rehearse="stages.evaluate.run:rehearse",
    output="evaluation",
    inputs=(
        Input("data"),
        Input("clip"),
        Input("prior", Arity.OPTIONAL),
        Input("decoder"),
        Input("upsampler", Arity.ANY),
        Input("judge", Arity.OPTIONAL),
        Input("judge_clip", Arity.OPTIONAL),
    ),
    numbers=EvaluateNumbers,
    check=check,
    identity=identity,
    better=MEASURED,
)
