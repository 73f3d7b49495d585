"""Real stages on a user's own shards, to which accidents happen."""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pipeline.cli import main
from pipeline.compose import compose_members
from pipeline.data.place import ShardPlace
from pipeline.data.prepared import PreparedData, read_prepared
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.plan import Action, plan_run
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure
from tests.support.tiny_runs import NARROW_UNET, plan_stages, run_and_stop, run_stage_of, run_until

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}

OWN = [
    "data=webdataset",
    "tracking=none",
    "trainer.accelerator=cpu",
    "trainer.cpu_threads=1",
    "trainer.log_every_steps=1",
    "data.validation_fraction=0.25",
    "stage.clip.network={vision_width: 24, vision_layers: 1, vision_heads: 2, embed_dim: 16}",
    "stage.clip.network.text_width=16",
    "stage.clip.network.text_layers=1",
    "stage.clip.network.text_heads=2",
    "stage.clip.network.context_length=16",
    "stage.clip.global_batch_size=8",
    "stage.clip.max_samples=64",
    "stage.judge_clip.global_batch_size=8",
    f"stage.decoder.network={NARROW_UNET}",
    "stage.decoder.image_size=16",
    f"stage.upsampler.network={NARROW_UNET}",
    "stage.upsampler.network.attention=[false,false]",
    "stage.upsampler.crop_size=16",
    "stage.upsampler.low_size=16",
]

Files = dict[str, bytes]


def picture(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[colour]).save(content, "JPEG", quality=95)
    return content.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, colour: str, caption: str) -> Files:
    fields = {"synthetic": f"a synthetic {caption}", "colour": colour}
    return {f"{key}.jpg": picture(colour), f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(fields).encode()}


def write_shards(
    directory: Path, shards: int = 4, caption: Callable[[str, int], str] = "a {} square {}".format
) -> Path:
    """Shards of 20 samples, as img2dataset writes them."""
    for shard in range(shards):
        files: Files = {}
        for number in range(20):
            colour = list(COLOURS)[(number + shard) % 4]
            files |= sample(f"{shard:05d}{number:04d}", colour, caption(colour, number))
        write_tar(directory / f"{shard:05d}.tar", files)
    return directory


def index(*shards: Path | str) -> int:
    return main(["shards", "index", *map(str, shards), "--workers", "1"])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """80 samples of the user's own, indexed."""
    monkeypatch.chdir(tmp_path)
    directory = write_shards(tmp_path / "a")
    assert index(directory) == 0
    return directory


def actions(outputs: Path, shards: Path | str, *overrides: str) -> dict[str, Action]:
    arguments = [*OWN, f"paths.outputs={outputs}", f"data.shards={shards}", *overrides]
    (member,) = compose_members("unclip plan", arguments)
    return {stage.name: stage.action for stage in plan_run(member.config, member.overrides).stages}


def train(outputs: Path, shards: Path | str, *overrides: str, target: str = "clip") -> Artifact:
    return run_until(outputs, target, f"data.shards={shards}", *overrides, base=OWN)


def stages_of(outputs: Path, shards: Path | str, *overrides: str) -> dict[str, FrozenStage]:
    return plan_stages(outputs, f"data.shards={shards}", *overrides, base=OWN)


def opened(stage: FrozenStage) -> PreparedData:
    """The data that a frozen stage would see."""
    (reference,) = stage.inputs["data"]
    path = stage.store.path("prepare", reference.fingerprint)
    return read_prepared(path, ShardPlace.model_validate(reference.place))


def captions(data: PreparedData) -> list[str]:
    return [data.caption(row) for row in range(len(data.index))]


def test_moved_shards_train_on_from_the_new_place_and_nothing_is_trained_again(own: Path, tmp_path: Path):
    outputs = tmp_path / "outputs"
    train(outputs, own, target="embed")
    moved = own.rename(tmp_path / "b")
    kept = actions(outputs, moved)
    assert {kept[name] for name in ("prepare", "clip", "embed")} == {Action.REUSE}
    again = train(outputs, moved, "seed=5", target="embed")
    assert again.manifest.samples_seen == 80
    assert actions(outputs, moved, "seed=5")["prepare"] is Action.REUSE


