"""What a stage's hook, the `rehearse` of its declaration, is given, and what it gives back."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config import Settings, TrainerSettings
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import Tokenizer
from pipeline.data.place import ShardPlace
from pipeline.training.module import StageModule
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.declaration import Catalog, StageDeclaration, resolve
from pipeline.workflow.plan import Plan

S = TypeVar("S", bound=Settings)

_SAMPLES_PER_CAPTION = 4

ROWS = 4096
"""As many samples have embeddings or labels in a rehearsal; a greater batch repeats them."""


@dataclass(frozen=True)
class ExpectedData:
    """What is known of the data; None is what cannot be told before it is prepared.

    `captions` are some of its own, none where they are not known. `seconds_per_sample` is what making one takes here.
    `decode_s` measures, here and on one core, how many seconds reading
    a picture at a size takes.
    """

    samples: int | None = None
    samples_per_shard: float | None = None
    artifact_bytes: int | None = None
    seconds_per_sample: float | None = None
    captions: tuple[str, ...] = ()
    decode_s: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Training:
    """A stage that trains `module` on pictures of `image_size` pixels, after `setup_s` seconds of other work.

    `tokenizer` is what its loader is given.
    """

    module: StageModule
    image_size: int
    tokenizer: Tokenizer | None = None
    setup_s: float = 0.0


@dataclass(frozen=True)
class Pass:
    """Work without gradients: `forward` of each of `samples`, None where their number is not known."""

    forward: Callable[[ImageBatch], object]
    samples: int | None
    batch_size: int
    image_size: int
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Passes:
    """A stage that trains nothing: its passes over data, and the bytes that it writes; None where these are unknown."""

    passes: tuple[Pass, ...]
    artifact_bytes: int | None
    work_bytes: int | None = 0
    weight_bytes: int = 0


Rehearsed = ExpectedData | Training | Passes


@dataclass(frozen=True)
class Rehearsal:
    """A stage before it runs: its settings, its artifact where it is finished, and the stages behind its inputs.

    With a `mode` networks are built without weights: their shapes are those of the real ones, and take no memory. The
    device "meta" is the quicker one, and knows neither autocast nor the kernels of attention.
    """

    name: str
    declaration: StageDeclaration
    settings: Settings
    trainer: TrainerSettings
    inputs: Mapping[str, tuple["Rehearsal", ...]]
    artifact: Artifact | None = None
    place: ShardPlace | None = None
    mode: FakeTensorMode | torch.device | None = None

    def settings_as(self, schema: type[S]) -> S:
        """The settings, typed as the stage's own class."""
        assert isinstance(self.settings, schema), f"{self.name} has {type(self.settings)}"
        return self.settings

    def input(self, name: str) -> "Rehearsal":
        """The one stage behind an input."""
        (stage,) = self.inputs[name]
        return stage

    def optional_input(self, name: str) -> "Rehearsal | None":
        """The stage behind an input that a workflow may lack."""
        return next(iter(self.inputs[name]), None)

    @cached_property
    def rehearsed(self) -> Rehearsed | None:
        """What the stage's hook says; None where it has none."""
        return None if self.declaration.rehearse is None else resolve(self.declaration.rehearse)(self)

    @cached_property
    def data(self) -> ExpectedData:
        """What is known of the stage's data."""
        found = next(iter(self.inputs.get("data", ())), None)
        known = found.rehearsed if found is not None else None
        return known if isinstance(known, ExpectedData) else ExpectedData()

    def knows_captions(self, samples: int) -> bool:
        """Whether enough captions are known to tell how long the longest of so many is."""
        return samples <= _SAMPLES_PER_CAPTION * len(self.data.captions)

    def building(self) -> AbstractContextManager[object]:
        """Where networks are to be built, and what stands for their inputs."""
        return nullcontext() if self.mode is None else self.mode

    def batch(self, samples: int, image_size: int, tokenizer: Tokenizer | None = None) -> ImageBatch:
        """Random pictures under captions of the data; one fills any context where too few are known.

        Networks cut a batch to its longest caption, which a few captions do not tell of many.
        """
        captions = self.data.captions if self.knows_captions(samples) else (LONG_CAPTION, *self.data.captions)
        rows = torch.arange(samples)
        shape = (samples, 3, image_size, image_size)
        with self.building():
            image = torch.randint(256, shape, dtype=torch.uint8) if self.mode is None else torch.empty(shape).byte()
        shown = tuple(captions[row % len(captions)] for row in range(samples))
        return ImageBatch(image, shown, rows % ROWS, rows, tokens=None if tokenizer is None else tokenizer(shown))


@contextmanager
def rehearsing() -> Iterator[None]:
    """Without what Lightning tells of each Trainer, and torch of each tensor without weights."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rehearsals_of(plan: Plan, mode: FakeTensorMode) -> dict[str, Rehearsal]:
    """By name, those of a plan's stages that are not blocked. Networks are built when they are looked at."""
    catalog: Catalog = resolve(plan.config.catalog)
    found: dict[str, Rehearsal] = {}
    for stage in plan.stages:
        frozen = stage.frozen
        if frozen is None:
            continue
        found[stage.name] = Rehearsal(
            stage.name,
            catalog.stages[stage.kind],
            frozen.read_settings(),
            frozen.trainer,
            {name: tuple(found[each.stage] for each in given) for name, given in frozen.inputs.items()},
            plan.store.find(stage.name, frozen.fingerprint),
            None if stage.place is None else ShardPlace.model_validate(stage.place),
            mode,
        )
    return found


LONG_CAPTION = " ".join(["word"] * 300)
"""Fills any context."""
