"""What `unclip evaluate` is asked for, held against what a run has. Nothing is loaded here."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.compose import CONFIG_DIRECTORY
from pipeline.config import Settings, TrainerSettings, validate
from pipeline.data.place import DEFAULT_CACHE_DIR, ShardPlace
from pipeline.errors import UserError
from pipeline.secrecy import find_secret
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.runs import RunRecord, finished_artifacts, read_run
from stages.decoder.settings import DecoderSettings
from stages.evaluate.metric import JUDGE_CLIP, FeatureMetric
from stages.evaluate.settings import METRICS, EvaluateSettings, classes_in, metric_of
from stages.evaluate.sweep import Sweep, check_sweep, parse_sweep
from stages.generation.options import KINDS
from stages.prepare.settings import PrepareSettings, place
from stages.prepare.sources.webdataset import WebDatasetSettings, place_of, summary
from stages.prior.settings import PriorSettings
from stages.upsampler.settings import UpsamplerSettings

RETRIEVAL, ZERO_SHOT, UPSAMPLING, ATTRIBUTES = "retrieval", "zero_shot", "upsampling", "attributes"
SECTIONS = (RETRIEVAL, ZERO_SHOT, UPSAMPLING, ATTRIBUTES)
"""What can be measured beside the metrics of made pictures."""

OF_NO_SAMPLING = (RETRIEVAL, ZERO_SHOT)
_NEEDED = {"prior": "prior", UPSAMPLING: "upsampler", ATTRIBUTES: "judge"}
_USED = (*KINDS, "judge", JUDGE_CLIP, "prepare")
"""The kinds of the stages whose files are read."""
_SAMPLED = {"prior": PriorSettings, "decoder": DecoderSettings, "upsampler": UpsamplerSettings}

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Request:
    """What is to be measured of one run, on the data that `data` and `place` lead to (no `data`: on given shards)."""

    record: RunRecord
    artifacts: tuple[Artifact, ...]
    settings: EvaluateSettings
    sections: tuple[str, ...]
    sweep: Sweep | None
    data: Path | None
    place: ShardPlace | None

    @property
    def name(self) -> str:
        """The run's."""
        return self.record.name

    @property
    def trainer(self) -> TrainerSettings:
        """How the run uses its devices."""
        return validate(TrainerSettings, self.record.config.get("trainer", {}), "trainer")

    @property
    def makes_pictures(self) -> bool:
        """Whether anything is asked for that the whole chain of networks is needed for."""
        return bool(self.settings.metrics) or not set(self.sections) <= set(OF_NO_SAMPLING)

    def of_kind(self, kind: str) -> Artifact | None:
        """The first artifact of that kind, if there is one."""
        return next((each for each in self.artifacts if each.manifest.kind == kind), None)


def given_shards(options: argparse.Namespace) -> WebDatasetSettings | None:
    """The shards of `--data`, all held out. Raises `UserError` where they cannot be read or have no captions."""
    if options.data is None:
        return None
    secret = find_secret({"data": options.data})
    if secret is not None:
        raise UserError(secret)
    shards = WebDatasetSettings(
        source="webdataset", shards=tuple(options.data), caption=options.caption, captions=None, weights=None,
        split_key="key", validation_fraction=1.0, index_dir=None, allow_shell_urls=False, cache_dir=DEFAULT_CACHE_DIR,
        cache_gib=None,
    )  # fmt: skip
    if summary(shards).samples == 0:
        raise UserError(f"--data {' '.join(options.data)} has no samples; give other shards")
    return shards


