"""What a stage's function is given, and what it gives back."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config import Settings
from pipeline.data.dataset import CaptionedImages, MadeAhead
from pipeline.data.place import ShardPlace
from pipeline.errors import StageInterrupted, UserError
from pipeline.launch.identity import ProcessIdentity
from pipeline.tracking import Tracker
from pipeline.training.hardware import device_of
from pipeline.workflow.artifacts import WEIGHTS_FILE, Artifact, Numbers
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.ownership import Ownership, StageLost
from pipeline.workflow.progress import Phase, Progress, read_progress, write_progress

HEARTBEAT_SECONDS = 5.0
SECONDS_BETWEEN_WRITES = 1.0

S = TypeVar("S", bound=Settings)


class ProgressWriter:
    """Publishes a stage's progress, and a heartbeat while it is busy with something that reports none.

    Of the processes that train one stage together the first one publishes, as long as the stage is its own.
    """

    def __init__(self, work: Path, ownership: Ownership, devices: int) -> None:
        now = time.time()
        last = read_progress(work)
        # What had published was another training of the same.
        earlier_device_s = last.device_s if last is not None and last.phase is not Phase.PUBLISHING else 0.0
        self._work = work
        self._ownership = ownership
        self._progress = Progress(
            Phase.STARTING, started_at=now, updated_at=now, devices=devices, earlier_device_s=earlier_device_s
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def earlier_device_s(self) -> float:
        """Devices times seconds that the earlier starts of this training cost."""
        return self._progress.earlier_device_s

    @property
    def activity(self) -> str:
        """What keeps it busy beside the counter; empty in mid-training."""
        return self._progress.activity

    def __enter__(self) -> "ProgressWriter":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._write()

    def update(self, **changes: Any) -> None:
        """Change fields of `Progress`; written at once with a new phase, else at most once a second."""
        with self._lock:
            is_new_phase = changes.get("phase", self._progress.phase) is not self._progress.phase
            is_due = is_new_phase or time.time() - self._progress.updated_at >= SECONDS_BETWEEN_WRITES
            updated_at = time.time() if is_due else self._progress.updated_at
            self._progress = replace(self._progress, **changes, updated_at=updated_at)
        if is_due:
            self._write()

    def _write(self) -> None:
        if not self._ownership.writes:
            return
        with self._lock, suppress(OSError):  # a full disk; training says so where it matters
            write_progress(self._work, self._progress)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with self._lock:
                self._progress = replace(self._progress, updated_at=time.time())
            self._write()


@dataclass(frozen=True)
class Attempt:
    """One start of a stage, in this process. `interruption` is set when it is to checkpoint and stop."""

    frozen: FrozenStage
    process: ProcessIdentity
    ownership: Ownership
    progress: ProgressWriter
    interruption: threading.Event

    @property
    def work(self) -> Path:
        """The directory for what is in progress."""
        return self.frozen.work

    @property
    def is_first_process(self) -> bool:
        """Whether this process is the one that writes."""
        return self.process.is_first

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the stage over; known to the first process alone."""
        return self.ownership.is_lost


@dataclass(frozen=True)
class StageContext(Attempt):
    """Everything a stage's function works with. `output` is the artifact's directory while it is being built."""

    settings: Settings
    inputs: Mapping[str, tuple[Artifact, ...]]
    output: Path
    tracker: Tracker

    def settings_as(self, schema: type[S]) -> S:
        """The settings, typed as the stage's own class."""
        assert isinstance(self.settings, schema), f"{self.frozen.stage} was declared with {type(self.settings)}"
        return self.settings

    def input(self, name: str) -> Artifact:
        """The one artifact behind an input."""
        (artifact,) = self.inputs[name]
        return artifact

    def optional_input(self, name: str) -> Artifact | None:
        """The artifact behind an input that a workflow may lack."""
        return next(iter(self.inputs[name]), None)

    @property
    def initial(self) -> Artifact | None:
        """The artifact whose weights the stage starts from, where `initial` names a run's."""
        return self.frozen.find_initial()

    def images(self, image_size: int, cache_mib: int | None = None, ahead: MadeAhead | None = None) -> CaptionedImages:
        """The pictures of the input `data`, wherever this run finds its shards, of one size.

        Decoded ones are kept in memory as far as `trainer.cache_mib` allows. Pass 0 where each is read only once.
        `ahead` is what the loader is to make beside them.
        """
        (reference,) = self.frozen.inputs["data"]
        place = None if reference.place is None else ShardPlace.model_validate(reference.place)
        cache_mib = self.frozen.trainer.cache_mib if cache_mib is None else cache_mib
        return CaptionedImages(self.input("data").path, image_size, cache_mib, place, ahead or MadeAhead())

    @property
    def device(self) -> torch.device:
        """What this process trains on."""
        return device_of(self.frozen.trainer, self.process.local_rank)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Build the network that is to be trained in here: it comes to be on its device, and takes no host memory.

        Raises `UserError` where the device cannot hold it whole.
        """
        device = self.device
        try:
            with device:
                yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the network of stage {self.frozen.stage} does not fit on {device} whole, as validation needs it; use "
                "a device with more memory or a smaller network"
            ) from error

    def save(self, network: nn.Module, file: str = WEIGHTS_FILE) -> None:
        """Write the network's weights into the artifact, once: every process may call this, and the first one writes.

        The file is in safetensors. Settings that a consumer needs to build the network belong in `StageResult.numbers`.
        """
        if self.is_first_process:
            weights = {name: each.detach().cpu().contiguous() for name, each in network.state_dict().items()}
            save_file(weights, self.output / file)

    def step(self, samples_seen: int, max_samples: int, activity: str = "") -> None:
        """Report progress of work that is no training, and stop here if asked to."""
        self.progress.update(phase=Phase.WORKING, samples_seen=samples_seen, max_samples=max_samples, activity=activity)
        if self.is_lost:
            raise StageLost(f"stage {self.frozen.stage} was taken over by another process")
        if self.interruption.is_set():
            raise StageInterrupted(f"stage {self.frozen.stage} stopped at {samples_seen} of {max_samples}")


@dataclass(frozen=True)
class StageResult:
    """What goes into the manifest: `numbers` for consumers, `metrics` for people, most telling first."""

    numbers: Numbers = field(default_factory=Numbers)
    metrics: dict[str, float] = field(default_factory=dict)
    samples_seen: int = 0
