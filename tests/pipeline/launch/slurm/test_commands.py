"""What Slurm answers, whatever other people's jobs are called."""

import random

from pipeline.launch.slurm.commands import _FIELDS, QueuedJob, read_queue


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
