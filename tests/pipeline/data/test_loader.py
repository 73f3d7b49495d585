import json
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.batch import ImageBatch
from pipeline.data.captions import parse_sources
from pipeline.data.dataset import CaptionedImages, MadeAhead
from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.data.draws import SampleDraws
from pipeline.data.indexing import index_shards
from pipeline.data.loader import evaluation_loader, rows_loader, training_loader
from pipeline.data.mixture import Mixture
from pipeline.data.place import ShardPlace
from pipeline.data.prefetch import ShardPrefetch
from pipeline.data.prepared import read_prepared, write_prepared
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample, write_shards
from pipeline.errors import UserError
from tests.support.pictures import source_sample, tar
from tests.support.shards import split_of

OPTIONS: dict[str, Any] = {
    "seed": 5,
    "global_batch_size": 24,
    "micro_batch_size": 24,
    "rank": 0,
    "world_size": 1,
    "first_batch": 0,
    "batches": 5,
    "workers": 0,
}


def batches(images: CaptionedImages, **options: Any) -> list[ImageBatch]:
    return list(training_loader(images, **{**OPTIONS, **options}))


def stream(parts: list[ImageBatch]) -> list[tuple[int, int]]:
    return [pair for part in parts for pair in zip(part.sample.tolist(), part.sample_seed.tolist(), strict=True)]


def test_pictures_captions_and_rows_belong_together(prepared: Path):
    for batch in batches(CaptionedImages(prepared, 4)):
        assert batch.image.shape == (24, 3, 4, 4)
        assert batch.image.dtype == torch.uint8
        assert (batch.image[:, 0] == batch.sample[:, None, None]).all()
        assert batch.caption == tuple(f"picture {row}" for row in batch.sample.tolist())


def test_training_reads_the_training_split_and_an_epoch_has_each_of_it_once(prepared: Path):
    images = CaptionedImages(prepared, 4)
    expected = images.data.samples_in(Split.TRAIN)
    assert 30 < len(expected) < 50
    one_epoch = batches(images, global_batch_size=len(expected), micro_batch_size=7, batches=1)
    np.testing.assert_array_equal(np.sort([sample for sample, _ in stream(one_epoch)]), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 100])