@pytest.mark.parametrize(
    "spelled",
    [
        "{tmp}/a",
        "{tmp}/link",
        "{tmp}/../{name}/a",
        "a",
        "'{tmp}/a/{{00000..00003}}.tar'",
        "[{tmp}/a/00000.tar,{tmp}/a/00001.tar,{tmp}/a/00002.tar,{tmp}/a/00003.tar]",
        "file://{tmp}/a/{{00000..00003}}.tar",
        "[{tmp}/x,{tmp}/y]",
        "{tmp}/copy",
    ],
)
def test_the_same_shards_reached_in_any_way_are_the_same_data(own: Path, tmp_path: Path, spelled: str):
    outputs = tmp_path / "outputs"
    fingerprint = stages_of(outputs, own)["clip"].fingerprint
    (tmp_path / "link").symlink_to(own)
    shutil.copytree(own, tmp_path / "copy", copy_function=shutil.copy)  # other times, and the index with them
    for name, numbers in (("x", (0, 1)), ("y", (2, 3))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number:05d}.tar").symlink_to(own / f"{number:05d}.tar")
        assert index(tmp_path / name) == 0
    shards = spelled.format(tmp=tmp_path, name=tmp_path.name)
    assert stages_of(outputs, shards)["clip"].fingerprint == fingerprint


def test_a_url_of_the_same_shards_is_the_same_data(own: Path, tmp_path: Path):
    outputs = tmp_path / "outputs"
    urls = [f"pipe:cat {own}/{number:05d}.tar" for number in range(4)]
    quoted = "[" + ",".join(f'"{url}"' for url in urls) + "]"
    place = ["data.allow_shell_urls=true", f"data.cache_dir={tmp_path}/cache"]
    from pipeline.data.indexing import index_place

    index_place(ShardPlace(shards=tuple(urls), allow_shell_urls=True, cache_dir=tmp_path / "cache"), 0)
    assert stages_of(outputs, quoted, *place)["clip"].fingerprint == stages_of(outputs, own)["clip"].fingerprint
    train(outputs, own)
    assert actions(outputs, quoted, *place)["clip"] is Action.REUSE
    assert captions(opened(stages_of(outputs, quoted, *place)["clip"]))[:2] == ["a red square 0", "a green square 1"]


def test_no_artifact_says_where_the_shards_are(own: Path, tmp_path: Path):
    outputs = tmp_path / "outputs"
    train(outputs, own, target="embed")
    for path in (outputs / "artifacts").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_new_captions_of_the_old_length_and_time_are_noticed_and_train_clip_anew(own: Path, tmp_path: Path):
    outputs = tmp_path / "outputs"
    before = train(outputs, own)
    queued = stages_of(outputs, own, "seed=7")["clip"]
    paths = sorted(own.glob("*.tar"))
    times = [path.stat().st_mtime_ns for path in paths]
    write_shards(own, caption="a {} circle {}".format)
    assert actions(outputs, own)["prepare"] is Action.BLOCKED
    for path, time in zip(paths, times, strict=True):
        os.utime(path, ns=(time, time))
    # Nothing tells now but the content: what is queued sees it, and so does whoever indexes again.
    assert run_stage_of(queued) is Outcome.FAILED
    failure = read_failure(queued.work)
    assert failure is not None
    assert re.search(r"a/0000\d\.tar holds something else at sample \d+ .*unclip shards index", failure.message)
    assert main(["shards", "index", str(own), "--again"]) == 0
    after = train(outputs, own)
    assert after.manifest.fingerprint != before.manifest.fingerprint
    assert captions(opened(stages_of(outputs, own)["clip"]))[0] == "a red circle 0"


