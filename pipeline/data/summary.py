"""The short half of a shard index: what a plan and a fingerprint need. Imports neither numpy nor torch."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.shards import is_url
from pipeline.errors import UserError

SCHEMA_VERSION = 1
SUMMARY_FILE = "index.json"
ARRAYS_FILE = "index.npz"


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was when it was walked.

    `name` is relative to the index's root, or a URL; `mtime_ns` is 0 where it is not known; `digest` is the SHA-256 of
    the listing of its members (name, offset, size); `left_out` counts incomplete samples by reason.
    """

    name: str
    bytes: int
    mtime_ns: int
    samples: int
    digest: str
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class IndexSummary:
    """All shards of an index; `arrays_sha256` ties the summary to its arrays."""

    shards: tuple[ShardEntry, ...]
    arrays_sha256: str

    @property
    def samples(self) -> int:
        """The number of complete samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def left_out(self) -> dict[str, int]:
        """Incomplete samples by reason, over all shards."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            for reason, count in shard.left_out.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    def select(self, names: Sequence[str], where: str) -> "IndexSummary":
        """Keep the named shards, in the order named; raises UserError where one was not indexed."""
        known = {shard.name: shard for shard in self.shards}
        for name in names:
            if name not in known:
                raise UserError(f"{name} is not in the index of {where}; {index_again(where)}")
        return replace(self, shards=tuple(known[name] for name in names))


def index_again(directory: Path | str) -> str:
    """The remedy of an index that does not fit its shards, as a line for a shell."""
    return f"run `unclip shards index {shlex.quote(str(directory))}`"


def read_summary(directory: Path) -> IndexSummary:
    """Read `index.json`.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    path = directory / SUMMARY_FILE
    remedy = index_again(directory)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {content['schema_version']}, this version reads {SCHEMA_VERSION}; {remedy}"
            )
        shards = tuple(ShardEntry(**entry) for entry in content["shards"])
        return IndexSummary(shards=shards, arrays_sha256=content["arrays_sha256"])
    except FileNotFoundError:
        raise UserError(f"{directory} has no index ({SUMMARY_FILE}), which training needs; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an index ({error}); {remedy}") from error


def summary_text(summary: IndexSummary) -> str:
    """The content of `index.json`: the same summary gives the same text."""
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "samples": summary.samples,
        "left_out": summary.left_out,
        "arrays_sha256": summary.arrays_sha256,
        "shards": [asdict(shard) for shard in summary.shards],
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def index_identity(summary: IndexSummary) -> dict[str, Any]:
    """What makes data the same data, for fingerprints: names, sizes, sample counts and listings; no place, no time."""
    return {
        "shards": [
            {"name": shard.name, "bytes": shard.bytes, "samples": shard.samples, "digest": shard.digest}
            for shard in summary.shards
        ]
    }


def check_shard_sizes(summary: IndexSummary, root: Path) -> None:
    """Compare local shards with what was indexed.

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
            raise UserError(f"{path} is in the index but not on disk; {index_again(root)}") from None
        if found != shard.bytes:
            raise UserError(f"{path} has {found} bytes and had {shard.bytes} when it was indexed; {index_again(root)}")
