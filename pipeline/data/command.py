"""`unclip shards index PATH`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.shards import expand_shards
from pipeline.data.walk import update_index


def shards_command(arguments: Sequence[str]) -> int:
    """Index the shards that are named; a shard that did not change is not walked again."""
    parser = argparse.ArgumentParser("unclip shards", description="Indices of WebDataset shards.")
    actions = parser.add_subparsers(dest="action", required=True)
    index = actions.add_parser("index", help="walk tar headers and write an index beside the shards")
    index.add_argument("shards", nargs="+", help="a directory, a brace pattern, paths or URLs")
    index.add_argument("--cache", type=Path, default=Path("outputs/cache"), help="where remote shards are kept")
    options = parser.parse_args(arguments)
    directory, indexed = update_index(expand_shards(options.shards, allow_shell_urls=False), options.cache.absolute())
    print(f"{len(indexed):,} samples in {len(indexed.shards):,} shards; index in {directory}")
    left_out = sum(sum(shard.left_out.values()) for shard in indexed.shards)
    if left_out:
        print(f"{left_out:,} samples left out: see index.json for the reasons, shard by shard")
    return 0
