"""Loader throughput beside the decode ceiling and other loaders, and the first batch after a resume.

    pip install -e '.[benchmarks]'
    python benchmarks/loader.py --images 6000 --passes 3 --peers unclip plain open_clip dali

Photographs that come with scikit-image and scikit-learn are cropped at random, written as JPEG (quality 90) into
shards, and read back as squares: decoded, reduced, centre-cropped, float32 in [-1, 1] (normalised by open_clip), in
batches of 64, by two workers. Each peer is a process of its own; counted are images per second of CPU time of that
process and its workers, from the fourth batch on, and no loader comes to its end meanwhile. open_clip tokenises the
captions besides. The ceiling is simplejpeg decoding the same bytes in two processes at
once, and nothing else. PSNR is that of the pixels against a whole decode and Pillow's bicubic reduction.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from PIL import Image

if TYPE_CHECKING:
    from pipeline.data.batch import ImageBatch

BATCH_SIZE = 64
WORKERS = 2
SIZES = ((256, 224), (256, 64), (512, 224), (512, 64))
WARM_UP_BATCHES = 4
SHARD_SAMPLES = 500
RESUME_SAMPLES = 200_000


def photographs() -> list[Image.Image]:
    """The colour photographs of two packages."""
    import skimage
    import sklearn

    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png", "ihc.png")
    places = [Path(skimage.__file__).parent / "data" / name for name in names]
    places += [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    return [Image.open(place).convert("RGB") for place in places]


def jpegs(size: int, count: int) -> Iterator[bytes]:
    """Random square crops of the photographs, reduced to `size` and encoded."""
    found, rng = photographs(), random.Random(0)
    for number in range(count):
        photo = found[number % len(found)]
        side = int(min(photo.size) * rng.uniform(0.6, 1.0))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        content = io.BytesIO()
        box = (left, top, left + side, top + side)
        photo.resize((size, size), Image.Resampling.BICUBIC, box=box).save(content, "JPEG", quality=90)
        yield content.getvalue()


def write_data(directory: Path, pictures: Iterable[bytes], shard_samples: int) -> None:
    """Shards with an index and a split in which everything trains."""
    from pipeline.data.make import make_prepared
    from pipeline.data.splits import Split
    from pipeline.data.write import SourceSample, pack

    samples = (
        (pack(SourceSample(f"{number:06d}", content, "jpg", "a photograph", {})), Split.TRAIN)
        for number, content in enumerate(pictures)
    )
    make_prepared(directory, samples, shard_samples)


def shards(directory: Path) -> str:
    """The shards as a brace pattern."""
    last = len(list((directory / "shards").glob("*.tar"))) - 1
    return f"{directory}/shards/{{00000..{last:05d}}}.tar"


def unclip_batches(directory: Path, target: int) -> Iterator[Any]:
    """This project's training loader, and the conversion to float32 that every other peer does in its workers."""
    for image in unclip_uint8_batches(directory, target):
        yield image.to(torch.float32).div_(127.5).sub_(1.0)


def unclip_uint8_batches(directory: Path, target: int) -> Iterator[Any]:
    """This project's training loader as it is: uint8 batches, which become float32 on the training device."""
    for batch in unclip_loader(directory, target, 0.0, WORKERS):
        yield batch.image


