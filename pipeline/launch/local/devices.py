"""What of this machine the stages that run side by side are given: GPUs, or cores. Imports no torch."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.plan import Plan

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"
_SPINS = "GOMP_SPINCOUNT"
_FEW_SPINS = "1000"
"""A thread that waits for another one leaves its core soon: a stage goes on where something else wants one."""


def gpus_here(environment: Mapping[str, str], devices: Path = Path("/dev")) -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that CUDA knows them by."""
    if _VISIBLE in environment:
        names = [name.strip() for name in environment[_VISIBLE].split(",")]
        return tuple(name for name in names if name not in ("", "-1"))
    return tuple(map(str, range(sum(re.fullmatch(r"nvidia\d+", each.name) is not None for each in devices.iterdir()))))


def cores_here() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_at_once(plans: Sequence[Plan]) -> int:
    """About how many stages could run side by side: the most that are equally far from the start of their runs."""
    depths: dict[tuple[str, str], int] = {}
    for plan in plans:
        for stage in plan.stages:
            assert stage.frozen is not None, "a plan with blocked stages is not run"
            before = max((depths[key] for key in stage.frozen.needs), default=0)
            depths[stage.name, stage.frozen.fingerprint] = 1 + before
    found = list(depths.values())
    return max(map(found.count, set(found)), default=1)


@dataclass(frozen=True)
class Share:
    """What one stage is given: so many of the places, `width` for each of its processes, and these GPUs."""

    places: int
    gpus: tuple[str, ...]
    width: int = 1


@dataclass
class Devices:
    """The places in which stages run side by side, and the GPUs behind them. Each place has its share of the cores.

    `widths` are stages' names: of places, where there is no GPU, they take so many in place of one. One whose number of
    threads is set takes one.
    """

    places: int
    gpus: tuple[str, ...]
    cores: int
    widths: Mapping[str, int] = field(default_factory=dict)
    _taken: int = 0
    _load: dict[str, int] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Whether a place is left; the GPUs behind it may not be enough for a stage."""
        return self._taken < self.places

    def take(self, stage: FrozenStage) -> Share | None:
        """A share for a stage: a place and a GPU for each of its devices. None where there is no room now."""
        wanted = stage.tasks.per_node
        is_widened = not self.gpus and stage.trainer.cpu_threads is None
        width = min(self.widths.get(stage.stage, 1), self.places) if is_widened else 1
        places = min(wanted * width, self.places)
        gpus: tuple[str, ...] = ()
        if self.gpus and stage.trainer.accelerator != "cpu":
            at_once = -(-self.places // len(self.gpus))
            by_load = sorted(self.gpus, key=lambda gpu: self._load.get(gpu, 0))
            gpus = tuple(gpu for gpu in by_load[:wanted] if self._load.get(gpu, 0) < at_once)
            if len(gpus) < min(wanted, len(self.gpus)):
                return None
        if self._taken + places > self.places:
            return None
        self._count(places, gpus, +1)
        return Share(places, gpus, width)

    def give_back(self, share: Share) -> None:
        """Make room for the next stage."""
        self._count(share.places, share.gpus, -1)

    def environment(self, share: Share, own: Mapping[str, str]) -> dict[str, str]:
        """What a process with that share is told of it. The number of threads stays where somebody has set it."""
        told = {_VISIBLE: ",".join(share.gpus)} if self.gpus else {}
        if self.places > 1:
            told[_THREADS] = own.get(_THREADS, str(max(1, self.cores * share.width // self.places)))
        if share.width > 1:
            told[_SPINS] = own.get(_SPINS, _FEW_SPINS)
        return {**own, **told}

    def _count(self, places: int, gpus: Sequence[str], sign: int) -> None:
        self._taken += sign * places
        for gpu in gpus:
            self._load[gpu] = self._load.get(gpu, 0) + sign
