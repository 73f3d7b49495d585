"""A stage that trains a tiny network on tiny pictures, run through the engine's own entry point."""

import io
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import (
    ActivationCheckpointing,
    Compile,
    DecayKind,
    DeepSpeedSettings,
    NonFinite,
    Offload,
    OptimizerSettings,
    Precision,
    Settings,
    StrategyName,
    TrackedArtifacts,
    TrackingMode,
    TrackingSettings,
    TrainerSettings,
    TrainingStageSettings,
)
from pipeline.data.batch import ImageBatch
from pipeline.data.indexing import index_shards, without_times
from pipeline.data.prepared import write_prepared
from pipeline.data.write import SourceSample, write_shards
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, SampleGrid, StageModule
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.declaration import Catalog, Input, StageDeclaration
from pipeline.workflow.frozen import ArtifactReference, FrozenStage
from pipeline.workflow.progress import Outcome
from pipeline.workflow.record import read_standing
from tests.support.shards import split_of

SIZE = 8
DATA, LEARNER = "0" * 64, "1" * 64


class DataSettings(Settings):
    samples: int


class LearnerSettings(TrainingStageSettings):
    """`step_s`: how long a step takes at least, in seconds."""

    dropout: float
    step_s: float


@dataclass
class Script:
    """What a test has happen in the middle of training; `seen` are the samples of each micro-batch, in order."""

    at_samples: int | None = None
    happens: Callable[[StageContext], None] = lambda _context: None
    every_step: Callable[[StageContext], None] = lambda _context: None
    loss_factor: float = 1.0
    broken_samples: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)
    validations: int = 0


SCRIPT = Script()


def make_data(context: StageContext) -> StageResult:
    shards = context.output / "shards"
    samples = context.settings_as(DataSettings).samples
    write_shards(shards, (source_sample(number) for number in range(samples)), 16)
    index = index_shards(sorted(path.name for path in shards.iterdir()), shards)
    splits = np.array([split_of(index.key(row), 0.25).code for row in range(len(index))], np.uint8)
    write_prepared(context.output, index=without_times(index), splits=splits)
    return StageResult()


def source_sample(number: int) -> SourceSample:
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    picture = content.getvalue() if number >= SCRIPT.broken_samples else b"no picture"
    return SourceSample(f"{number:05d}", picture, "png", f"picture {number}", {})


def learn(context: StageContext) -> StageResult:
    settings = context.settings_as(LearnerSettings)
    images = context.images(SIZE)
    with context.building():
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(16, 3)
        )
    module = LearnerModule(network, settings, context)
    result = fit(context, module, images)
    context.save(network)
    return StageResult(metrics=result.metrics, samples_seen=result.samples_seen)


class LearnerModule(StageModule):
    """Learns each picture's mean colour from a noised copy of it."""

    block_classes = (nn.Linear,)

    def __init__(self, network: nn.Module, settings: LearnerSettings, context: StageContext) -> None:
        super().__init__(network, settings)
        self._context = context
        self._step_s = settings.step_s

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        if self.training:
            SCRIPT.seen.append(tuple(batch.sample.tolist()))
            if SCRIPT.at_samples == self.samples_seen:
                SCRIPT.happens(self._context)
            SCRIPT.every_step(self._context)
            if self._step_s:
                (self._context.work / "in-step").touch()
                time.sleep(self._step_s)
        picture = batch.image_signed()
        noise = batch.draws().normal("noise", picture.shape[1:])
        error = self.network(picture + 0.1 * noise) - picture.mean((2, 3))
        return {LOSS: error.square().mean() * SCRIPT.loss_factor}

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        SCRIPT.validations += 1
        return super().validation_metrics(batches)

    def sample_grid(self) -> SampleGrid:
        return SampleGrid(Image.new("RGB", (4, 4)), ("a caption",))


def learner_module() -> LearnerModule:
    """The module without a stage around it; it can compute no losses."""
    settings = LearnerSettings(global_batch_size=8, max_samples=80, optimizer=OPTIMIZER, dropout=0.0, step_s=0.0)
    return LearnerModule(nn.Linear(2, 2), settings, cast(StageContext, None))