def test_a_global_batch_is_the_same_for_any_ranks_and_micro_batches(
    prepared: Path, world_size: int, micro_batch_size: int
):
    images = CaptionedImages(prepared, 4)
    whole = [stream([batch]) for batch in batches(images)]
    per_rank = [
        batches(images, world_size=world_size, rank=rank, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    steps = len(per_rank[0]) // 5
    for k in range(5):
        parts = [batch for rank in per_rank for batch in rank[k * steps : (k + 1) * steps]]
        assert stream(parts) == whole[k]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_begins_in_the_middle_goes_on_as_the_whole_one_does(prepared: Path, workers: int):
    images = CaptionedImages(prepared, 4, cache_mib=1)
    whole, rest = batches(images, workers=workers), batches(images, first_batch=3)
    assert stream(rest) == stream(whole)[3 * 24 :]
    assert torch.equal(whole[3].image, rest[0].image)


def test_the_length_counts_the_micro_batches_of_the_whole_run(prepared: Path):
    loader = training_loader(
        CaptionedImages(prepared, 4),
        seed=0,
        global_batch_size=24,
        micro_batch_size=5,
        rank=1,
        world_size=2,
        first_batch=4,
        batches=10,
        workers=0,
    )
    assert len(loader) == 10 * 3
    assert [len(batch) for batch in loader] == [5, 5, 2] * 6


def test_devices_that_cannot_share_the_batch_are_refused_with_sizes_that_they_can(prepared: Path):
    with pytest.raises(UserError, match="global_batch_size 24 is not divisible by 7 devices; use 21 or 28"):
        batches(CaptionedImages(prepared, 4), world_size=7)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(prepared: Path, workers: int):
    images = CaptionedImages(prepared, 4)
    before = torch.get_rng_state()
    batches(images, workers=workers)
    list(evaluation_loader(images, split=None, batch_size=10, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_reads_a_split_in_the_order_of_the_index(prepared: Path):
    images = CaptionedImages(prepared, 4)
    rows = images.data.samples_in(Split.VALIDATION)
    loader = evaluation_loader(images, split=Split.VALIDATION, batch_size=4)
    assert torch.cat([batch.sample for batch in loader]).tolist() == rows.tolist()
    limited = evaluation_loader(images, split=Split.VALIDATION, batch_size=4, limit=5)
    assert [batch.sample.tolist() for batch in limited] == [rows[:4].tolist(), rows[4:5].tolist()]
    assert sum(len(batch) for batch in evaluation_loader(images, split=None, batch_size=7)) == 50
    assert list(evaluation_loader(images, split=Split.UNSEEN, batch_size=7)) == []


def test_memory_is_pinned_where_it_is_asked_for_whatever_gpus_the_machine_has(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    images = CaptionedImages(prepared, 4)
    for pin_memory in (False, True):
        assert training_loader(images, **OPTIONS, pin_memory=pin_memory).pin_memory is pin_memory
        evaluation = evaluation_loader(images, split=Split.VALIDATION, batch_size=2, pin_memory=pin_memory)
        assert evaluation.pin_memory is pin_memory
    assert not training_loader(images, **OPTIONS).pin_memory
    assert not rows_loader(images, [np.arange(2)], batch_size=2).pin_memory


def test_no_batch_reaches_over_the_end_of_a_part(prepared: Path):
    loader = rows_loader(CaptionedImages(prepared, 4), [np.arange(5), np.arange(9, 12)], batch_size=3, workers=2)
    assert [batch.sample.tolist() for batch in loader] == [[0, 1, 2], [3, 4], [9, 10, 11]]
    assert len(loader) == 3
    assert list(rows_loader(CaptionedImages(prepared, 4), [], batch_size=3, workers=2)) == []


class Lengths:
    """A tokenizer of one token: the caption's length."""

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[len(caption)] for caption in captions])


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_and_noise_that_a_stage_has_made_ahead_are_those_that_it_would_make_itself(prepared: Path, workers: int):
    ahead = MadeAhead(Lengths(), {"noise": (3, 2)})
    for batch in batches(CaptionedImages(prepared, 4, ahead=ahead), workers=workers, micro_batch_size=5):
        assert batch.token_ids().flatten().tolist() == [len(caption) for caption in batch.caption]
        assert torch.equal(batch.normals["noise"], SampleDraws(batch.sample_seed).normal("noise", (3, 2)))
        assert batch.draws().normal("noise", (3, 2)) is batch.normals["noise"]
        assert torch.equal(
            batch.draws().normal("other", (3, 2)), SampleDraws(batch.sample_seed).normal("other", (3, 2))
        )
        pieces = batch.to("cpu", non_blocking=True).split(2)
        assert torch.equal(torch.cat([piece.token_ids() for piece in pieces]), batch.token_ids())
        assert torch.equal(torch.cat([piece.normals["noise"] for piece in pieces]), batch.normals["noise"])


def test_without_a_stage_s_wish_batches_are_pictures_alone(prepared: Path):
    batch = batches(CaptionedImages(prepared, 4))[0]
    assert (batch.tokens, batch.normals) == (None, {})
    with pytest.raises(AssertionError, match="gave its loader no tokenizer"):
        batch.token_ids()


def test_the_cache_gives_the_same_pictures_without_decoding_again(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    images = CaptionedImages(prepared, 4, cache_mib=1)
    first = batches(images, workers=2)
    list(evaluation_loader(images, split=None, batch_size=10))
    monkeypatch.setattr("pipeline.data.dataset.central_square", lambda *_: pytest.fail("decoded again"))
    again = batches(images)
    assert all(torch.equal(one.image, other.image) for one, other in zip(first, again, strict=True))


def test_pictures_that_do_not_fit_the_budget_are_not_kept(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    images = CaptionedImages(prepared, 128, cache_mib=1)
    batches(images)
    monkeypatch.setattr("pipeline.data.dataset.central_square", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batches(images)


def with_faults(directory: Path, usable: int) -> Path:
    """30 samples of which the first 30 - `usable` are none."""
    faults = [{"image": b""}, {"image": b"no picture"}, {"caption": " \n"}]
    samples = [
        SourceSample(**{**source_sample(number).__dict__, **(faults[number % 3] if number < 30 - usable else {})})
        for number in range(30)
    ]
    write_shards(directory / "shards", samples, 30)
    index = index_shards(["00000.tar"], directory / "shards")
    splits = (np.arange(30) % 2).astype(np.uint8)
    write_prepared(directory, index=index, splits=splits)
    return directory


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_replaced_in_place_and_counted_by_reason(tmp_path: Path, workers: int):
    images = CaptionedImages(with_faults(tmp_path, usable=24), 4)
    seen = batches(images, workers=workers, global_batch_size=15)
    again = batches(CaptionedImages(tmp_path, 4), first_batch=2, micro_batch_size=4, global_batch_size=15)
    shown = torch.cat([batch.sample for batch in seen])
    assert set(shown.tolist()) <= set(range(6, 30, 2))
    assert torch.cat([batch.sample for batch in again]).tolist() == shown[30:].tolist()
    image = torch.cat([batch.image for batch in seen])
    assert (image[:, 0] == shown[:, None, None]).all()
    faults = sum((Counter(batch.faults) for batch in seen), Counter[DecodeFault]())
    # Five batches of 15 are five epochs.
    assert faults == {DecodeFault.EMPTY_IMAGE: 5, DecodeFault.NOT_AN_IMAGE: 5, DecodeFault.EMPTY_CAPTION: 5}
    assert images.faulty_by_shard() == {"00000.tar": 3}


@pytest.fixture
def remote(prepared: Path, tmp_path: Path) -> ShardPlace:
    """The same shards as URLs; every transfer is noted in `transfers`. The cache holds two of them."""
    shards = read_prepared(prepared).index.shards
    urls = [f"pipe:echo {each.name} >> {tmp_path}/transfers; cat {prepared}/shards/{each.name}" for each in shards]
    gib = 2 * max(each.bytes for each in shards) / 2**30
    return ShardPlace(shards=tuple(urls), allow_shell_urls=True, cache_dir=tmp_path / "cache", cache_gib=gib)


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_shards_give_the_same_batches_through_a_cache_that_does_not_hold_them_all(
    prepared: Path, remote: ShardPlace, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.data.reader._MAX_OPEN_SHARDS", 1)
    local, streamed = (
        batches(CaptionedImages(prepared, 4)),
        batches(CaptionedImages(prepared, 4, place=remote), workers=workers),
    )
    assert [batch.caption for batch in streamed] == [batch.caption for batch in local]
    assert all(torch.equal(one.image, other.image) for one, other in zip(streamed, local, strict=True))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) <= 2


def test_the_block_that_comes_next_is_fetched_before_it_is_read(prepared: Path, remote: ShardPlace, tmp_path: Path):
    reader = read_prepared(prepared, remote).reader
    prefetch = ShardPrefetch(reader)
    assert prefetch.is_needed
    prefetch.want([3, 1])
    prefetch.wait()
    prefetch.want([1, 3])
    prefetch.wait()
    assert sorted((tmp_path / "transfers").read_text().split()) == ["00001.tar", "00003.tar"]
    assert not ShardPrefetch(read_prepared(prepared).reader).is_needed


def test_data_without_a_usable_picture_ends_with_a_message(tmp_path: Path):
    images = CaptionedImages(with_faults(tmp_path, usable=0), 4)
    with pytest.raises(UserError, match=r"00000\.tar: sample \d+ .* cannot be decoded"):
        batches(images)


def test_an_artifact_can_be_moved(prepared: Path, tmp_path: Path):
    moved = shutil.move(prepared, tmp_path / "elsewhere")
    data = read_prepared(Path(moved))
    assert data.caption(3) == "picture 3"
    assert data.attributes(3) == {"number": 3}


def test_a_prepared_artifact_has_the_same_bytes_each_time(prepared: Path):
    data = read_prepared(prepared)
    again = prepared.parent / "again"
    write_prepared(again, index=data.index, splits=data.split_of_sample)
    for name in ("index.json", "index.npz", "splits.npy", "prepared.json"):
        assert (again / name).read_bytes() == (prepared / name).read_bytes()


def test_a_missing_shard_is_named(prepared: Path):
    (prepared / "shards" / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002\.tar is in the index but not on disk"):
        read_prepared(prepared)


def test_a_data_set_can_be_sent_to_a_spawned_worker(prepared: Path):
    images = CaptionedImages(prepared, 4, cache_mib=1, ahead=MadeAhead(Lengths()))
    batches(images)
    copy = pickle.loads(pickle.dumps(images))
    assert stream(batches(copy)) == stream(batches(images))
    assert torch.equal(batches(copy)[0].token_ids(), batches(images)[0].token_ids())


def test_image_signed_maps_bytes_to_minus_one_to_one():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    batch = ImageBatch(image=image, caption=("x",), sample=torch.tensor([0]), sample_seed=torch.tensor([0]))
    assert batch.image_signed().flatten().tolist() == pytest.approx([-1, -0.6, 1])
    assert batch.to("cpu").image_signed().dtype == torch.float32


def with_several_captions(directory: Path) -> Path:
    """The 50 pictures with three captions each, in two sources of which the second is shown twice an epoch."""
    directory.mkdir()
    (directory / "shards").mkdir()
    for shard in range(5):
        files: dict[str, bytes] = {}
        for number in range(10 * shard, 10 * shard + 10):
            files[f"{number:05d}.png"] = source_sample(number).image
            files[f"{number:05d}.txt"] = f"txt {number}".encode()
            files[f"{number:05d}.json"] = json.dumps({"long": f"long {number}", "short": f"short {number}"}).encode()
        tar(directory / "shards" / f"{shard:05d}.tar", files)
    index = index_shards([f"{shard:05d}.tar" for shard in range(5)], directory / "shards")
    captions = parse_sources({"txt": 1, "json:long": 2, "json:short": 1})
    mixture = Mixture((0, 0, 0, 1, 1), (Fraction(1), Fraction(3, 2)))
    splits = np.array([split_of(index.key(row), 0.2).code for row in range(50)], np.uint8)
    write_prepared(directory, index=index, splits=splits, captions=captions, mixture=mixture)
    return directory


def shown_in(batches: list[ImageBatch]) -> list[tuple[int, int, str]]:
    return [
        (int(sample), int(seed), caption)
        for batch in batches
        for sample, seed, caption in zip(batch.sample, batch.sample_seed, batch.caption, strict=True)
    ]


def test_captions_and_sources_are_drawn_alike_whatever_ranks_workers_micro_batches_and_restarts(tmp_path: Path):
    images = CaptionedImages(with_several_captions(tmp_path / "data"), 4)
    whole = shown_in(batches(images, batches=6))
    for options in ({"workers": 2}, {"micro_batch_size": 5}, {"first_batch": 3}):
        assert shown_in(batches(images, batches=6, **options)) == whole[24 * options.get("first_batch", 0) :]
    ranks = [batches(images, batches=6, rank=rank, world_size=2, micro_batch_size=12) for rank in (0, 1)]
    assert shown_in([batch for pair in zip(*ranks, strict=True) for batch in pair]) == whole


def test_captions_are_drawn_anew_at_each_showing_by_their_weights(tmp_path: Path):
    images = CaptionedImages(with_several_captions(tmp_path / "data"), 4)
    shown = shown_in(batches(images, batches=100))
    kinds = Counter(caption.split()[0] for _, _, caption in shown)
    assert all(int(caption.split()[1]) == sample for sample, _, caption in shown)
    assert abs(kinds["long"] / len(shown) - 0.5) < 0.04
    assert abs(kinds["txt"] / len(shown) - 0.25) < 0.04
    assert all(
        {kind.split()[0] for s, _, kind in shown if s == sample} == {"txt", "long", "short"} for sample, *_ in shown
    )
    assert len({(sample, seed) for sample, seed, _ in shown}) == len(shown)


def test_evaluation_takes_the_main_caption(tmp_path: Path):
    images = CaptionedImages(with_several_captions(tmp_path / "data"), 4)
    captions = [caption for batch in evaluation_loader(images, split=None, batch_size=7) for caption in batch.caption]
    assert captions == [f"long {number}" for number in range(50)]


def test_what_is_read_is_what_was_indexed(prepared: Path):
    """A picture that a disk damaged is a fault; another header or another text stops the training."""
    images = CaptionedImages(prepared, 4)
    reader = images.data.reader
    path = prepared / "shards" / "00001.tar"
    content = bytearray(path.read_bytes())
    index = images.data.index
    content[int(index.image.offset[12]) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DecodeError) as caught:
        reader.image(12)
    assert caught.value.fault is DecodeFault.CHANGED
    assert reader.caption(12) == "picture 12"
    content[int(index.texts["txt"].offset[13])] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.tar holds something else at sample 00013 .*run `rm -r .*artifact`"):
        reader.caption(13)
    content[int(index.image.offset[14]) - 512] ^= 1  # the first letter of its name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.tar holds something else at sample 00014"):
        reader.image(14)


def test_a_copy_in_the_cache_that_is_older_than_the_index_is_fetched_anew(
    prepared: Path, remote: ShardPlace, tmp_path: Path
):
    reader = read_prepared(prepared, remote).reader
    path = prepared / "shards" / "00001.tar"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"picture 12", b"picture 99"))
    reader.fetch(1)
    path.write_bytes(good)
    assert reader.caption(12) == "picture 12"
    assert (tmp_path / "transfers").read_text().split() == ["00001.tar"] * 2
    path.write_bytes(good.replace(b"picture 13", b"picture 99"))
    for cached in (tmp_path / "cache").glob("*-*"):
        if cached.is_file():
            cached.unlink()
    with pytest.raises(UserError, match="holds something else at sample 00013"):
        read_prepared(prepared, remote).reader.caption(13)