def test_longer_captions_in_the_padding_of_a_shard_are_never_cut_off(own: Path, tmp_path: Path):
    size = (own / "00000.tar").stat().st_size
    write_shards(own, caption="a photograph of one large {} square on a table, number {}".format)
    assert (own / "00000.tar").stat().st_size == size
    assert actions(tmp_path / "outputs", own)["prepare"] is Action.BLOCKED
    assert index(own) == 0
    train(tmp_path / "outputs", own, target="prepare")
    found = captions(opened(stages_of(tmp_path / "outputs", own)["clip"]))
    assert found[0] == "a photograph of one large red square on a table, number 0"


def test_members_in_another_order_give_no_picture_another_one_s_caption(own: Path, tmp_path: Path):
    train(tmp_path / "outputs", own, target="prepare")
    frozen = stages_of(tmp_path / "outputs", own)["clip"]
    path = own / "00001.tar"
    time = path.stat().st_mtime_ns
    with tarfile.open(path) as archive:
        names = archive.getnames()
        files = {name: archive.extractfile(name).read() for name in names}  # pyright: ignore[reportOptionalMemberAccess]
    write_tar(path, {name: files[name] for name in [*names[3:], *names[:3]]})
    os.utime(path, ns=(time, time))
    assert run_stage_of(frozen) is Outcome.FAILED
    failure = read_failure(frozen.work)
    assert failure is not None
    assert "00001.tar holds something else" in failure.message


def test_touched_shards_train_nothing_again(own: Path, tmp_path: Path):
    train(tmp_path / "outputs", own)
    for path in own.glob("*.tar"):
        path.touch()
    assert actions(tmp_path / "outputs", own)["clip"] is Action.REUSE
    assert index(own) == 0
    assert actions(tmp_path / "outputs", own)["clip"] is Action.REUSE


def test_shards_that_lose_a_file_to_damage_train_on_the_rest_and_say_so(own: Path, tmp_path: Path):
    broken = bytearray((own / "00002.tar").read_bytes())
    with tarfile.open(own / "00002.tar") as archive:
        broken[archive.getmembers()[30].offset + 148] ^= 1
    (own / "00002.tar").write_bytes(broken)
    assert index(own) == 0
    assert main(["shards", "check", str(own), "--workers", "1"]) == 1
    prepared = train(tmp_path / "outputs", own, target="prepare")
    assert prepared.manifest.metrics["left_out_damaged_header"] == 1
    assert sum(prepared.manifest.numbers["samples"].values()) == 79


