import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.board.command import BoardServer
from pipeline.cli import EXIT_USER_ERROR, main
from pipeline.workflow.progress import EXIT_INTERRUPTED, LOG
from tests.support.command import refusal
from tests.support.fakes import publish
from tests.support.stores import begin, record


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("arguments", "named", "rule", "remedy"),
    [
        ("stage.decoder.max_sample=1", "stage.decoder.max_sample", "unknown key", "did you mean 'max_samples'?"),
        ("stage.clip.loss=softmax", "stage.clip.loss='softmax'", "'contrastive' or 'siglip'", "give a value that fits"),
        ("tracking=offlin", "tracking/offlin", "is no choice", "none, offline, wandb"),
        ("forecast.device=h1000", "device=h1000", "is no choice", "here, h100, h200"),
        ("seed=[1", "'seed=[1'", "cannot be read as an override", "write key=value"),
        (
            "stage.decoder.image_size=18 stage.decoder.network.channels=[32,64,64]",
            "stage.decoder.image_size 18",
            "not divisible by 4",
            "use 16 or 20",
        ),
        (
            "stage.upsampler.crop_size=30 stage.decoder.image_size=16 stage.upsampler.high_size=64",
            "stage.upsampler.crop_size 30",
            "whole number",
            "use 28 or 32",
        ),
        (
            "trainer.devices=3 stage.clip.global_batch_size=128",
            "stage.clip.global_batch_size=128",
            "not divisible by 3 devices",
            "use 126 or 129",
        ),
        (
            "trainer.devices=2 trainer.micro_batch_size=6 stage.clip.global_batch_size=14",
            "stage.clip.global_batch_size=14 on 2 devices is 7 samples each",
            "micro_batch_size=6 makes pieces of 1",
            "use micro_batch_size=7, or a global_batch_size of 12 or 24",
        ),
        (
            "trainer.deepspeed.bucket=3",
            "trainer.deepspeed.bucket is an unknown key",
            "did you mean 'bucket_mib'?",
            "valid keys here: bucket_mib, gathered_below_elements",
        ),
        (
            "trainer=zero2 trainer.deepspeed.bucket_mib=50.3",
            "trainer.deepspeed.bucket_mib=50.3",
            "valid integer",
            "give a value that fits",
        ),
        (
            "trainer=zero3 trainer.deepspeed.sub_group_mib=1e-7",
            "trainer.deepspeed.sub_group_mib=1e-07",
            "valid integer",
            "give a value that fits",
        ),
        (
            "trainer=zero2 trainer.offload=parameters",
            "offload=parameters",
            "does not work with strategy=zero2",
            "use zero3, or trainer=auto",
        ),
        ("stage.clip.max_samples=0", "stage.clip.max_samples=0", "trains nothing", "set stage.clip.checkpoint"),
        ("stage.clip.checkpoint=/no/such.pt", "stage.clip.checkpoint=/no/such.pt", "cannot be read", "give the path"),
        ("stage.decoder.condition=text_embed", "stage.decoder.condition=text_embed", "prior", "use workflow=glide"),
        ("stage.upsampler.low_size=8", "stage.upsampler.low_size=8", "does not continue", "make them equal"),
        (
            "stage.decoder.sampler.steps=2000 stage.decoder.schedule.timesteps=1000",
            "stage.decoder.sampler.steps 2000",
            "more than",
            "use at most 1000",
        ),
        (
            "stage.clip.trainer.device=2",
            "stage.clip.trainer.device",
            "unknown key",
            "accelerator, activation_checkpointing, cache_mib",
        ),
        (
            "data.validation_fraction=0",
            "data.validation_fraction=0",
            "holds out 0 of 16000",
            "set data.validation_fraction=",
        ),
        ("paths.also_read=/p", "paths.also_read", "'/p' is one path and no list", "write [/p]"),
        ("data.image_size=32", "unclip: data.image_size=32", "greater than or equal to 64", "give a value"),
    ],
)
def test_bad_settings_are_refused_in_one_line(capsys, arguments: str, named: str, rule: str, remedy: str):
    message = refusal(capsys, "plan", *arguments.split())
    for fragment in (named, rule, remedy):
        assert fragment in message


def test_a_refused_run_leaves_nothing_behind(capsys, tmp_path: Path):
    refusal(capsys, "run", "trainer.devices=3")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_lists_the_commands(capsys):
    message = refusal(capsys, "trian")
    assert (
        "'trian' is no command; commands are "
        "run, plan, submit, status, logs, cancel, verify, sync, compare, card, board, shards" in message
    )
    assert "sample" in message


