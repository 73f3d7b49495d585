"""The door for Python: `stages.load`."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.config import TrainerSettings, validate
from pipeline.errors import UserError
from pipeline.training.inference import inference_fabric
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.code import code_version
from pipeline.workflow.runs import RunRecord, read_run, run_artifacts
from stages.generation.model import BATCH_SIZE, Model, Origin
from stages.generation.options import Judge
from stages.generation.picture import Recipe
from stages.generation.text_to_image import KINDS, chain_of_inputs, inputs_by_kind


def load(
    run: str,
    *,
    outputs: str | Path = "outputs",
    accelerator: str | None = None,
    batch_size: int = BATCH_SIZE,
    shows_progress: bool = True,
) -> Model:
    """The model that a finished run trained.

    `outputs` is the `paths.outputs` of the run, `accelerator` "cpu", "gpu" or "auto" instead of the run's own,
    `batch_size` how many pictures are made at a time (it changes none of them but for rounding).

    Raises:
        UserError: there is no such run, or it is not finished, or was made by a newer version.
    """
    record = read_run(Path(outputs).absolute(), run)
    artifacts = run_artifacts(Path(outputs).absolute(), record)
    unfinished = [stage.name for stage in record.stages if stage.name not in artifacts and stage.kind in KINDS]
    if unfinished:
        raise UserError(f"run {record.name} lacks {', '.join(unfinished)}; finish it with unclip run, then sample")
    if not any(artifact.manifest.kind == "decoder" for artifact in artifacts.values()):
        raise UserError(f"run {record.name} trains no decoder, and makes no pictures; sample from a run that does")
    return _model_of(record, artifacts, accelerator, batch_size, shows_progress)


def load_for(
    recipe: Recipe,
    *,
    outputs: str | Path = "outputs",
    accelerator: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> Model:
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


def _model_of(
    record: RunRecord,
    artifacts: Mapping[str, Artifact],
    accelerator: str | None,
    batch_size: int,
    shows_progress: bool,
) -> Model:
    changes = {} if accelerator is None else {"accelerator": accelerator}
    fabric = inference_fabric(validate(TrainerSettings, {**record.config["trainer"], **changes}, "trainer"))
    with fabric.autocast():
        chain = chain_of_inputs(inputs_by_kind(artifacts.values()), fabric.device)
    networks = {name: each.manifest.fingerprint for name, each in artifacts.items() if each.manifest.kind in KINDS}
    origin = Origin(record.name, networks, code_version())
    return Model(chain, origin, fabric, artifacts.get(Judge.JUDGE_CLIP), batch_size, shows_progress)
