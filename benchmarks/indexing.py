"""How fast shards are indexed, beside Python's own tar reader and beside reading the files alone.

    python benchmarks/indexing.py

Shards are written by webdataset's writer, as img2dataset writes them: a picture, a caption and a JSON for each sample,
and a PAX header before each member. unclip reads and digests every byte; `tarfile` (with webdataset's grouping) reads
the headers alone. The files are in the system's cache. Medians of the passes, which are taken in turn.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from pipeline.data.indexing import index_place
from pipeline.data.place import ShardPlace


def write_shards(directory: Path, shards: int, samples: int, picture_bytes: int) -> None:
    """Shards as img2dataset writes them, with noise for pictures: nothing decodes them here."""
    from webdataset import TarWriter

    rng = random.Random(0)
    for shard in range(shards):
        with TarWriter(str(directory / f"{shard:05d}.tar"), encoder=False) as writer:
            for number in range(samples):
                key = f"{shard:05d}{number:04d}"
                caption = f"a caption of picture {key}"
                fields = {"caption": caption, "url": f"https://example.org/{key}.jpg", "width": 256, "height": 256}
                picture = rng.randbytes(rng.randint(picture_bytes // 2, picture_bytes * 3 // 2))
                writer.write(
                    {"__key__": key, "jpg": picture, "txt": caption.encode(), "json": json.dumps(fields).encode()}
                )


def by_unclip(workers: int, directory: Path) -> None:
    """The whole of `unclip shards index`, but for the start of the program."""
    index_place(ShardPlace(shards=(str(directory),)), workers, again=True)


def by_tarfile(directory: Path) -> None:
    """Headers alone, one process."""
    import tarfile

    from webdataset.tariterators import group_by_keys

    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = ({"fname": each.name, "data": each.offset_data, "__url__": None} for each in archive)
            for _ in group_by_keys(members):
                pass


def by_reading(directory: Path) -> None:
    """The bytes alone, one process."""
    for path in sorted(directory.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**22):
                pass


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--samples", type=int, default=2000, help="in each shard")
    parser.add_argument("--picture-kb", type=int, default=20, help="mean size of a picture")
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    ways: dict[str, Callable[[Path], None]] = {
        "tarfile": by_tarfile, "unclip, 1 process": partial(by_unclip, 1),
        f"unclip, {cores} processes": partial(by_unclip, cores),
        "reading alone": by_reading,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_shards(directory, options.shards, options.samples, 1000 * options.picture_kb)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.passes):
            for name, index in ways.items():
                started = time.perf_counter()
                index(directory)
                seconds[name].append(time.perf_counter() - started)
    samples = options.shards * options.samples
    print("| | samples/s | of tarfile |\n|---|---|---|")
    for name, taken in seconds.items():
        ratio = median(slow / fast for slow, fast in zip(seconds["tarfile"], taken, strict=True))
        print(f"| {name} | {samples / median(taken):,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
