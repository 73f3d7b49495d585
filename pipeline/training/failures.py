"""From an error to its cause, and to the one line for the user, with a remedy where there is one."""

import errno
import re
import shutil
import traceback

import torch
from torch.distributed import DistError

from pipeline.errors import DiskFullError, ProcessKilledError, UserError, is_disk_full
from pipeline.training.disk import fewer_checkpoints
from pipeline.workflow.causes import Cause
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import Failure

_MIN_FREE_BYTES = 2**20
_FILE_OF_A_FRAME = re.compile(r'File "([^"]+)", line')
# Gloo raises a plain RuntimeError, and its start another one, in one of these words.
_TIMED_OUT = ("Timed out waiting", "Application timeout", "waiting for clients")
_LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL")


def explained(error: Exception, frozen: FrozenStage) -> Failure:
    """What is kept of a stage's error."""
    cause = cause_of(error, frozen)
    stage = frozen.stage
    is_user_error = True
    if isinstance(error, UserError):
        message = _said_by_a_loader_worker(str(error)) or str(error)
    elif cause is Cause.DISK_FULL:
        checkpoint = latest_checkpoint(frozen.work)
        kept = f"the checkpoint at {checkpoint.samples_seen} samples is intact" if checkpoint else "nothing was kept"
        message = (
            f"stage {stage}: no space is left for {frozen.outputs} ({error}); {kept}: free some"
            f"{fewer_checkpoints(frozen.trainer)}, and run again"
        )
    elif cause in (Cause.OUT_OF_MEMORY, Cause.OUT_OF_DEVICE_MEMORY):
        said = (str(error) or type(error).__name__).splitlines()[0]
        message = (
            f"stage {stage}: {cause.words} ({said}); lower "
            f"stage.{stage}.trainer.micro_batch_size (the result stays the same) or trainer.cache_mib"
        )
    elif cause is Cause.PERMISSION:
        message = f"stage {stage}: {error}; give this user the right to it, or set paths.outputs, and run again"
    elif any(said in str(error) for said in _TIMED_OUT):
        said = str(error).splitlines()[0]
        message = (
            f"stage {stage}: a process did not answer for trainer.collective_timeout_s="
            f"{frozen.trainer.collective_timeout_s:g} ({said}); raise that if it was at work, and run again to go on"
        )
    else:
        is_user_error = False
        message = f"stage {stage}" if isinstance(error, ProcessKilledError) else type(error).__name__
        message = f"{message}: {error}"
    return Failure(message, is_user_error, cause)


def cause_of(error: Exception, frozen: FrozenStage) -> Cause:
    """Which of the causes an error is."""
    said = str(error)
    if isinstance(error, DiskFullError):
        return Cause.DISK_FULL
    if isinstance(error, UserError):
        return Cause.DATA if _is_of_the_data(error) else Cause.SETTINGS
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Cause.PERMISSION
    # Libraries that write from other languages say it in words, and some only that they wrote less than asked.
    is_full = isinstance(error, OSError) and (is_disk_full(error) or error.errno == errno.EFBIG)
    if is_full or "No space left on device" in said or shutil.disk_usage(frozen.outputs).free < _MIN_FREE_BYTES:
        return Cause.DISK_FULL
    # torch's CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:
        return Cause.OUT_OF_MEMORY
    if isinstance(error, torch.OutOfMemoryError):
        return Cause.OUT_OF_DEVICE_MEMORY
    is_collective = isinstance(error, DistError | ProcessKilledError)
    if is_collective or any(each in said for each in (*_TIMED_OUT, *_LOST_A_PEER)):
        return Cause.COLLECTIVE
    return Cause.DATA if _is_of_the_data(error) else Cause.UNKNOWN


def _is_of_the_data(error: Exception) -> bool:
    """Whether it comes from where samples are read, here or in a loader's worker."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # What a pool's process raised has its own traceback as text alone.
    files += _FILE_OF_A_FRAME.findall(str(error.__cause__ or ""))
    own = [file for file in files if "/pipeline/" in file or "/stages/" in file]
    return str(error).startswith("Caught ") or (bool(own) and "/pipeline/data/" in own[-1])


def _said_by_a_loader_worker(message: str) -> str | None:
    """The last line of what torch makes of a worker's error: its message, after the traceback."""
    if not message.startswith("Caught "):
        return None
    return message.rstrip().splitlines()[-1].partition(": ")[2]
