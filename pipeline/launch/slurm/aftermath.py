"""What follows a start that failed: run by the batch script, in the job, where the stage ran.

    python -m pipeline.launch.slurm.aftermath FROZEN POLICY NODES STATUS OOM_KILLS LOG_BYTES

STATUS is that of `srun`, or `late` where the script ended the stage just before its time limit, OOM_KILLS how many
processes this node's kernel has ended meanwhile, and LOG_BYTES where the start begins in the log. The failure and what
is done about it are left in the work directory. If the job is to start again, a line says so: `@again` and what
`scontrol update` is to change.
"""

import os
import re
import signal
import sys
from pathlib import Path

from pipeline.launch.slurm.identity import job_around
from pipeline.launch.slurm.settings import Policy
from pipeline.workflow.causes import Cause, End, read_ends, starts_again, write_end
from pipeline.workflow.frozen import FrozenStage, halve_micro_batch, read_frozen
from pipeline.workflow.notify import tell_of_failure
from pipeline.workflow.progress import LOG, Failure, read_failure, write_failure

AGAIN = "@again"
_KILLED = str(128 + signal.SIGKILL)


def main() -> None:
    """Say why the stage failed, and whether it starts again."""
    path, policy, nodes, status, oom_kills, log_bytes = sys.argv[1:]
    job = job_around(os.environ)
    assert job is not None, "this is for a batch job"
    frozen = read_frozen(Path(path))
    log = (frozen.work / LOG).read_bytes()[int(log_bytes) :].decode(errors="replace")
    is_oom = re.search(rf"Detected \d+ oom.kill event\S* in \S*{job.job_id}\.", log) is not None
    is_oom |= status == _KILLED and int(oom_kills) > 0  # without a memory limit of Slurm's, which would say so
    failure = failure_of(frozen, status, is_oom=is_oom)
    end = End(job.job_id, job.restarts, nodes, failure.cause, failure.message)
    changes, then = decide(Path(path), Policy.model_validate_json(policy), end, read_ends(frozen.work))
    write_failure(frozen.work, failure)
    write_end(frozen.work, End(job.job_id, job.restarts, nodes, failure.cause, failure.message, then))
    print(f"unclip: {failure.cause.words}: {failure.message}; {then}")
    if changes is None:
        tell_of_failure(frozen, failure)
    else:
        print(AGAIN, *changes)


def failure_of(frozen: FrozenStage, status: str, *, is_oom: bool) -> Failure:
    """What the stage has said of its failure, and what only the machine knows."""
    known = read_failure(frozen.work)
    if is_oom and (known is None or known.cause in (Cause.UNKNOWN, Cause.COLLECTIVE)):
        remedy = f"raise launch.stages.{frozen.stage}.mem_gib, or lower trainer.cache_mib"
        return Failure(f"the memory limit or the kernel ended it; {remedy}", True, Cause.OUT_OF_MEMORY)
    if known is not None:
        return known
    if status == "late":
        message = "it came to no step boundary between the warning and the time limit; raise launch.stop_before_s"
        return Failure(message, False, Cause.TIME_LIMIT)
    return Failure(f"its process ended with status {status}, without a word; see the log", False, Cause.UNKNOWN)


def decide(path: Path, policy: Policy, end: End, ends: list[End]) -> tuple[list[str] | None, str]:
    """What to change of the job before it starts again, or None where it does not; and that in words."""
    assert end.cause is not None, "only a start that failed is followed by another one"
    of_job = [each for each in ends if each.job == end.job and each.start < end.start]
    causes = [each.cause for each in of_job]
    count = starts_again(policy.times, end.cause, causes)
    if count is None:
        return None, "it does not start again"
    changes: list[str] = []
    number = 1 + causes.count(end.cause)
    if end.cause is Cause.OUT_OF_MEMORY and policy.mem_mib is not None:
        changes.append(f"MinMemoryNode={round(policy.mem_mib * policy.memory_factor**number)}")
    elif end.cause in (Cause.OUT_OF_MEMORY, Cause.OUT_OF_DEVICE_MEMORY):
        half = halve_micro_batch(path)
        if half is None:
            return None, "it does not start again, as there is no micro-batch to halve"
        return [], f"starts again ({count}) with trainer.micro_batch_size={half}"
    if end.cause is Cause.TIME_LIMIT:
        changes.append(f"TimeLimit={round(policy.time_limit_min * policy.time_factor**number)}")
    suspects = [each.nodes for each in (*of_job, end) if each.cause is not None and each.cause.may_be_the_node]
    failed = [node for nodes in suspects for node in nodes.split(",") if node]
    left_out = sorted({node for node in failed if failed.count(node) >= policy.exclude_after})
    if left_out:
        changes.append(f"ExcNodeList={','.join(left_out)}")
    return changes, f"starts again ({count}){' with ' if changes else ''}{' '.join(changes)}"


if __name__ == "__main__":
    main()
