"""The door for Python: `stages.load`. Imports torch when a run has what it takes, and not before."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import TrainerSettings, validate
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.code import code_version
from pipeline.workflow.runs import RunRecord, finished_artifacts, read_run
from stages.decoder.settings import DecoderSettings
from stages.generation.options import BATCH_SIZE, KINDS, GenerationOptions, Judge
from stages.generation.picture import Recipe
from stages.prior.settings import PriorSettings
from stages.upsampler.settings import UpsamplerSettings

if TYPE_CHECKING:
    from stages.generation.model import Model


def load(
    run: str,
    *,
    outputs: str | Path = "outputs",
    accelerator: str | None = None,
    batch_size: int = BATCH_SIZE,
    shows_progress: bool = True,
) -> "Model":
    """The model that a finished run trained.

    `outputs` is the `paths.outputs` of the run, `accelerator` "cpu", "gpu" or "auto" instead of the run's own,
    `batch_size` how many pictures are made at a time (it changes none of them but for rounding).

    Raises:
        UserError: there is no such run, or it is not finished, or was made by a newer version.
    """
    record, artifacts = _found(run, outputs)
    return _model_of(record, artifacts, accelerator, batch_size, shows_progress)


def require_sampled(run: str, outputs: str | Path, options: GenerationOptions) -> None:
    """Raise `UserError` where a run makes no pictures with such options. No network is loaded."""
    _, artifacts = _found(run, outputs)
    by_kind = {kind: [each for each in artifacts.values() if each.manifest.kind == kind] for kind in KINDS}
    upsamplers = [each.settings(UpsamplerSettings) for each in by_kind["upsampler"]]
    options.check(
        next((each.settings(PriorSettings) for each in by_kind["prior"]), None),
        by_kind["decoder"][0].settings(DecoderSettings),
        sorted(upsamplers, key=lambda each: each.low_size),
    )


def load_for(
    recipe: Recipe,
    *,
    outputs: str | Path = "outputs",
    accelerator: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> "Model":
    """The model that made a picture: the very networks that its recipe names, though its run has others by now.

    Raises:
        UserError: its run or one of the networks is not there.
    """
    outputs = Path(outputs).absolute()
    record, store = read_run(outputs, recipe.run), ArtifactStore(outputs)
    found = {stage: store.find(stage, fingerprint) for stage, fingerprint in recipe.artifacts.items()}
    missing = [f"{stage} {recipe.artifacts[stage][:12]}" for stage, artifact in found.items() if artifact is None]
    if missing:
        raise UserError(
            f"the picture was made by {', '.join(missing)} of run {recipe.run}, which {outputs} does not hold; give "
            "the --outputs that does, or train the run again with its settings"
        )
    artifacts = {stage: artifact for stage, artifact in found.items() if artifact is not None}
    return _model_of(record, artifacts, accelerator, batch_size, shows_progress=True)


def _found(run: str, outputs: str | Path) -> tuple[RunRecord, dict[str, Artifact]]:
    outputs = Path(outputs).absolute()
    record = read_run(outputs, run)
    artifacts = finished_artifacts(outputs, record, KINDS, "sample", (Judge.JUDGE_CLIP,))
    if not any(artifact.manifest.kind == "decoder" for artifact in artifacts.values()):
        raise UserError(f"run {record.name} trains no decoder, and makes no pictures; sample from a run that does")
    return record, artifacts


def _model_of(
    record: RunRecord,
    artifacts: Mapping[str, Artifact],
    accelerator: str | None,
    batch_size: int,
    shows_progress: bool,
) -> "Model":
    from pipeline.training.inference import inference_fabric
    from stages.generation.model import Model, Origin
    from stages.generation.text_to_image import chain_of_inputs, inputs_by_kind

    kinds = (*KINDS, Judge.JUDGE_CLIP)
    artifacts = {name: each.opened() for name, each in artifacts.items() if each.manifest.kind in kinds}
    changes = {} if accelerator is None else {"accelerator": accelerator}
    fabric = inference_fabric(validate(TrainerSettings, {**record.config.get("trainer", {}), **changes}, "trainer"))
    with fabric.autocast():
        chain = chain_of_inputs(inputs_by_kind(artifacts.values()), fabric.device)
    networks = {name: each.manifest.fingerprint for name, each in artifacts.items() if each.manifest.kind in KINDS}
    origin = Origin(record.name, networks, code_version())
    return Model(chain, origin, fabric, artifacts.get(Judge.JUDGE_CLIP), batch_size, shows_progress)
