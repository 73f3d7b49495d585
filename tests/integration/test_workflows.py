"""Whole workflows by the real command, on tiny data: shared stages, sweeps, interruptions, failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.compose import compose_members
from pipeline.launch.run import objective_of
from pipeline.tracking.wandb_record import read_record
from pipeline.workflow.plan import plan_run
from pipeline.workflow.record import read_standing
from pipeline.workflow.sealed import read_json, write_json_atomically
from tests.support.command import said
from tests.support.tiny_runs import TINY, the_last_of_each_key, tiny_without

UNCLIP = str(Path(sys.executable).parent / "unclip")
DECODER_STEPS = 40
DECODER = [f"stage.decoder.max_samples={8 * DECODER_STEPS}", "stage.decoder.clip_loss.weight=0.1"]
UNCLIP_WORKFLOW = the_last_of_each_key(*TINY, *DECODER)
BEFORE_THE_DECODER = ("prepare", "clip", "embed", "prior", "judge_clip", "judge", "upsampler")


def upsampler(name: str, crop_size: int) -> list[str]:
    """The tiny upsampler by another name."""
    prefix = "stage.upsampler."
    settings = [f"stage.{name}.{each.removeprefix(prefix)}" for each in TINY if each.startswith(prefix)]
    return the_last_of_each_key(*settings, f"stage.{name}.crop_size={crop_size}")


def command(*arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [UNCLIP, *arguments], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def run(outputs: Path, *overrides: str, tracking: str = "none", check: int | None = 0) -> list[str]:
    """The lines that `unclip run` prints."""
    arguments = the_last_of_each_key(*overrides, f"tracking={tracking}", f"paths.outputs={outputs}")
    return command("run", *arguments, check=check).stdout.splitlines()


def stages_by(lines: list[str], word: str) -> list[str]:
    """The stages that were `reused`, `done`, `skipped:`, `FAILED:` or `shared` by the printed lines, sorted."""
    found = (re.match(rf"(?:[\w.-]+ )?\[\d+/\d+\] (\w+)  {word}", line) for line in lines)
    return sorted(match.group(1) for match in found if match)


def artifacts(outputs: Path, stage: str) -> set[str]:
    return {path.parent.name for path in (outputs / "artifacts" / stage).glob("*/manifest.json")}


def run_fingerprints(outputs: Path, name: str) -> dict[str, str]:
    record = json.loads((outputs / "runs" / name / "run.json").read_text())
    return {stage["name"]: stage["fingerprint"] for stage in record["stages"]}


def file_digests(outputs: Path, stage: str, fingerprint: str) -> dict[str, str]:
    manifest = json.loads((outputs / "artifacts" / stage / fingerprint / "manifest.json").read_text())
    return {each["path"]: each["sha256"] for each in manifest["files"]}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a first run of workflow=unclip, tracked offline, is finished; its name is `base`."""
    directory = tmp_path_factory.mktemp("workflows") / "outputs"
    lines = run(directory, *UNCLIP_WORKFLOW, "run.name=base", tracking="offline")
    assert len(stages_by(lines, "done")) == 10, lines
    return directory


@pytest.fixture
def halfway(outputs: Path, tmp_path: Path) -> Path:
    """Other outputs, in which everything before the decoder is finished."""
    for stage in BEFORE_THE_DECODER:
        (fingerprint,) = {run_fingerprints(outputs, "base")[stage]}
        shutil.copytree(outputs / "artifacts" / stage / fingerprint, tmp_path / "artifacts" / stage / fingerprint)
    return tmp_path


def test_the_run_leaves_pictures_and_a_record(outputs: Path):
    pictures = {path.name for path in (outputs / "runs" / "base" / "pictures").glob("*.png")}
    assert {"evaluate-grid.png", "decoder-samples.png"} <= pictures
    assert list(run_fingerprints(outputs, "base")) == [
        "prepare", "clip", "embed", "prior", "decoder", "upsampler", "judge_clip", "judge", "evaluate", "export",
    ]  # fmt: skip


def test_a_second_run_reuses_everything_and_takes_no_worker(outputs: Path):
    logs = {path: path.stat().st_mtime_ns for path in outputs.glob("work/*/*/log.txt")}
    lines = run(outputs, *UNCLIP_WORKFLOW, "run.name=base")
    assert "run base: 0 of 10 stages to do" in lines
    assert len(stages_by(lines, "reused")) == 10
    assert {path: path.stat().st_mtime_ns for path in outputs.glob("work/*/*/log.txt")} == logs


