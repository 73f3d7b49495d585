"""Errors, as the machine raises them, and the causes that they are."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.data.indexing import index_shards
from pipeline.errors import DiskFullError, UserError
from pipeline.training.failures import explained
from pipeline.workflow.causes import Cause
from pipeline.workflow.progress import Outcome
from tests.support.tiny import frozen, run


def allocate_on_the_host() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def allocate_in_python() -> None:
    bytearray(2**62)


def allocate_on_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def open_what_is_forbidden() -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "/data")


def write_to_a_full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def lose_a_peer() -> None:
    raise torch.distributed.DistBackendError("NCCL error: remote process exited")


def read_a_missing_shard() -> None:
    index_shards(["00000.tar"], Path("/nowhere"))


def find_no_room() -> None:
    raise DiskFullError("stage decoder will write 52.000 GB; free some")


def refuse_a_setting() -> None:
    raise UserError("the gate is closed; open it")


def divide_by_zero() -> None:
    print(1 // 0)


@pytest.mark.parametrize(
    ("fail", "cause"),
    [
        (allocate_on_the_host, Cause.OUT_OF_MEMORY),
        (allocate_in_python, Cause.OUT_OF_MEMORY),
        (allocate_on_the_device, Cause.OUT_OF_DEVICE_MEMORY),
        (open_what_is_forbidden, Cause.PERMISSION),
        (find_no_room, Cause.DISK_FULL),
        (write_to_a_full_disk, Cause.DISK_FULL),
        (lose_a_peer, Cause.COLLECTIVE),
        (read_a_missing_shard, Cause.DATA),
        (refuse_a_setting, Cause.SETTINGS),
        (divide_by_zero, Cause.UNKNOWN),
    ],
)
def test_every_error_has_a_cause_and_a_line(tmp_path: Path, fail: Callable[[], None], cause: Cause):
    try:
        fail()
    except Exception as error:
        failure = explained(error, frozen(tmp_path))
        assert failure.cause is cause
        assert "\n" not in failure.message
    else:
        raise AssertionError("nothing failed")


def test_a_work_directory_that_cannot_be_used_fails_with_its_error_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stage = frozen(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "learner").write_text("no directory")
    assert run(stage) is Outcome.FAILED
    assert "NotADirectoryError: [Errno 20] Not a directory" in capsys.readouterr().out