def read_request(options: argparse.Namespace, name: str, shards: WebDatasetSettings | None) -> Request:
    """What the command line asks of the run of that name. Raises `UserError` for what it cannot have."""
    record = read_run(options.outputs, name)
    artifacts = finished_artifacts(options.outputs, record, KINDS, "evaluate", _USED)
    kinds = {each.manifest.kind: each for each in artifacts.values()}
    if "clip" not in kinds:
        raise UserError(f"run {name} has no CLIP, which all is measured with; give one that has")
    if shards is None and "prepare" not in kinds:
        raise UserError(f"run {name} lacks its data; finish it with unclip run, or give --data")
    settings = _settings(options, record)
    sweep = parse_sweep(options.sweep) if options.sweep else None
    if options.metrics is None:
        sections = [] if sweep else [RETRIEVAL, ZERO_SHOT] + ([UPSAMPLING, ATTRIBUTES] if shards is None else [])
        chosen = [each for each in (*settings.metrics, *sections) if not _lack(each, kinds, settings)]
    else:
        chosen = [each.strip() for each in options.metrics.split(",")]
        for each in chosen:
            if lack := _lack(each, kinds, settings):
                raise UserError(f"--metrics {each}: {lack}")
    settings = settings.model_copy(update={"metrics": tuple(each for each in chosen if each not in SECTIONS)})
    for encoder in settings.encoders_of_files:
        settings.encoders.require_contents(encoder, "--")
    if sweep is not None:
        _check_sweep(sweep, chosen, name, artifacts.values())
    artifacts = {name: each.opened() if each.manifest.kind in _USED else each for name, each in artifacts.items()}
    return Request(
        record=record,
        artifacts=tuple(artifacts.values()),
        settings=settings,
        sections=tuple(each for each in chosen if each in SECTIONS),
        sweep=sweep,
        data=None if shards else kinds["prepare"].path,
        place=place_of(shards) if shards else place(_of_config(PrepareSettings, record, "prepare")),
    )


def _settings(options: argparse.Namespace, record: RunRecord) -> EvaluateSettings:
    """The run's own `stage.evaluate`, or the default's, with what the command line says."""
    values = yaml.safe_load((CONFIG_DIRECTORY / "stage" / "evaluate.yaml").read_text(encoding="utf-8"))
    values |= next((stage for stage in record.config.get("stage", {}).values() if stage.get("kind") == "evaluate"), {})
    if options.samples is not None:
        values |= dict.fromkeys(("samples", "retrieval_samples", "judged_samples"), options.samples)
    if options.batch_size is not None:
        values["batch_size"] = options.batch_size
    encoders = {name: getattr(options, name) for name in ("inception", "dinov2", "open_clip", "open_clip_model")}
    values["encoders"] = {**values["encoders"], **{name: each for name, each in encoders.items() if each is not None}}
    values["classes"] = options.classes or values["classes"]
    settings = validate(EvaluateSettings, _without_engine_keys(values), "stage.evaluate")
    if settings.classes is not None:
        classes_in(settings.classes, "--classes")
    return settings


def _lack(text: str, kinds: Mapping[str, Artifact], settings: EvaluateSettings) -> str | None:
    """Why a metric or section cannot be told of a run; None where it can."""
    if text == ZERO_SHOT and settings.classes is None:
        return "the pictures to classify are not given; give --classes"
    needed = [_NEEDED[text]] if text in _NEEDED else []
    if text not in SECTIONS:
        try:
            metric = metric_of(text)
        except ValueError as error:
            others = "" if text.partition("@")[0] in METRICS else f", {', '.join(SECTIONS)}"
            return f"{error}{others}"
        needed += [JUDGE_CLIP] if isinstance(metric, FeatureMetric) and metric.encoder == JUDGE_CLIP else []
    if text not in OF_NO_SAMPLING:
        needed.append("decoder")
    missing = next((each for each in needed if each not in kinds), None)
    return None if missing is None else f"the run has no finished {missing}; leave it out"


def _check_sweep(sweep: Sweep, chosen: Iterable[str], run: str, artifacts: Iterable[Artifact]) -> None:
    unmoved = next((each for each in chosen if each in OF_NO_SAMPLING), None)
    if unmoved is not None:
        raise UserError(f"--sweep {sweep.name}: {unmoved} does not depend on how pictures are sampled; leave it out")
    swept = [each.settings(_SAMPLED[sweep.part]) for each in artifacts if each.manifest.kind == sweep.part]
    if not swept:
        raise UserError(f"--sweep {sweep.name}: run {run} has no {sweep.part}; sweep something else")
    for settings in swept:
        check_sweep(sweep, settings, settings.sampler)


def _of_config(schema: type[S], record: RunRecord, kind: str) -> S:
    name, values = next((name, each) for name, each in record.config["stage"].items() if each["kind"] == kind)
    return validate(schema, _without_engine_keys(values), f"stage.{name}")


def _without_engine_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("kind", "trainer")}