CATALOG = Catalog(
    {
        "data": StageDeclaration(
            version=1, settings=DataSettings, run=f"{__name__}:make_data", output="data", computes=False
        ),
        "learner": StageDeclaration(
            version=1,
            settings=LearnerSettings,
            run=f"{__name__}:learn",
            output="learner",
            inputs=(Input("data"),),
        ),
    }
)

OPTIMIZER = OptimizerSettings(
    learning_rate=1e-2,
    warmup_samples=16,
    decay=DecayKind.COSINE,
    final_learning_rate_share=0.1,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-8,
    weight_decay=0.01,
    gradient_clip_norm=1.0,
    non_finite=NonFinite.STOP,
    ema_decay=0.9,
)

TRAINER = TrainerSettings(
    accelerator="cpu",
    devices=1,
    num_nodes=1,
    strategy=StrategyName.AUTO,
    offload=Offload.NONE,
    deepspeed=DeepSpeedSettings(
        bucket_mib=1, overlap_communication=False, max_gathered_mib=1, gathered_below_elements=0, sub_group_mib=1
    ),
    precision=Precision.FLOAT32,
    compile=Compile.AUTO,
    activation_checkpointing=ActivationCheckpointing.NONE,
    micro_batch_size=None,
    loader_workers=0,
    cpu_threads=1,
    cache_mib=1,
    log_every_steps=1,
    validate_every_samples=None,
    validation_samples=16,
    sample_every_samples=None,
    checkpoint_every_samples=16,
    checkpoint_every_min=60.0,
    keep_checkpoints=2,
    max_faulty_share=0.05,
    lease_s=60.0,
    collective_timeout_s=120.0,
)


def frozen(
    outputs: Path,
    *,
    dropout: float = 0.0,
    step_s: float = 0.0,
    max_samples: int = 80,
    non_finite: NonFinite = NonFinite.STOP,
    learning_rate: float = 1e-2,
    fine_tuning: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> FrozenStage:
    changes = {"non_finite": non_finite, "learning_rate": learning_rate, **(fine_tuning or {})}
    optimizer = OPTIMIZER.model_copy(update=changes)
    settings = LearnerSettings(
        global_batch_size=8, max_samples=max_samples, optimizer=optimizer, dropout=dropout, step_s=step_s
    )
    references = {"data": [ArtifactReference(stage="data", fingerprint=DATA)]}
    return _frozen(outputs, "learner", LEARNER, settings, references, TRAINER.model_copy(update=trainer))


def _frozen(
    outputs: Path,
    stage: str,
    fingerprint: str,
    settings: Settings,
    inputs: dict[str, list[ArtifactReference]],
    trainer: TrainerSettings = TRAINER,
) -> FrozenStage:
    return FrozenStage(
        run="test",
        group="test",
        stage=stage,
        kind=stage,
        fingerprint=fingerprint,
        identity={},
        inputs=inputs,
        catalog=f"{__name__}:CATALOG",
        settings=settings.model_dump(mode="json"),
        seed=3,
        outputs=outputs,
        trainer=trainer,
        tracking=TrackingSettings(
            mode=TrackingMode.NONE, project="test", entity=None, artifacts=TrackedArtifacts.REFERENCE, tensorboard=False
        ),
        overrides=[],
    )


def data_of(stage: FrozenStage) -> FrozenStage:
    return _frozen(stage.outputs, "data", DATA, DataSettings(samples=48), {})


def run(stage: FrozenStage) -> Outcome:
    assert run_stage(data_of(stage), threading.Event()) in (Outcome.FINISHED, Outcome.REUSED)
    return run_stage(stage, threading.Event())


def finished(stage: FrozenStage) -> Artifact:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None
    return artifact


def weights(stage: FrozenStage) -> dict[str, Tensor]:
    return load_file(finished(stage).path / "weights.safetensors")


def rows(stage: FrozenStage) -> list[dict[str, float]]:
    """The rows that stand in the stage's record."""
    return [entry for entry in read_standing(stage.work) if "captions" not in entry]


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