def test_every_stage_has_a_run_of_weights_and_biases_and_a_record_that_can_be_sent(outputs: Path):
    for stage, fingerprint in run_fingerprints(outputs, "base").items():
        work = outputs / "work" / stage / fingerprint
        record = read_record(work)
        assert record is not None
        assert (record.project, record.group, record.name) == ("unclip", "base", f"base/{stage}")
        assert (record.sent, record.told) == (0, None)
        metrics = {name for entry in read_standing(work) for name in entry}
        if stage in ("clip", "prior", "decoder", "upsampler"):
            assert {"samples_seen", "train/loss"} <= metrics
            assert any(name.startswith("validation/") for name in metrics)


@pytest.mark.slow
def test_a_sweep_over_the_decoder_s_clip_loss_trains_clip_once(outputs: Path):
    clips = artifacts(outputs, "clip")
    sweep = [*UNCLIP_WORKFLOW, "~stage.export", "run.name=sweep", "stage.decoder.clip_loss.weight=0,0.2"]
    lines = run(outputs, "-m", *sweep)
    assert artifacts(outputs, "clip") == clips
    assert len(clips) == 1
    assert stages_by(lines, "done") == sorted(["decoder", "evaluate"] * 2)
    base, first, second = (run_fingerprints(outputs, name) for name in ("base", "sweep.0", "sweep.1"))
    for stage in first:
        expected = 3 if stage in ("decoder", "evaluate") else 1
        assert len({base[stage], first[stage], second[stage]}) == expected, stage


def test_the_plan_names_the_setting_that_causes_a_rerun(outputs: Path):
    changed = the_last_of_each_key(*UNCLIP_WORKFLOW, "stage.decoder.clip_loss.weight=0.3")
    text = said("plan", *changed, f"paths.outputs={outputs}")
    assert re.search(r"decoder +│ run +│ changed stage\.decoder\.clip_loss\.weight: 0\.\d -> 0\.3", text)
    assert text.count("│ reuse") == 7


@pytest.mark.slow
def test_glide_trains_without_a_prior_and_samples(outputs: Path, tmp_path: Path):
    lines = run(outputs, *tiny_without("prior"), *DECODER, "workflow=glide", "run.name=glide")
    assert stages_by(lines, "reused") == ["clip", "judge", "judge_clip", "prepare", "upsampler"]
    assert stages_by(lines, "done") == ["decoder", "evaluate", "export"]
    assert "prior" not in run_fingerprints(outputs, "glide")
    command("sample", "glide", "a red circle", "--outputs", str(outputs), "--output", str(tmp_path), "--steps", "2")
    assert len(list(tmp_path.glob("00-*.png"))) == 1


@pytest.mark.slow
def test_two_upsamplers_stand_in_a_chain(outputs: Path):
    chain = [*upsampler("upsampler_1", 16), *upsampler("upsampler_2", 32)]
    line = [*tiny_without("upsampler"), *DECODER, *chain, "workflow=unclip_two_upsamplers", "run.name=chain"]
    lines = run(outputs, *line)
    assert stages_by(lines, "done") == ["evaluate", "export", "upsampler_1", "upsampler_2"]
    assert stages_by(lines, "reused") == ["clip", "decoder", "embed", "judge", "judge_clip", "prepare", "prior"]


SAMPLE = ["base", "a red circle", "--count", "2", "--guidance", "2", "--clip-guidance", "1", "--steps", "2"]


def test_sampling_gives_the_same_bytes_for_the_same_seed_and_others_for_another(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Two processes; whatever ran in this one before, both have one thread.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

    def arguments(name: str, seed: int) -> list[str]:
        return [*SAMPLE, "--seed", str(seed), "--outputs", str(outputs), "--output", str(tmp_path / name)]

    command("sample", *arguments("first", 1))
    assert [main(["sample", *arguments(*each)]) for each in (("again", 1), ("other", 2))] == [0, 0]
    pictures = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).glob("00-a-red-circle-*.png"))]
        for name in ("first", "again", "other")
    }
    assert len(pictures["first"]) == 2
    assert pictures["first"] == pictures["again"]
    assert len(set(pictures["first"] + pictures["other"])) == 4
    assert (tmp_path / "first" / "grid.png").exists()


