"""What of a store can go: what no run needs, and what finished stages went on from."""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from pipeline.store.references import References, entries
from pipeline.store.remote import PULLING
from pipeline.workflow.artifacts import MANIFEST, ArtifactStore
from pipeline.workflow.code import DIRECTORY as CODE
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.progress import CHECKPOINTS, COMPILER_CACHE
from pipeline.workflow.runs import BUILDING

_LEFT_OVER = {".building-": "its process has ended", ".damaged-": "another was made in its place"}
"""Names beside artifacts, before `<fingerprint>-<something>`."""
_FILES_LEFT_OVER = {
    f"{PULLING}*": "its pull was stopped",
    "submitting/*.stages": "its jobs have ended",
    f"runs/{BUILDING}*.[0-9]*": "its command was stopped",
}
"""Pulls at work, what jobs of several stages were told at their start, and folders of runs that were being made."""
_RECORDS_LEFT_OVER = ("runs/*", "artifacts/*/[!.]*", "work/*/*", "work/*/*/*")
"""Where a process that was killed may have left the beginning of a record: `.<name>.json.<process>`."""
_SECONDS_TO_WRITE = 600.0
_SNAPSHOT = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}-\d+")
"""One that is whole, or one that was being written by a process of that number."""
_BLOCK_BYTES = 512


class Kind(StrEnum):
    """What something in a store is."""

    ARTIFACT = "artifact"
    LEFT_OVER = "left over"
    WORK = "work folder"
    CHECKPOINTS = "checkpoints"
    CODE = "code"
    COMPILER_CACHE = "compiler's cache"


@dataclass(frozen=True)
class Space:
    """Bytes on disk, and when the newest file was changed (seconds since the epoch)."""

    size_bytes: int
    changed_at: float


@dataclass(frozen=True)
class Removable:
    """Something that can go, and why. `key` is None for what belongs to no stage.

    `needed_until` is when a run ceased to need it (seconds since the epoch), where that is known.
    """

    kind: Kind
    path: Path
    key: StageKey | None
    why: str
    needed_until: float = 0.0

    @cached_property
    def space(self) -> Space:
        """What it takes. Walks through it, once."""
        return measured(self.path)

    @property
    def age_s(self) -> float:
        """Seconds since it was changed, or since a run ceased to need it."""
        return time.time() - max(self.space.changed_at, self.needed_until)


@dataclass(frozen=True)
class Found:
    """What goes, and what stays although no run needs it, with the reason."""

    going: Sequence[Removable]
    staying: Sequence[tuple[Removable, str]]

    @property
    def size_bytes(self) -> int:
        """What goes takes so much."""
        return sum(each.space.size_bytes for each in self.going)


def split(candidates: Iterable[Removable], why_not: Callable[[Removable], str | None]) -> Found:
    """What goes is what `why_not` has nothing to say of."""
    going: list[Removable] = []
    staying: list[tuple[Removable, str]] = []
    for each in candidates:
        why = why_not(each)
        if why is None:
            going.append(each)
        else:
            staying.append((each, why))
    return Found(going, staying)


def removables(
    outputs: Path, references: References, *, keeps_checkpoints: bool, takes_caches: bool
) -> Iterator[Removable]:
    """All that can go as far as the runs are concerned; `obstacle` says what stands in the way."""
    for kind, tree in ((Kind.ARTIFACT, "artifacts"), (Kind.WORK, "work")):
        for key, path in entries(outputs, tree):
            if key not in references.users:
                earlier = references.earlier.get(key)
                why = f"run {earlier.run} has another config now" if earlier else "no run needs it"
                yield Removable(kind, path, key, why, earlier.replaced_at if earlier else 0.0)
    for beginning, why in _LEFT_OVER.items():
        for path in sorted(outputs.glob(f"artifacts/*/{beginning}*")):
            key = path.parent.name, path.name.removeprefix(beginning).rpartition("-")[0]
            yield Removable(Kind.LEFT_OVER, path, key, why)
    for pattern, why in _FILES_LEFT_OVER.items():
        for path in sorted(outputs.glob(pattern)):
            yield Removable(Kind.LEFT_OVER, path, None, why)
    for place in _RECORDS_LEFT_OVER:
        for path in sorted(outputs.glob(f"{place}/.*.json.[0-9]*")):
            if time.time() - measured(path).changed_at > _SECONDS_TO_WRITE:
                yield Removable(Kind.LEFT_OVER, path, None, "its writer was killed")
    store = ArtifactStore(outputs)
    for key in references.users if not keeps_checkpoints else ():
        path = store.work(*key) / CHECKPOINTS
        if path.is_dir() and (store.path(*key) / MANIFEST).exists() and not _is_pinned(key, references):
            yield Removable(Kind.CHECKPOINTS, path, key, "its stage is finished")
    for path in sorted((outputs / CODE).glob("*")):
        if _SNAPSHOT.fullmatch(path.name) and path.name not in references.code:
            yield Removable(Kind.CODE, path, None, "nothing is to run it")
    cache = outputs / COMPILER_CACHE
    if takes_caches and cache.is_dir():
        yield Removable(Kind.COMPILER_CACHE, cache, None, "it can be made again")


def obstacle(outputs: Path, each: Removable, references: References) -> str | None:
    """Why it has to stay, whoever asks; None if nothing stands in the way."""
    if each.kind is Kind.CODE:
        return "something is to run it" if each.path.name in references.code else None
    if each.key is None:
        return next((f"{stage} uses it: {why}" for (stage, _), why in references.busy.items()), None)
    if each.key in references.busy:
        return references.busy[each.key]
    if each.kind in (Kind.ARTIFACT, Kind.WORK) and each.key in references.users:
        return f"run {references.users[each.key][0]} needs it"
    if each.kind is Kind.CHECKPOINTS:
        if _is_pinned(each.key, references):
            return "its run is pinned"
        if not (ArtifactStore(outputs).path(*each.key) / MANIFEST).exists():
            return "its stage is not finished"
    return None


def measured(path: Path) -> Space:
    """What a file or a folder takes on disk; links are not followed. What vanishes meanwhile is not counted."""
    size_bytes, changed_at = 0, 0.0
    pending = [str(path)]
    while pending:
        place = pending.pop()
        try:
            status = os.lstat(place)
            if stat.S_ISDIR(status.st_mode):
                pending += [entry.path for entry in os.scandir(place)]
        except OSError:
            continue
        size_bytes += status.st_blocks * _BLOCK_BYTES
        changed_at = max(changed_at, status.st_mtime)
    return Space(size_bytes, changed_at)


def _is_pinned(key: StageKey, references: References) -> bool:
    return any(name in references.pinned for name in references.users.get(key, ()))
