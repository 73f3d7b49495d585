"""At most so many jobs of a run or sweep at a time, by dependencies alone: no process stays behind to watch.

Each job is put into one of `max_parallel` lanes and waits for all jobs of its lane to end, however they end. The lane
is chosen as a foreman would: the one that would be free first, if every job took its time limit.
"""

from collections.abc import Sequence

from pipeline.launch.slurm.commands import JobId


class Lanes:
    """The lanes of one submission; without a limit there are none."""

    def __init__(self, max_parallel: int | None) -> None:
        self._jobs: list[list[JobId]] = [[] for _ in range(max_parallel or 0)]
        self._free_at = [0.0] * len(self._jobs)
        self._ends_at: dict[JobId, float] = {}

    def occupy(self, lane: int | None, job_id: JobId) -> None:
        """Take in a job of an earlier submission of the same sweep, in the lane that it had then."""
        if self._jobs:
            self._jobs[(lane or 0) % len(self._jobs)].append(job_id)

    def choose(self, after: Sequence[JobId], time_limit_min: float) -> int | None:
        """The lane in which a job that waits for those jobs would end first; None without a limit."""
        if not self._jobs:
            return None
        ready_at = self._ready_at(after)
        # Of the lanes that would start it at the same time the one that has been idle the shortest.
        return min(
            range(len(self._jobs)),
            key=lambda lane: (max(self._free_at[lane], ready_at) + time_limit_min, -self._free_at[lane]),
        )

    def jobs_of(self, lane: int) -> Sequence[JobId]:
        """Every job of a lane.

        The last one alone would not do: a job whose inputs failed ends at once, while those before it may go on.
        """
        return self._jobs[lane]

    def add(self, lane: int | None, job_id: JobId, after: Sequence[JobId], time_limit_min: float) -> None:
        """Put a submitted job into its lane."""
        if lane is None:
            return
        self._jobs[lane].append(job_id)
        ends_at = max(self._free_at[lane], self._ready_at(after)) + time_limit_min
        self._free_at[lane] = self._ends_at[job_id] = ends_at

    def _ready_at(self, after: Sequence[JobId]) -> float:
        return max((self._ends_at.get(job_id, 0.0) for job_id in after), default=0.0)
