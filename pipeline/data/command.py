"""`unclip shards index PATH` and `unclip shards check PATH`."""

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.shards import expand_shards
from pipeline.data.walk import update_index

EXIT_FAULTY = 1


def shards_command(arguments: Sequence[str]) -> int:
    """Index or check the shards that are named."""
    parser = argparse.ArgumentParser("unclip shards", description="Indices of WebDataset shards, and what is in them.")
    actions = parser.add_subparsers(dest="action", required=True)
    index = actions.add_parser("index", help="walk tar headers and write an index beside the shards")
    check = actions.add_parser("check", help="read and decode every sample of indexed shards; exit status 1 for faults")
    for action in (index, check):
        action.add_argument("shards", nargs="+", help="a directory, a brace pattern, paths or URLs")
        action.add_argument("--cache", type=Path, default=Path("outputs/cache"), help="where remote shards are kept")
        action.add_argument("--cache-gib", type=float, help="how much of them is kept (default: all)")
    check.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="shards that are checked at once")
    options = parser.parse_args(arguments)
    shards = expand_shards(options.shards, allow_shell_urls=False)
    cache_bytes = None if options.cache_gib is None else int(options.cache_gib * 2**30)
    if options.action == "index":
        return _index(shards, options.cache.absolute(), cache_bytes)
    return _check(shards, options.cache.absolute(), cache_bytes, max(1, options.workers))


def _index(shards: Sequence[str], cache_dir: Path, cache_bytes: int | None) -> int:
    directory, indexed = update_index(shards, cache_dir, cache_bytes)
    print(f"{len(indexed):,} samples in {len(indexed.shards):,} shards; index in {directory}")
    left_out = sum(sum(shard.left_out.values()) for shard in indexed.shards)
    if left_out:
        print(f"{left_out:,} samples left out: see index.json for the reasons, shard by shard")
    return 0


def _check(shards: Sequence[str], cache_dir: Path, cache_bytes: int | None, workers: int) -> int:
    from pipeline.data.check import check_shards

    samples, faults = 0, Counter[str]()
    for report in check_shards(shards, cache_dir, cache_bytes, workers):
        samples += report.samples
        faults.update(report.faults)
        if report.faults:
            print(f"{report.name}: {_counts(report.faults)}", flush=True)
    print(f"{samples:,} samples in {len(shards):,} shards: {_counts(faults) if faults else 'all can be used'}")
    return EXIT_FAULTY if faults else 0


def _counts(faults: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(faults).most_common())