def test_a_picture_is_made_again_and_edited_by_the_command(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    at, made = ["--outputs", str(outputs)], tmp_path / "made"
    assert main(["sample", *SAMPLE, *at, "--output", str(made), "--set", "prior.candidates=2", "upsampler.eta=1"]) == 0
    first = made / "00-a-red-circle-00.png"
    assert main(["sample", "--from", str(first), *at, "--output", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("again-*.png")
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (first, again))
    assert np.abs(before - after).max() <= 1

    assert (
        main(["edit", "variations", "base", str(first), *at, "--count", "2", "--output", str(tmp_path / "edit")]) == 0
    )
    varied = tmp_path / "edit" / "01.png"
    assert main(["sample", "--from", str(varied), "--picture", str(first), *at, "--output", str(tmp_path)]) == 0

    capsys.readouterr()
    for arguments, reason in [
        (["sample", "base", "x", *at, "--output", str(first)], "cannot be a directory"),
        (["sample", "base", "x", *at, "--preset", "paper", "--set", "decoder.steps=0"], "decoder.steps=0"),
        (["sample", "base", "x", *at, "--steps", "2", "--set", "decoder.steps=3"], "decoder.steps is given twice"),
        (["sample", "base", "x", *at, "--set", "decoder.colour=3"], "decoder.colour is an unknown key"),
        (["sample", "base", *at], "no caption is given"),
        (["sample", "base", "x", "--from", str(first), *at], "leave out base"),
        (["sample", "--from", str(outputs / "runs" / "base" / "run.json"), *at], "is no PNG"),
        (["sample", "--from", str(varied), *at], "made from 1 others"),
        (["edit", "variations", "base", str(outputs), *at], "cannot be read"),
        (["edit", "text-diff", "base", str(first), "a", "b", "--strength", "nan", *at], "--strength nan is no share"),
    ]:
        assert main(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line


def test_status_shows_a_finished_run(outputs: Path):
    text = said("status", "base", "--outputs", str(outputs))
    assert "run base" in text
    assert text.count("finished") == 10


def test_sampling_from_an_unfinished_run_is_refused(outputs: Path, capsys: pytest.CaptureFixture[str]):
    record = read_json(outputs / "runs" / "base" / "run.json")
    decoder = next(stage for stage in record["stages"] if stage["name"] == "decoder")
    decoder["fingerprint"] = "f" * 64
    (outputs / "runs" / "torso").mkdir()
    write_json_atomically(outputs / "runs" / "torso" / "run.json", {**record, "name": "torso"})
    assert main(["sample", "torso", "a red circle", "--outputs", str(outputs)]) == 2
    shutil.rmtree(outputs / "runs" / "torso")
    assert capsys.readouterr().err == "unclip: run torso lacks decoder; finish it with unclip run, then sample\n"


class Running:
    """`unclip run` in the background, with its worker."""

    def __init__(self, outputs: Path, name: str = "base") -> None:
        self._outputs = outputs
        arguments = [*UNCLIP_WORKFLOW, f"run.name={name}", f"paths.outputs={outputs}"]
        self.process = subprocess.Popen(
            [UNCLIP, "run", *arguments, "trainer.checkpoint_every_samples=8"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_checkpoint(self, after: int) -> int:
        """Wait until the decoder has a checkpoint at more samples than `after`; give its samples."""
        return wait_until(lambda: next((each for each in self._checkpoints() if each > after), None), self.process)

    def kill(self) -> None:
        """End the command and its worker at once."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.killpg(self.process.pid, signal.SIGKILL)
        for child in children:
            os.killpg(int(child), signal.SIGKILL)
        assert children
        self.process.communicate()

    def _checkpoints(self) -> list[int]:
        records = self._outputs.glob("work/decoder/*/checkpoints/samples-*.json")
        return sorted(int(record.stem.removeprefix("samples-")) for record in records)


def wait_until(ready: Callable[[], int | None], process: subprocess.Popen[str], limit_s: float = 300.0) -> int:
    started = time.monotonic()
    while time.monotonic() - started < limit_s:
        value = ready()
        if value is not None:
            return value
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError("nothing happened in time")


def test_an_interrupted_and_then_killed_stage_ends_bit_identical_to_an_undisturbed_one(outputs: Path, halfway: Path):
    total = 8 * DECODER_STEPS
    running = Running(halfway)
    running.wait_for_checkpoint(after=0)
    running.process.send_signal(signal.SIGINT)
    text, _ = running.process.communicate(timeout=180)
    assert running.process.returncode == 75, text
    assert "stopped; the same command resumes it" in text
    assert "decoder" in said("status", "base", "--outputs", str(halfway))

    running = Running(halfway)
    stopped_at = max(int(p.stem.removeprefix("samples-")) for p in halfway.glob("work/decoder/*/checkpoints/*.json"))
    assert stopped_at < total
    killed_at = running.wait_for_checkpoint(after=stopped_at)
    running.kill()
    assert killed_at < total
    assert artifacts(halfway, "decoder") == set()

    text = said("plan", *UNCLIP_WORKFLOW, f"paths.outputs={halfway}")
    assert "resume" in text
    lines = run(halfway, *UNCLIP_WORKFLOW, "run.name=base", "~stage.evaluate", "~stage.export")
    assert stages_by(lines, "done") == ["decoder"]
    fingerprint = run_fingerprints(halfway, "base")["decoder"]
    assert fingerprint == run_fingerprints(outputs, "base")["decoder"]
    disturbed, whole = (file_digests(where, "decoder", fingerprint) for where in (halfway, outputs))
    assert disturbed["weights.safetensors"] == whole["weights.safetensors"]
    assert disturbed["samples.png"] == whole["samples.png"]
    rows = (halfway / "artifacts" / "decoder" / fingerprint / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["samples_seen"] for row in rows] == [*range(8, total + 1, 8), total]


@pytest.mark.slow
def test_two_runs_at_the_same_time_train_every_stage_once(outputs: Path, halfway: Path):
    first, second = (Running(halfway, f"at-once-{number}") for number in (1, 2))
    texts = [running.process.communicate(timeout=500)[0] for running in (first, second)]
    assert [running.process.returncode for running in (first, second)] == [0, 0], texts
    for stage in ("decoder", "evaluate", "export"):
        assert len(artifacts(halfway, stage)) == 1
        # Who came second says that it is done, too, without having done it.
        assert all(stage in stages_by(text.splitlines(), "done") for text in texts)
    fingerprint = run_fingerprints(outputs, "base")["decoder"]
    alone, at_once = (file_digests(where, "decoder", fingerprint) for where in (outputs, halfway))
    assert at_once["weights.safetensors"] == alone["weights.safetensors"]
    rows = (halfway / "artifacts" / "decoder" / fingerprint / "metrics.jsonl").read_text().splitlines()
    samples = [json.loads(row)["samples_seen"] for row in rows if "train/loss" in row]
    assert samples == list(range(8, 8 * DECODER_STEPS + 1, 8))


def test_a_stage_that_cannot_read_its_data_fails_in_one_line_and_its_descendants_are_skipped(halfway: Path):
    shutil.rmtree(halfway / "artifacts" / "upsampler")
    shard = next((halfway / "artifacts" / "prepare").glob("*/shards/*.tar"))
    shard.unlink()
    manifest = shard.parents[1] / "manifest.json"
    values = read_json(manifest)
    # As if it had never been there: a file that the manifest names is missed before anything starts.
    values["files"] = [file for file in values["files"] if file["path"] != f"shards/{shard.name}"]
    write_json_atomically(manifest, values)
    arguments = [*UNCLIP_WORKFLOW, "run.name=base", f"paths.outputs={halfway}"]
    done = command("run", *arguments, check=2)
    lines = done.stdout.splitlines()
    assert stages_by(lines, r"FAILED \(data\):") == ["decoder", "upsampler"]
    assert stages_by(lines, "skipped:") == ["evaluate", "export"]
    assert sum(shard.name in line for line in lines) == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "the last attempt failed" in said("plan", *UNCLIP_WORKFLOW, f"paths.outputs={halfway}")


@pytest.mark.slow
def test_a_sweep_that_hydra_runs_itself_shares_stages_and_gives_its_sweeper_the_objective(tmp_path: Path):
    others = ("clip", "embed", "prior", "decoder", "upsampler", "judge_clip", "judge", "evaluate", "export")
    line = [
        "run.name=left", f"paths.outputs={tmp_path}", "data.samples=64", "data.unseen_samples=4",
        "data.validation_fraction=0.25", "data.shard_samples=48", *(f"~stage.{name}" for name in others),
    ]  # fmt: skip
    shown = command("run", "-m", "hydra/launcher=basic", "run.objective=prepare.train_samples", *line, "seed=1,2")
    assert "run left.0: 1 of 1 stages to do" in shown.stdout
    assert "run left.1: 0 of 1 stages to do" in shown.stdout
    (member,) = compose_members("unclip run", ["run.name=left.0", *line[1:], "run.objective=prepare.train_samples"])
    assert objective_of(plan_run(member.config), []) == 54
    refused = command("run", "-m", "hydra/launcher=basic", "run.objective=prepare.los", *line, check=2).stderr
    assert "run.objective='prepare.los' is no metric; there are prepare.train_samples" in refused