def test_status_without_runs_says_how_to_start_one(capsys):
    assert "there is no run yet: start one with `unclip run`" in refusal(capsys, "status")


def test_an_empty_name_is_none(capsys):
    for command in ("status", "verify"):
        assert "no run ''" in refusal(capsys, command, "", "--outputs", ".")


def test_a_board_of_a_run_that_is_not_there_says_so(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_server: BoardServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BoardServer, "serve_forever", interrupted)
    assert main(["board", "nosuch", "--port", "0", "--outputs", str(tmp_path)]) == EXIT_INTERRUPTED
    assert "warning: no run 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gc", "--older-than", "-1d"), "argument --older-than: expected one argument; see unclip gc --help"),
        (("board", "--port", "abc"), "argument --port: invalid int value: 'abc'; see unclip board --help"),
        (("sample", "--count", "few"), "argument --count: invalid int value: 'few'; see unclip sample --help"),
        (("edit", "variations"), "required: run, picture; see unclip edit variations --help"),
        (("shards", "walk"), "invalid choice: 'walk' (choose from 'index', 'check'); see unclip shards --help"),
        (("run", "--no-such-option"), "unrecognized arguments: --no-such-option; see unclip run --help"),
        (("plan", "--no-such-option"), "unrecognized arguments: --no-such-option; see unclip plan --help"),
        (("submit", "-m", "--no-such-option"), "unrecognized arguments: --no-such-option; see unclip submit --help"),
        (("sync", "--no-such-option"), "unrecognized arguments: --no-such-option; see unclip sync --help"),
    ],
)
def test_options_that_are_none_are_refused_in_one_line(capsys, arguments: tuple[str, ...], said: str):
    assert said in refusal(capsys, *arguments)


def test_options_stand_before_between_and_behind_what_else_is_given(capsys):
    for arguments in (
        ("--count", "2", "nothing", "a red circle", "a blue square"),
        ("nothing", "--count", "2", "a red circle", "a blue square"),
        ("nothing", "a red circle", "--count", "2", "a blue square"),
    ):
        assert "no run 'nothing'" in refusal(capsys, "sample", *arguments)


def test_sampling_from_a_run_that_does_not_exist_is_refused(capsys):
    assert "no run 'nothing'" in refusal(capsys, "sample", "nothing", "a red circle")


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--seed", str(2**64), f"give 0 to {2**64 - 1}"),
        ("--seed", "-1", f"give 0 to {2**64 - 1}"),
        ("--guidance", "nan", "give a finite number of 0 or more"),
        ("--guidance", "-1.0", "give a finite number of 0 or more"),
        ("--steps", "0", "give 1 or more"),
        ("--prior-guidance", "inf", "give a finite number"),
        ("--clip-guidance", "-inf", "give a finite number"),
    ],
)
def test_numbers_that_sampling_could_not_use_are_refused_before_anything_is_loaded(
    capsys, option: str, value: str, remedy: str
):
    message = refusal(capsys, "sample", "nothing", "a red circle", f"{option}={value}")
    assert f"{option} {value}" in message
    assert remedy in message


@pytest.mark.parametrize("command", ["run", "plan", "submit"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.decoder.optimizer.freeze=[visual.*]", "stage.decoder.optimizer.freeze: 'visual.*' fits no parameter"),
        ("stage.clip.optimizer.freeze=['*']", "stage.clip.optimizer.freeze leaves no parameter to train"),
        (
            "stage.prior.optimizer.learning_rate_factors={nothing: 0.1}",
            "stage.prior.optimizer.learning_rate_factors: 'nothing' fits no parameter",
        ),
    ],
)
def test_parameters_that_a_network_lacks_are_refused_before_anything_is_started(
    capsys, command: str, setting: str, said: str, tmp_path: Path
):
    assert said in refusal(capsys, command, "experiment=smoke", setting)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_parameters_that_its_networks_have_says_nothing_of_them(capsys):
    assert main(["plan", "experiment=smoke", "stage.clip.optimizer.freeze=[visual.*]"]) == 0
    assert "visual" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys, arguments: list[str]):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for command in ("unclip run", "unclip plan", "unclip status", "unclip shards index", "unclip sample"):
        assert command in out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_help_of_a_hydra_command_lists_the_groups(capsys, command: str, tmp_path: Path):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "workflow: glide, unclip, unclip_two_upsamplers" in out
    assert "unclip run experiment=emoji" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "plan"])
