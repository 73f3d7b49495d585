"""Host memory for copies of what a process trains, so that training can go on while they are written."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

_FLOAT32_BYTES = 4
_GB = 1e9
_PORTABLE = 1
"""CUDA's flag for memory that is pinned for all of its contexts."""

_CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    # Version 2, then version 1: where, the limit, what is used, and what of that are files that can be dropped.
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class HostMemory:
    """One piece of memory, kept from one checkpoint to the next; pinned where it is copied to from a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._is_pinned = False
        self._refused_bytes: int | None = None

    def copies(self, tensors: Sequence[Tensor], processes: int) -> list[Tensor] | None:
        """Copies of float32 tensors [n], which stay as they are until the next call; None where memory is too small.

        `processes` is how many of this host copy as much at the same time. All of them leave half of what is free.
        """
        need = sum(each.nbytes for each in tensors)
        is_on_gpu = any(each.is_cuda for each in tensors)
        if self._buffer is None or self._buffer.nbytes < need:
            self.release()
            if not self._is_room(need, processes):
                return None
            self._buffer = torch.empty(need // _FLOAT32_BYTES, dtype=torch.float32)
            # Not by torch's own allocator, which takes the next power of two.
            self._is_pinned = is_on_gpu and _register(self._buffer)
        copied, start = [], 0
        for tensor in tensors:
            place = self._buffer.narrow(0, start, tensor.numel())
            copied.append(place.copy_(tensor, non_blocking=self._is_pinned))
            start += tensor.numel()
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def release(self) -> None:
        """Give the memory back."""
        if self._buffer is not None and self._is_pinned:
            _cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._is_pinned = None, False

    def _is_room(self, need: int, processes: int) -> bool:
        available = available_bytes()
        is_room = 2 * need * processes <= available
        if not is_room and self._refused_bytes != need:
            self._refused_bytes = need
            print(
                f"training waits while a checkpoint is written: a copy would take {need * processes / _GB:,.1f} GB of "
                f"the {available / _GB:,.1f} GB of host memory that are free",
                flush=True,
            )
        return is_room


def available_bytes() -> int:
    """What this process can still take of the host's memory, within the limits of its control groups."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    for place, limit, used, droppable in _LIMITS:
        for group in _groups(place):
            try:
                most = (group / limit).read_text().strip()
                if most == "max":
                    continue
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(most) - int((group / used).read_text()) + int(statistics.get(droppable, 0))
            except (OSError, ValueError):
                continue


def _groups(controller: str) -> Iterator[Path]:
    """This process's control group and those around it, as far as they are seen from here."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = Path(path.lstrip("/"))
            yield from (_CGROUPS / controller / each for each in (own, *own.parents))


def _register(buffer: Tensor) -> bool:
    if int(_cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE)) == 0:
        return True
    with suppress(RuntimeError):  # or the next kernel of training would be told of the error
        torch.ones(1, device="cuda")
    return False


def _cudart() -> Any:
    return torch.cuda.cudart()
