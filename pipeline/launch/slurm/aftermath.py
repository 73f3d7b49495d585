"""What follows a start that failed: run by the batch script, in the job, where the stage ran.

    python -m pipeline.launch.slurm.aftermath FROZEN POLICY NODES STATUS OOM_KILLS LOG_BYTES MOST_MIB

STATUS is that of `srun`, `late` where the script ended the stage just before its time limit, or `requeues` where it did
not start it any more. OOM_KILLS is how many processes this node's kernel has ended meanwhile, LOG_BYTES where the start
begins in the log, and MOST_MIB the memory that as many nodes have as the job needs (0: not known). The failure and what
is done about it are left in the work directory. If the job is to start again, a line says so: `@again` and what
`scontrol update` is to change.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.launch.slurm.identity import job_around
from pipeline.launch.slurm.settings import Policy
from pipeline.overrides import key_of
from pipeline.workflow.causes import Cause, End, read_ends, starts_again, write_end
from pipeline.workflow.frozen import FrozenStage, halve_micro_batch, read_frozen
from pipeline.workflow.notify import tell_of_failure
from pipeline.workflow.progress import LOG, Failure, read_failure, write_failure

AGAIN = "@again"
_KILLED = str(128 + signal.SIGKILL)
_REQUEUES = "requeues"
_ENDS = "it does not start again"


def main() -> None:
    """Say why the stage failed, and whether it starts again."""
    path, policy, nodes, status, oom_kills, log_bytes, most_mib = sys.argv[1:]
    job = job_around(os.environ)
    assert job is not None, "this is for a batch job"
    frozen = read_frozen(Path(path))
    log = (frozen.work / LOG).read_bytes()[int(log_bytes) :].decode(errors="replace")
    is_oom = re.search(rf"Detected \d+ oom.kill event\S* in \S*{job.job_id}\.", log) is not None
    is_oom |= status == _KILLED and int(oom_kills) > 0  # without a memory limit of Slurm's, which would say so
    failure = with_remedy(failure_of(frozen, status, is_oom=is_oom), frozen)
    end = End(job.job_id, job.restarts, nodes, failure.cause, failure.message)
    changes, then = decide(Path(path), Policy.model_validate_json(policy), end, read_ends(frozen.work), int(most_mib))
    if status == _REQUEUES:
        changes, then = None, _ENDS
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


def with_remedy(failure: Failure, frozen: FrozenStage) -> Failure:
    """The same; where an input is damaged, with the command that has it made anew: a job cannot."""
    if failure.cause is not Cause.SETTINGS or not any(frozen.store.known_damage(*key) for key in frozen.reads):
        return failure
    what = failure.message.partition("; ")[0]
    command = shlex.join(["unclip", "submit", *overrides_to_rebuild(frozen)])
    return replace(failure, message=f"{what}; this makes it anew, and goes on from there: {command}")


def overrides_to_rebuild(frozen: FrozenStage) -> list[str]:
    """What is typed after `unclip submit` for the same run, and damaged artifacts made anew."""
    outputs = str(frozen.outputs)
    if not re.fullmatch(r"[\w./-]+", outputs):
        outputs = "'" + outputs.replace("\\", "\\\\").replace("'", "\\'") + "'"
    given = [f"run.name={frozen.run}", f"paths.outputs={outputs}", "store.on_damage=rebuild"]
    if frozen.group != frozen.run:
        given.append(f"+run.group={frozen.group}")
    keys = {key_of(each) for each in given}
    return [*(each for each in frozen.overrides if key_of(each) not in keys), *given]


def decide(
    path: Path, policy: Policy, end: End, ends: Sequence[End], most_mib: int = 0
) -> tuple[list[str] | None, str]:
    """What to change of the job before it starts again, or None where it does not; and that in words.

    Memory is raised to at most `most_mib`, if that is known; after that, smaller micro-batches have to do.
    """
    assert end.cause is not None, "only a start that failed is followed by another one"
    of_job = [each for each in ends if each.job == end.job and each.start < end.start]
    causes = [each.cause for each in of_job]
    count = starts_again(policy.times, end.cause, causes)
    if count is None:
        return None, _ENDS
    changes: list[str] = []
    number = 1 + causes.count(end.cause)
    had_mib, mem_mib = (policy.memory_mib(number - tried, most_mib) for tried in (1, 0))
    if end.cause is Cause.OUT_OF_MEMORY and mem_mib > had_mib:
        changes.append(f"MinMemoryNode={mem_mib}")
    elif end.cause in (Cause.OUT_OF_MEMORY, Cause.OUT_OF_DEVICE_MEMORY):
        half = halve_micro_batch(path)
        if half is None:
            no_node = f"no node here gives more than {mem_mib} MiB and " if 0 < mem_mib == most_mib else ""
            return None, f"{_ENDS}, as {no_node}there is no micro-batch to halve"
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
