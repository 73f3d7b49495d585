"""Notices in minutes that a training hangs, and which process holds it up. A collective's time-out takes half an hour.

Every process writes from time to time, in a thread, which micro-batch it is at and in which part of it; the first one
compares. What has an activity to show (validations, pictures, the wait for a checkpoint) may take as long as it likes.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override

from pipeline.training.context import StageContext
from pipeline.workflow.causes import Cause
from pipeline.workflow.progress import Failure, write_failure

HANG_WATCH = "hang watch"
RANKS = "ranks"
SECONDS_BETWEEN_LOOKS = 5.0
MOST_MICRO_BATCHES = 10.0
"""A micro-batch that takes as many times as long as the longest before it does hang."""
_PARTS = ("between micro-batches", "in the forward pass", "in the backward pass")


@dataclass(frozen=True)
class Place:
    """Where a process is: its micro-batch, counted in this start, and the part of it, a number of `_PARTS`."""

    rank: int
    host: str
    micro_batch: int = -1
    part: int = 0

    @property
    def words(self) -> str:
        """For people."""
        return f"process {self.rank} on {self.host}, {_PARTS[self.part]} of micro-batch {self.micro_batch}"


_PLACE = TypeAdapter(Place)


def slowest(places: list[Place]) -> str:
    """Whom the others wait for."""
    last = min(each.micro_batch * len(_PARTS) + each.part for each in places)
    behind = [each for each in places if each.micro_batch * len(_PARTS) + each.part == last]
    return "all processes are at the same place" if 1 < len(behind) == len(places) else behind[0].words


class HangWatch(pl.Callback):
    """Ends a training in which nothing has moved for `trainer.hang_after_s`, and says who is behind.

    It stands first among the callbacks. What is ended so goes on from its last checkpoint.
    """

    def __init__(self, context: StageContext, hang_after_s: float) -> None:
        self._context = context
        self._hang_after_s = hang_after_s
        self._directory = context.work / RANKS
        self._place = Place(context.process.rank, socket.gethostname())
        self._longest_s = float("inf")
        self._since = time.monotonic()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to write, and to look."""
        self._thread = threading.Thread(target=self._beat, args=(trainer.world_size,), name=HANG_WATCH, daemon=True)
        self._thread.start()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._context.progress.update(activity="")
        self._go_to(batch_idx, 1)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._go_to(self._place.micro_batch, 2)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        took_s = time.monotonic() - self._since
        # The first one compiles.
        self._longest_s = 0.0 if self._longest_s == float("inf") else max(self._longest_s, took_s)
        self._go_to(batch_idx + 1, 0)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A training that raises is not torn down by Lightning, and this process may go on to another stage."""
        self._stop()

    def _stop(self) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _go_to(self, micro_batch: int, part: int) -> None:
        if part < 2:
            self._since = time.monotonic()
        self._place = Place(self._place.rank, self._place.host, micro_batch, part)

    def _beat(self, world_size: int) -> None:
        while True:
            with suppress(OSError):  # a full disk, or a network file system's bad moment: the next time
                self._directory.mkdir(exist_ok=True)
                path = self._directory / f"{self._place.rank}.json"
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(asdict(self._place)), encoding="utf-8")
                temporary.replace(path)
            if self._is_over.wait(min(SECONDS_BETWEEN_LOOKS, self._hang_after_s / 4)):
                return
            waits_s = time.monotonic() - self._since
            limit_s = max(self._hang_after_s, MOST_MICRO_BATCHES * self._longest_s)
            if self._place.rank == 0 and waits_s > limit_s and not self._context.progress.activity:
                self._end(world_size, waits_s)

    def _end(self, world_size: int, waited_s: float) -> None:
        places = []
        for rank in range(world_size):
            try:
                places.append(_PLACE.validate_json((self._directory / f"{rank}.json").read_bytes()))
            except (OSError, ValidationError):
                places.append(Place(rank, "a host that was not heard of"))
        message = (
            f"nothing moved for {waited_s:.0f} s: {slowest(places)}; look at that host, or raise "
            "trainer.hang_after_s; run again to go on from the last checkpoint"
        )
        print(message, flush=True)
        failure = Failure(f"stage {self._context.frozen.stage}: {message}", True, Cause.COLLECTIVE)
        with suppress(OSError):
            if not self._context.is_lost:
                write_failure(self._context.work, failure)
        os._exit(1)