def test_cfg_job_prints_the_composed_config_and_starts_nothing(capsys, command: str, tmp_path: Path):
    assert main([command, "experiment=smoke", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^run:\n  name: smoke$", out, re.MULTILINE)
    assert "clip_loss:" in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_shows_every_stage_with_action_reason_and_needs(capsys, tmp_path: Path):
    assert main(["plan", "experiment=smoke"]) == 0
    out = capsys.readouterr().out
    assert "plan of run smoke" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    stages = "prepare, clip, embed, prior, decoder, upsampler, judge_clip, judge, evaluate, export"
    assert ", ".join(row[0] for row in rows) == stages
    assert {row[1] for row in rows} == {"run"}
    assert {row[2] for row in rows} == {"new"}
    assert rows[3][3] == "prepare, clip, embed"
    assert list(tmp_path.iterdir()) == []


def test_a_planned_sweep_shares_what_its_members_have_in_common(capsys):
    assert main(["plan", "-m", "run.name=sweep", "stage.decoder.clip_loss.weight=0,0.1"]) == 0
    out = capsys.readouterr().out
    assert "plan of run sweep.0" in out
    assert "plan of run sweep.1" in out
    found: dict[str, set[str]] = {}
    for name, fingerprint in re.findall(r"^│ (\w+) .* ([0-9a-f]{12}) │$", out, re.MULTILINE):
        found.setdefault(name, set()).add(fingerprint)
    different = {name for name, fingerprints in found.items() if len(fingerprints) == 2}
    assert different == {"decoder", "evaluate", "export"}


def test_planning_imports_no_torch(tmp_path: Path):
    code = (
        "import sys; from pipeline.cli import main; status = main(['plan'] + sys.argv[1:]);"
        "heavy = {'torch', 'pytorch_lightning', 'diffusers', 'open_clip', 'wandb', 'transformers'} & set(sys.modules);"
        "print('imported', sorted(heavy)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"


def test_an_unknown_option_exits_with_status_2_and_without_a_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "pipeline.cli", "plan", "--no-such-option"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_causes_no_traceback(tmp_path: Path):
    command = f"{sys.executable} -m pipeline.cli plan | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_what_needs_slurm_says_so_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    message = refusal(capsys, "submit", "experiment=smoke")
    assert "sbatch is not installed here" in message
    assert "one_machine.py" in message
    # The submission is on record; the next one finds no job of it, and neither do the other commands.
    assert "squeue is not installed here" in refusal(capsys, "cancel", "smoke")
    assert main(["status", "smoke"]) == 0
    assert "from files alone" in capsys.readouterr().out


def test_running_here_and_submitting_are_told_apart(capsys: pytest.CaptureFixture[str]):
    assert "leave launch out to run here" in refusal(capsys, "run", "launch=slurm")
    assert "add launch=slurm" in refusal(capsys, "submit", "launch=local")
    assert "unclip submit" in refusal(capsys, "run", "trainer.num_nodes=2")


def test_a_followed_log_ends_with_its_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clip = record(tmp_path, "first")["clip"]
    begin([clip])
    follower = threading.Thread(target=main, args=(["logs", "first", "clip", "-f", "--outputs", str(tmp_path)],))
    follower.start()
    time.sleep(1.0)
    assert follower.is_alive()
    assert clip.frozen is not None
    with (clip.frozen.work / LOG).open("a") as log:
        log.write("another\n")
    publish(clip)
    follower.join(timeout=30)
    assert not follower.is_alive()
    assert capsys.readouterr().out == "a line\nanother\n"


def test_logs_of_what_is_not_there_are_refused_with_what_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "no run 'smoke'" in refusal(capsys, "logs", "smoke", "decoder")
    monkeypatch.setenv("PATH", "")
    refusal(capsys, "submit", "experiment=smoke")
    assert "did you mean 'decoder'?" in refusal(capsys, "logs", "smoke", "decodr")
    assert "has no log yet" in refusal(capsys, "logs", "smoke", "decoder")


def test_the_dry_run_shows_jobs_and_scripts_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan", "-m", "launch=slurm_gpu", "seed=1,2", "run.name=dry"]) == 0
    shown = capsys.readouterr().out
    assert "decoder" in shown
    assert shown.count("#!/bin/bash") == 1
    assert re.search(r"# decoder-\w{12}\nsbatch --job-name=decoder-\w{12} .*--gpus-per-node=1 .*--array=0-1 ", shown)
    waits = r"afterok:JOB_OF_prepare-\w{12},aftercorr:JOB_OF_clip-\w{12}:JOB_OF_embed-\w{12}"
    assert re.search(rf"sbatch --job-name=decoder-.* --dependency={waits} SCRIPT ", shown)
    assert "SCRIPT, STAGES and JOB_OF_... stand for what is known once" in shown
    assert list(tmp_path.iterdir()) == []
