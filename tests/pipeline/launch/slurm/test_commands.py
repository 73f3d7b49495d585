"""What Slurm answers, whatever other people's jobs are called."""

import os
import random
from pathlib import Path

import pytest

from pipeline.launch.launcher import LauncherUnavailableError
from pipeline.launch.slurm import commands
from pipeline.launch.slurm.commands import _FIELDS, QueuedJob, read_queue, squeue


def test_a_queue_is_read_whatever_bytes_names_and_comments_hold():
    draws = random.Random(0)

    def some_bytes(width: int) -> bytes:
        return draws.choice([b"\n", b"a|b\n7|RUNNING|", b"\xff", "é".encode(), b""]) + draws.randbytes(width // 3)

    for _ in range(500):
        written, expected = b"", []
        for job_id in draws.sample(range(1, 10**9), draws.randrange(5)):
            own = {"JobID": str(job_id).encode(), "JobArrayID": b"7_3", "State": b"PENDING", "Reason": b"None"}
            own |= {"TimeLeft": b"1-00:00:00"}
            own |= {"RestartCnt": b"3", "Name": some_bytes(_FIELDS["Name"]), "Comment": some_bytes(_FIELDS["Comment"])}
            written += b"".join(own[name][:width].ljust(width) for name, width in _FIELDS.items()) + b"\n"
            name, comment = (own[name].decode(errors="replace").strip() for name in ("Name", "Comment"))
            expected.append(QueuedJob("7_3", job_id, "PENDING", "", "1-00:00:00", 3, name, comment))
        assert read_queue(written) == expected


def test_a_slow_answer_is_said_to_be_waited_for_and_after_a_while_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    slow = tmp_path / "squeue"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(commands, "_PATIENT_S", 0.1)
    monkeypatch.setattr(commands, "_TIMEOUT_S", 2.0)
    with pytest.raises(LauncherUnavailableError, match="squeue gave no answer in 2 s; try again"):
        squeue("--me")
    assert "waiting for an answer of squeue, for 2 s at most" in capsys.readouterr().err