def refusal(capsys: pytest.CaptureFixture[str], outputs: Path, shards: Path, *overrides: str) -> str:
    """What `unclip run` says where it refuses to begin; nothing was trained."""
    capsys.readouterr()
    given = {each.partition("=")[0] for each in overrides}
    base = [each for each in OWN if each.partition("=")[0] not in given]
    assert main(["run", *base, f"paths.outputs={outputs}", f"data.shards={shards}", *overrides]) == 2
    assert not (outputs / "work").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_data_without_a_validation_sample_is_refused_before_anything_trains(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = refusal(capsys, tmp_path / "outputs", own, "data.validation_fraction=0.0001")
    remedy = re.search(r"set (data\.validation_fraction=[0-9.]+)", said)
    assert remedy is not None
    others = [each for each in OWN if not each.startswith("data.validation_fraction")]
    arguments = [*others, remedy[1], f"data.shards={own}", f"paths.outputs={tmp_path}/outputs"]
    assert main(["plan", *arguments]) == 0


def test_fewer_samples_than_two_batches_are_refused_before_anything_trains(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = refusal(capsys, tmp_path / "outputs", own, "stage.clip.global_batch_size=64")
    remedy = re.search(r"set (stage\.clip\.global_batch_size=\d+) or less", said)
    assert remedy is not None
    arguments = [each for each in OWN if not each.startswith("stage.clip.global_batch_size")]
    assert main(["plan", *arguments, remedy[1], f"data.shards={own}", f"paths.outputs={tmp_path}/outputs"]) == 0


def test_a_pattern_that_bash_spelled_out_is_refused_with_the_line_quoted_right(own: Path, tmp_path: Path):
    import sys

    python = f"{sys.executable} -m pipeline.cli"
    plan = f"{python} plan {' '.join(map(repr, OWN))} paths.outputs={tmp_path}/outputs"
    pattern = f"data.shards={own}/{{00000..00003}}.tar"
    refused = subprocess.run(["bash", "-c", f"{plan} {pattern}"], capture_output=True, text=True)
    assert refused.returncode == 2
    quoted = f"'{pattern}'"
    assert f"data.shards is given 4 times, as the shell spelled out the braces; quote it: {quoted}" in refused.stderr
    assert subprocess.run(["bash", "-c", f"{plan} {quoted}"], capture_output=True).returncode == 0


CAPTIONS = r"data.captions={txt: 1, json\:synthetic: 1}"


def weights_of(artifact: Artifact) -> dict[str, np.ndarray]:
    return load_file(artifact.path / "clip.safetensors")


def mixed(tmp_path: Path, own: Path) -> list[str]:
    write_shards(tmp_path / "more", 2, "one more {} square {}".format)
    assert index(tmp_path / "more") == 0
    return [f"[{own},{tmp_path}/more]", "data.weights=[1,0.5]", CAPTIONS, "trainer.checkpoint_every_samples=8"]


def test_a_training_on_several_captions_and_sources_goes_on_exactly_where_it_was_stopped(own: Path, tmp_path: Path):
    shards, *overrides = mixed(tmp_path, own)
    undisturbed = train(tmp_path / "undisturbed", shards, *overrides)
    train(tmp_path / "stopped", shards, *overrides, target="prepare")
    frozen = stages_of(tmp_path / "stopped", shards, *overrides)["clip"]

    def is_half_way() -> bool:
        return (latest_checkpoint_samples(frozen.work) or 0) >= 16

    assert run_and_stop(frozen, when=is_half_way) is Outcome.INTERRUPTED
    assert 0 < (latest_checkpoint_samples(frozen.work) or 0) < 64
    assert run_stage_of(frozen) is Outcome.FINISHED
    resumed = weights_of(train(tmp_path / "stopped", shards, *overrides))
    for name, weight in weights_of(undisturbed).items():
        np.testing.assert_array_equal(weight, resumed[name])


def fingerprints(outputs: Path, shards: Path | str, variants: Iterable[tuple[str, ...]]) -> list[str]:
    return [stages_of(outputs, shards, *variant)["clip"].fingerprint for variant in variants]


def test_what_changes_the_captions_changes_the_fingerprint_and_nothing_else_does(own: Path, tmp_path: Path):
    variants = [
        (), ("data.caption=json:synthetic",), ("data.caption=json:colour",), (CAPTIONS,),
        (r"data.captions={txt: 1, json\:synthetic: 3}",),
    ]  # fmt: skip
    found = fingerprints(tmp_path, own, variants)
    assert len(set(found)) == len(variants)
    same = fingerprints(tmp_path, own, [("data.caption=.txt",), ("data.captions={txt: 1}",)])
    assert set(same) == {found[0]}
    # A text that is not read may change.
    for path in own.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"synthetic", b"imaginary"))
    assert index(own) == 0
    assert fingerprints(tmp_path, own, [()]) == found[:1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.caption=blip", r"data\.caption=blip: no sample has blip; they have .*(txt|json) \(80\)"),
        ("data.caption=json:nothing", r"data\.caption=json:nothing: none of the first 80 .* colour, synthetic"),
        ("data.caption=json", r"data\.captions: 'json' names no caption"),
        ("data.weights=[1,2]", r"data\.weights has 2 entries for 1 parts of data\.shards"),
        ("data.weights=[0]", r"data\.weights\.0=0: .*greater than 0"),
        ("data.captions={txt: 0}", r"data\.captions\.txt=0: .*greater than 0"),
    ],
)
def test_captions_and_weights_that_cannot_be_are_refused(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
):
    assert re.search(said, refusal(capsys, tmp_path / "outputs", own, override))