def unclip_loader(directory: Path, target: int, begins_at: float, workers: int) -> "Iterable[ImageBatch]":
    """This project's training loader, from that share of an epoch on."""
    from pipeline.data.dataset import CaptionedImages
    from pipeline.data.loader import training_loader

    images = CaptionedImages(directory, target)
    return training_loader(
        images, seed=0, global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, rank=0, world_size=1,
        first_batch=int(begins_at * (len(images) // BATCH_SIZE)), batches=10**9, workers=workers,
    )  # fmt: skip


def plain_batches(directory: Path, target: int) -> Iterator[Any]:
    """The idiom of webdataset's documentation."""
    import webdataset as wds
    from torchvision import transforms

    transform = transforms.Compose([
        transforms.Resize(target, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(target),
        transforms.ToTensor(), transforms.Normalize(0.5, 0.5),
    ])  # fmt: skip
    data = wds.WebDataset(shards(directory), shardshuffle=True, resampled=True).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "txt").map_tuple(transform, str).batched(BATCH_SIZE)
    for image, _ in wds.WebLoader(data, batch_size=None, num_workers=WORKERS):
        yield image


def open_clip_batches(directory: Path, target: int) -> Iterator[Any]:
    """open_clip's own loader, with its evaluation transform: that of training crops at random."""
    import webdataset.tariterators
    from open_clip import get_tokenizer, image_transform
    from open_clip_train import data

    def tar_file_expander(*arguments: Any, **options: Any) -> Any:
        return webdataset.tariterators.tar_file_expander(*arguments, eof_value=None, **options)

    data.tar_file_expander = tar_file_expander
    settings = SimpleNamespace(
        train_data=shards(directory), train_data_upsampling_factors=None, train_num_samples=10**9, val_num_samples=0,
        seed=0, dataset_resampled=True, batch_size=BATCH_SIZE, workers=WORKERS, world_size=1, rank=0,
    )  # fmt: skip
    transform = image_transform(target, is_train=False)
    found = data.get_wds_dataset(settings, transform, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    for image, _ in found.dataloader:
        yield image


def dali_batches(directory: Path, target: int) -> Iterator[Any]:
    """DALI's pipeline on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    paths = sorted(str(path) for path in (directory / "shards").glob("*.tar"))

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=WORKERS, device_id=None)
    def pipeline() -> Any:
        encoded, text = fn.readers.webdataset(paths=paths, ext=["jpg", "txt"], random_shuffle=True, initial_fill=1000)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        image = fn.resize(image, resize_shorter=target, interp_type=types.INTERP_CUBIC, antialias=True)
        mean = [127.5] * 3
        image = fn.crop_mirror_normalize(
            image, crop=(target, target), mean=mean, std=mean, dtype=types.FLOAT, output_layout="CHW"
        )
        return image, text

    built = pipeline()
    built.build()
    while True:
        yield built.run()[0].as_array()


PEERS: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "unclip": unclip_batches,
    "unclip_uint8": unclip_uint8_batches,
    "plain": plain_batches,
    "open_clip": open_clip_batches,
    "dali": dali_batches,
}


def cpu_seconds() -> float:
    """CPU time of this process and of its workers, which must be alive."""
    this = psutil.Process()
    used = [each.cpu_times() for each in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in used)


def measure_peer(name: str, directory: Path, target: int, images: int) -> None:
    """Run one peer in this process; print its images per CPU second as JSON."""
    torch.set_num_threads(1)
    batches = PEERS[name](directory, target)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    before = cpu_seconds()
    seen = sum(len(batch) for batch in islice(batches, images // BATCH_SIZE))
    print(json.dumps({"images_per_cpu_s": seen / (cpu_seconds() - before)}), flush=True)
    os._exit(0)  # nothing of what the workers still do is of interest


def _decode_all(contents: list[bytes]) -> tuple[int, float]:
    import simplejpeg

    started = time.process_time()
    for content in contents:
        simplejpeg.decode_jpeg(content, "RGB")
    return len(contents), time.process_time() - started


def ceiling(size: int, images: int) -> float:
    """Images per CPU second that decoding alone reaches, with all cores busy."""
    contents = list(jpegs(size, images))
    with ProcessPoolExecutor(WORKERS) as pool:
        done = list(pool.map(_decode_all, [contents] * WORKERS))
    return sum(count for count, _ in done) / sum(seconds for _, seconds in done)


def quality(size: int, target: int) -> str:
    """PSNR of this project's pixels against a whole decode and Pillow's reduction: mean and least, in dB."""
    from pipeline.data.square import central_square

    found = []
    for content in jpegs(size, 90):
        whole = Image.open(io.BytesIO(content)).resize((target, target), Image.Resampling.BICUBIC)
        error = central_square(content, target).transpose(1, 2, 0).astype(float) - np.asarray(whole)
        found.append(10 * np.log10(255**2 / np.mean(error**2)))
    return f"{np.mean(found):.0f} ({min(found):.0f})"


def first_batch_s(directory: Path, share: float) -> float:
    """Seconds from nothing to the first batch of a resume at that share of an epoch."""
    started = time.perf_counter()
    next(iter(unclip_loader(directory, 64, share, workers=0)))
    return time.perf_counter() - started


def main() -> None:
    """Measure everything and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000, help="images that each peer reads in a pass")
    parser.add_argument("--passes", type=int, default=3, help="the median of these is shown")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--measure", nargs=3, metavar=("PEER", "DIRECTORY", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        peer, directory, target = options.measure
        return measure_peer(peer, Path(directory), int(target), options.images)
    with tempfile.TemporaryDirectory() as temporary:
        _throughput(Path(temporary), options)
        _resume(Path(temporary))
    return None


def _throughput(temporary: Path, options: argparse.Namespace) -> None:
    print(f"| JPEG, target | ceiling, images/CPU s | {' | '.join(options.peers)} | PSNR, dB (least) |")
    print(f"|---|---|{'---|' * len(options.peers)}---|", flush=True)
    for size in sorted({size for size, _ in SIZES}):
        write_data(temporary / str(size), jpegs(size, 2000), SHARD_SAMPLES)
    for size, target in SIZES:
        speeds: dict[str, list[float]] = {peer: [] for peer in ("ceiling", *options.peers)}
        for _ in range(options.passes):
            speeds["ceiling"].append(ceiling(size, 500))
            for peer in options.peers:
                speeds[peer].append(_run_peer(peer, temporary / str(size), target, options.images))
        best = median(speeds["ceiling"])
        cells = [f"{median(speeds[peer]):,.0f} ({median(speeds[peer]) / best:.0%})" for peer in options.peers]
        print(f"| {size} -> {target} | {best:,.0f} | {' | '.join(cells)} | {quality(size, target)} |", flush=True)


def _run_peer(peer: str, directory: Path, target: int, images: int) -> float:
    command = [sys.executable, __file__, "--images", str(images), "--measure", peer, str(directory), str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])["images_per_cpu_s"]


def _resume(temporary: Path) -> None:
    (content,) = jpegs(64, 1)
    write_data(temporary / "resume", repeat(content, RESUME_SAMPLES), 2000)
    print(f"\nFirst batch after a resume, {RESUME_SAMPLES:,} samples in {RESUME_SAMPLES // 2000} shards:")
    for share in (0.01, 0.5, 0.99):
        seconds = median(first_batch_s(temporary / "resume", share) for _ in range(5))
        print(f"  at {share:.0%} of an epoch: {seconds:.2f} s")


if __name__ == "__main__":
    main()
