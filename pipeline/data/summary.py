"""The short half of a shard index: what a plan and a fingerprint need. Imports neither numpy nor torch."""

import json
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.data.shards import is_url
from pipeline.errors import UserError

SCHEMA_VERSION = 2
SUMMARY_FILE = "index.json"
ARRAYS_FILE = "index.npz"

PICTURES = "image"
"""The name of the pictures among the contents of a shard; texts have their extension's."""


class SizeCheck(Enum):
    """Whether opening an index compares the local shards with it."""

    COMPARE = "compare"
    SKIP = "skip"


@dataclass(frozen=True)
class ShardContents:
    """One kind of content: how many samples of the shard have it, and its SHA-256 over place and content."""

    samples: int
    digest: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was when it was walked.

    `name` is the file's name in its directory, its path, or a URL; `mtime_ns` is 0 where it is not known. `contents`
    has the pictures (`PICTURES`) and the texts, by their extension. `left_out` counts what is wrong by reason: damage,
    and samples that are not complete. `skipped` counts what is no sample and is not meant to be one.
    """

    name: str
    bytes: int
    mtime_ns: int
    samples: int
    contents: Mapping[str, ShardContents]
    left_out: Mapping[str, int]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class IndexSummary:
    """All shards of an index; `arrays_sha256` ties the summary to its arrays.

    `root` is the directory of the shards where the index lies elsewhere.
    """

    shards: tuple[ShardEntry, ...]
    arrays_sha256: str
    root: str | None = None

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def left_out(self) -> Counter[str]:
        """What is wrong, by reason, over all shards."""
        return sum_of(shard.left_out for shard in self.shards)

    @property
    def skipped(self) -> Counter[str]:
        """What is no sample, by reason, over all shards."""
        return sum_of(shard.skipped for shard in self.shards)

    @property
    def texts(self) -> Counter[str]:
        """How many samples have a text, by its extension."""
        return sum_of(
            {name: found.samples for name, found in shard.contents.items() if name != PICTURES} for shard in self.shards
        )

    def select(self, names: Sequence[str], where: str, remedy: str | None = None) -> "IndexSummary":
        """Keep the named shards, in the order named; raises UserError where one was not indexed."""
        known = {shard.name: shard for shard in self.shards}
        missing = [name for name in names if name not in known]
        if missing:
            others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0]}{others} is not in the index of {where}; run `{remedy or index_command(where)}`"
            )
        return replace(self, shards=tuple(known[name] for name in names))


def sum_of(counts: Any) -> Counter[str]:
    """Several counts by reason, added up."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def index_command(*shards: str | Path) -> str:
    """The command that indexes these shards, as a shell takes it."""
    return shlex.join(["unclip", "shards", "index", *map(str, shards)])


def read_summary(directory: Path, remedy: str | None = None) -> IndexSummary:
    """Read `index.json`; `remedy` is the command that makes it anew.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    path = directory / SUMMARY_FILE
    remedy = f"run `{remedy or index_command(directory)}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {content['schema_version']}, this version reads {SCHEMA_VERSION}; {remedy}"
            )
        if content.pop("sha256") != _digest(content):
            raise ValueError("it was changed since it was written")
        shards = tuple(_entry(entry) for entry in content["shards"])
        return IndexSummary(shards, content["arrays_sha256"], content["root"])
    except FileNotFoundError:
        raise UserError(f"{directory} has no index ({SUMMARY_FILE}), which training needs; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an index ({error}); {remedy}") from error


def _entry(entry: Mapping[str, Any]) -> ShardEntry:
    contents = {name: ShardContents(**found) for name, found in entry["contents"].items()}
    return ShardEntry(**{**entry, "contents": contents})


def summary_text(summary: IndexSummary) -> str:
    """The content of `index.json`: the same summary gives the same text."""
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "samples": summary.samples,
        "texts": dict(sorted(summary.texts.items())),
        "left_out": dict(sorted(summary.left_out.items())),
        "skipped": dict(sorted(summary.skipped.items())),
        "arrays_sha256": summary.arrays_sha256,
        "root": summary.root,
        "shards": [asdict(shard) for shard in summary.shards],
    }
    return json.dumps({**content, "sha256": _digest(content)}, indent=1, sort_keys=True) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_identity(summary: IndexSummary, contents: Collection[str]) -> dict[str, Any]:
    """What makes data the same data, for fingerprints: the contents that are used, in order; no name, place or time."""
    return {
        "shards": [
            {
                "samples": shard.samples,
                **{name: asdict(shard.contents[name])["digest"] for name in sorted(contents) if name in shard.contents},
            }
            for shard in summary.shards
        ]
    }


def check_shard_sizes(summary: IndexSummary, root: Path, remedy: str) -> None:
    """Compare the sizes of local shards with what was indexed.

    Raises:
        UserError: a shard is gone, or its size changed since.
    """
    for shard in summary.shards:
        if is_url(shard.name):
            continue
        path = root / shard.name
        try:
            found = path.stat().st_size
        except OSError:
            raise UserError(f"{path} is in the index but not on disk; run `{remedy}`") from None
        if found != shard.bytes:
            raise UserError(f"{path} has {found} bytes and had {shard.bytes} when it was indexed; run `{remedy}`")
