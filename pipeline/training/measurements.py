"""What is measured while a stage trains: time, waiting for data, memory, and the use of the device's arithmetic."""

import time
from typing import Any, NamedTuple

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from pipeline.config import Precision
from pipeline.data.batch import ImageBatch
from pipeline.training.module import StageModule
from pipeline.training.ranks import of_all_ranks
from pipeline.workflow.record import MEASURED

_LIGHTNING_FETCHES = "train_dataloader_next"
_MIB = 2**20
_DECIMALS = 6

# Dense 16-bit peaks in TFLOP/s from NVIDIA's data sheets. The first whose words a device's name has counts, so that
# the more exact ones come first.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """A GPU's peak rate in FLOP/s; None where it is not known, as for a slice of a GPU (MIG).

    It is None in float32 too: torch runs convolutions in TF32 but matrix products in float32, so no single peak holds.
    """
    words = device_name.replace("-", " ").split()
    if precision in (Precision.FLOAT32, Precision.BFLOAT16_PRODUCTS) or "MIG" in words:
        return None
    # Whole words: an A1000 is no A100.
    name = f" {' '.join(words)} "
    return next((1e12 * tflops for part, tflops in _PEAK_TFLOPS.items() if f" {part} " in name), None)


def device_peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The peak rate of a device in FLOP/s; None if it is not a CUDA device."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


class TrainingClock:
    """Seconds that a stage has trained, over all its sessions."""

    def __init__(self, before_s: float = 0.0) -> None:
        self._started = time.monotonic() - before_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of this session, and of the earlier ones up to the checkpoint."""
        return time.monotonic() - self._started


class LoaderWait(Profiler):
    """Adds up the time in which the training loop waits for its loader; Lightning brackets each fetch for profilers."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0
        self.began = 0.0
        """When the last fetch began, on the monotonic clock."""

    def start(self, action_name: str) -> None:
        """A named piece of Lightning's work begins."""
        if action_name.endswith(_LIGHTNING_FETCHES):
            self.began = time.monotonic()

    def stop(self, action_name: str) -> None:
        """It ends."""
        if action_name.endswith(_LIGHTNING_FETCHES):
            self.waited_s += time.monotonic() - self.began


class _Mark(NamedTuple):
    """Where the measuring of a row begins: samples seen, seconds of training, and of waiting for the loader in them."""

    samples_seen: int = 0
    trained_s: float = 0.0
    waited_s: float = 0.0


class Measurements(pl.Callback):
    """Gives the `system/` columns of a row. With several processes, the longest wait and the largest memory count.

    Rate, waiting and utilisation are those of training alone: of the time from when the loader is asked for a batch to
    when its step is taken. That in which other callbacks write rows, validate, draw and save is left out.

    The model FLOPs utilisation, `system/mfu`, is there for GPUs whose peak is known. The FLOPs of a sample are counted
    once, over the forward and backward pass of the first micro-batch. What is recomputed to save memory counts twice.
    """

    def __init__(self, clock: TrainingClock, precision: Precision) -> None:
        self.loader_wait = LoaderWait()
        self._clock = clock
        self._precision = precision
        self._peak_flops: float | None = None
        self._counter: FlopCounterMode | None = None
        self._is_counting = False
        self._flops_per_sample: float | None = None
        self._trained_s = 0.0
        self._last = _Mark()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the first row from here."""
        assert isinstance(pl_module, StageModule)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._peak_flops = device_peak_flops(device, self._precision)
        self._last = _Mark(pl_module.samples_seen, self._trained_s, self.loader_wait.waited_s)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the FLOPs of the first micro-batch."""
        if self._peak_flops is not None and self._flops_per_sample is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
            # A compiled graph does not show its products to the counter.
            torch.compiler.set_stance("force_eager")
            self._is_counting = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the count of FLOPs, and the time since the loader was asked for this batch."""
        self._trained_s += time.monotonic() - self.loader_wait.began
        if self._counter is not None:
            assert isinstance(batch, ImageBatch)
            self._flops_per_sample = self._counter.get_total_flops() / len(batch)
            self._counter = None

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting FLOPs before the optimiser works."""
        self._stop_counting()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop counting, as the process may run another stage next."""
        self._stop_counting()

    def take(self, trainer: pl.Trainer, samples_seen: int) -> dict[str, float]:
        """The columns of a row, over the time since the last one; all ranks call this."""
        before, now = self._last, _Mark(samples_seen, self._trained_s, self.loader_wait.waited_s)
        trained_s = max(1e-9, now.trained_s - before.trained_s)
        waited_share = (now.waited_s - before.waited_s) / trained_s
        self._last = now
        device = trainer.strategy.root_device
        own = torch.tensor([waited_share, _memory_mib(device)], device=device)
        waited_share, memory_mib = of_all_ranks(trainer, own).amax(0).tolist()
        samples_per_s = (now.samples_seen - before.samples_seen) / trained_s
        row = {
            "elapsed_s": self._clock.elapsed_s,
            "samples_per_s": samples_per_s,
            "data_wait_share": min(1.0, waited_share),
            "memory_mib": memory_mib,
        }
        if self._peak_flops is not None and self._flops_per_sample:
            row["mfu"] = self._flops_per_sample * samples_per_s / (self._peak_flops * trainer.world_size)
        return {f"{MEASURED}{name}": round(value, _DECIMALS) for name, value in row.items()}

    def _stop_counting(self) -> None:
        if self._counter is not None and self._is_counting:
            self._is_counting = False
            self._counter.__exit__(None, None, None)
            torch.compiler.set_stance("default")


def _memory_mib(device: torch.device) -> float:
    """The peak of this process on a CUDA device, else its resident set now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return psutil.Process().memory_info().rss / _MIB
