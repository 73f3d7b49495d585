"""Which stages become one call of `sbatch`: tasks of an array, and in each task the stages of members that share it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from pipeline.launch.slurm.batch import BatchJob, render, render_several
from pipeline.launch.slurm.commands import JobId
from pipeline.launch.slurm.settings import SlurmResources
from pipeline.workflow.frozen import FrozenStage, StageKey


@dataclass(frozen=True)
class PlannedJob:
    """A stage that is to be a job. `needs` are the stages before it that are not finished.

    `place` is that of the first of its members among those submitted, which is its task in an array.
    `time_limit_key` is where its time limit stands.
    """

    stage: FrozenStage
    group: str
    members: tuple[str, ...]
    resources: SlurmResources
    needs: tuple[StageKey, ...]
    place: int
    time_limit_key: str

    @cached_property
    def batch(self) -> BatchJob:
        """What sbatch is given for it alone."""
        return render(self.stage, self.resources)

    @property
    def key(self) -> StageKey:
        """What it will make."""
        return self.stage.stage, self.stage.fingerprint

    @property
    def members_per_job(self) -> int:
        """How many stages like it share a job: of those that need more than a node none do."""
        return self.resources.members_per_job if self.stage.tasks.nodes == 1 else 1


@dataclass(frozen=True)
class Group:
    """One call of `sbatch`: an array if there are several tasks, each of one stage or of several side by side.

    All tasks wait for the jobs `after`, and each for the task of its own number in the arrays `corresponding`.
    """

    tasks: Mapping[int, Sequence[PlannedJob]]
    after: tuple[JobId, ...]
    corresponding: tuple[JobId, ...]

    @cached_property
    def jobs(self) -> list[PlannedJob]:
        """The stages of all tasks."""
        return [job for _, job in self.items()]

    def items(self) -> Iterator[tuple[int, PlannedJob]]:
        """Each stage with its task."""
        return ((task, job) for task, jobs in self.tasks.items() for job in jobs)

    @property
    def is_array(self) -> bool:
        """Whether it has several tasks."""
        return len(self.tasks) > 1

    def id_of(self, task: int, number: JobId) -> JobId:
        """The id of a task, once Slurm has given the whole that number."""
        return f"{number}_{task}" if self.is_array else number

    @property
    def dependencies(self) -> list[str]:
        """What it waits for, as `--dependency` has it. Of a job of several stages that means: one of them is there."""
        (after, corresponding), (first, *_) = (self.after, self.corresponding), self.tasks
        if not self.is_array:
            after, corresponding = (*after, *(f"{number}_{first}" for number in corresponding)), ()
        kinds = (("afterok", after), ("aftercorr", corresponding))
        return [f"{kind}:{':'.join(ids)}" for kind, ids in kinds if ids]

    def batch(self, table: Path) -> BatchJob:
        """What sbatch is given; the file `table` is to say what the tasks are, if it is not one stage alone."""
        first = self.jobs[0]
        if len(self.jobs) == 1:
            return first.batch
        side_by_side = max(map(len, self.tasks.values()))
        tasks = list(self.tasks) if self.is_array else None
        return render_several(first.stage, first.resources, table, side_by_side, tasks)

    @property
    def table(self) -> bytes:
        """Four texts for each stage, each with a zero byte behind it: its task, if any, and what its script is told."""
        rows = ((str(task) if self.is_array else "", *job.batch.stage, *job.batch.frozen) for task, job in self.items())
        texts = (text for row in rows for text in row)
        return "".join(f"{text}\0" for text in texts).encode()


def rounds(jobs: Iterable[PlannedJob]) -> Iterator[list[PlannedJob]]:
    """The jobs of like stages together, each round after those that it needs."""
    depths: dict[StageKey, int] = {}
    for job in jobs:
        depths[job.key] = 1 + max((depths.get(key, 0) for key in job.needs), default=0)

    def place(job: PlannedJob) -> tuple[int, str]:
        return depths[job.key], job.stage.stage

    for _, alike in groupby(sorted(jobs, key=place), key=place):
        yield list(alike)


def groups(jobs: Iterable[PlannedJob], id_of: Callable[[StageKey], JobId | None], max_tasks: int) -> list[Group]:
    """Those of one round as few calls: one for all that ask for the same, and wait for the same or for their like.

    `id_of` is the job of what they need, None where that is finished. An array has at most `max_tasks`.
    """
    found: dict[object, dict[int, list[PlannedJob]]] = {}
    waits: dict[object, tuple[tuple[JobId, ...], tuple[JobId, ...]]] = {}
    for job in jobs:
        chunk, task = divmod(job.place // job.members_per_job, max_tasks)
        needed = dict.fromkeys(job_id for key in job.needs if (job_id := id_of(key)) is not None)
        corresponding = tuple(each.rpartition("_")[0] for each in needed if each.endswith(f"_{task}"))
        after = tuple(each for each in needed if not each.endswith(f"_{task}"))
        kind = (chunk, after, corresponding, job.batch.asked, job.batch.script, job.batch.command)
        found.setdefault(kind, {}).setdefault(task, []).append(job)
        waits[kind] = after, corresponding
    return [Group(dict(sorted(tasks.items())), *waits[kind]) for kind, tasks in found.items()]


def planned_groups(jobs: Iterable[PlannedJob], max_tasks: int) -> Iterator[Group]:
    """The calls that there would be, with `JOB_OF_<name>` for numbers that only Slurm gives."""
    ids: dict[StageKey, JobId] = {}
    for alike in rounds(jobs):
        for group in groups(alike, ids.get, max_tasks):
            number = f"JOB_OF_{group.jobs[0].batch.name}"
            ids |= {job.key: group.id_of(task, number) for task, job in group.items()}
            yield group
