"""`unclip du`: what each run and sweep holds, what they share, and what no run needs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipeline.data.place import DEFAULT_CACHE_DIR
from pipeline.store.references import entries, read_references
from pipeline.store.removable import measured, removables
from pipeline.store.trash import in_trash
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.runs import read_readable, run_directory, run_names


@dataclass(frozen=True)
class Holding:
    """A run or a sweep: what it needs, and how much of that nobody else needs. Removing it frees `alone_bytes`."""

    name: str
    runs: int
    stages: int
    bytes: int
    alone_bytes: int
    is_pinned: bool

    @property
    def shared_bytes(self) -> int:
        """What others need too."""
        return self.bytes - self.alone_bytes


@dataclass(frozen=True)
class Usage:
    """All of a store. `rest` has what is no run's, and what finished stages went on from: bytes by what it is."""

    runs: Sequence[Holding]
    sweeps: Sequence[Holding]
    rest: Mapping[str, int]
    total_bytes: int
    unreadable: Sequence[str]


def usage_of(outputs: Path) -> Usage:
    """Measure it."""
    _, damaged = read_readable(outputs, run_names(outputs))
    references = read_references(outputs, jobs={}, without=[each.run for each in damaged])
    sizes: Counter[StageKey] = Counter()
    for key, path in chain(entries(outputs, "artifacts"), entries(outputs, "work")):
        sizes[key] += measured(path).size_bytes
    folders = {name: measured(run_directory(outputs, name)).size_bytes for name in references.records}

    def holding(name: str, members: Sequence[str]) -> Holding:
        needed = {key for each in members for key in references.of_runs[each]}
        alone = {key for key in needed if set(references.users[key]) <= set(members)}
        own = sum(folders[each] for each in members)
        held, held_alone = (own + sum(sizes[key] for key in keys) for keys in (needed, alone))
        is_pinned = any(each in references.pinned for each in members)
        return Holding(name, len(members), len(needed), held, held_alone, is_pinned)

    sweeps: dict[str, list[str]] = {}
    for name, record in references.records.items():
        sweeps.setdefault(record.group, []).append(name)
    rest: Counter[str] = Counter()
    for each in removables(outputs, references, keeps_checkpoints=False, takes_caches=True):
        rest[f"{each.kind.value}: {each.why}"] += each.space.size_bytes
    rest["trash of a gc that was stopped"] = sum(measured(path).size_bytes for path in in_trash(outputs))
    rest["copies of remote shards"] = measured(outputs / DEFAULT_CACHE_DIR.name).size_bytes
    return Usage(
        _largest_first(holding(name, [name]) for name in references.records),
        _largest_first(holding(name, members) for name, members in sweeps.items() if len(members) > 1),
        {what: size for what, size in rest.most_common() if size},
        measured(outputs).size_bytes,
        tuple(f"{each}; until then, what it alone needs counts as needed by none" for each in damaged),
    )


def _largest_first(found: Iterable[Holding]) -> list[Holding]:
    return sorted(found, key=lambda each: -each.bytes)
