import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.compose import CONFIG_DIRECTORY, compose_members
from pipeline.config import TrainerSettings
from pipeline.errors import UserError
from pipeline.launch.slurm.batch import render
from pipeline.launch.slurm.commands import environment_of_jobs
from pipeline.launch.slurm.settings import SlurmLaunch
from pipeline.launch.slurm.submit import plan_jobs
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.plan import plan_run
from tests.support import fakes

NASTY = 'it\'s $(touch pwned) "x" `touch pwned`\n; touch pwned'


def launch(**changes: object) -> SlurmLaunch:
    values = yaml.safe_load((CONFIG_DIRECTORY / "launch" / "slurm.yaml").read_text())
    return SlurmLaunch.model_validate({**values, **changes})


def frozen(outputs: Path, **trainer: object) -> FrozenStage:
    settings = TrainerSettings.model_validate({**fakes.TRAINER.model_dump(), **trainer})
    stage = fakes.plan(outputs, trainer=settings)["clip"].frozen
    assert stage is not None
    return stage


def run_lines_of_environment(script: str, directory: Path) -> dict[str, str]:
    """What the batch script would export, as a shell understands it."""
    exports = script.split("\nfinish_if_there\n")[1].split("export OMP_NUM")[0]
    done = subprocess.run(["bash", "-c", f"{exports}\nenv -0"], cwd=directory, capture_output=True, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if "=" in entry)


def test_rendering_is_a_pure_function(tmp_path: Path):
    stage = frozen(tmp_path / "outputs")
    assert render(stage, launch()) == render(stage, launch())
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_stage_stands_in_the_script(tmp_path: Path):
    one = render(frozen(tmp_path / NASTY), launch())
    other = render(frozen(tmp_path / "plain"), launch())
    assert one.script == other.script
    assert any(NASTY in argument for argument in one.arguments)


def test_the_template_is_a_script_that_bash_accepts(tmp_path: Path):
    script = tmp_path / "script"
    script.write_text(
        render(frozen(tmp_path), launch(modules=["cuda/12.4", NASTY.replace("\n", "")], setup_script=NASTY)).script
    )
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_key_that_is_exported_stands_in_no_job_and_no_frozen_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    stage = frozen(tmp_path)
    assert "k" * 40 not in str(render(stage, launch()))
    assert "k" * 40 not in write_frozen(stage).path.read_text()


def test_environment_values_reach_the_stage_as_they_are(tmp_path: Path):
    script = render(frozen(tmp_path / "outputs"), launch(environment={"A_B": NASTY, "C": "two  spaces"})).script
    exported = run_lines_of_environment(script, tmp_path)
    assert (exported["A_B"], exported["C"]) == (NASTY, "two  spaces")
    assert not (tmp_path / "pwned").exists()


def test_slurm_replaces_nothing_in_the_name_of_the_log(tmp_path: Path):
    (output,) = (each for each in render(frozen(tmp_path / "%j"), launch()).options if each.startswith("--output="))
    assert "/%%j/" in output


@pytest.mark.parametrize(
    ("request_by", "kind", "option"),
    [("gres", "a100", "--gres=gpu:a100:1"), ("gpus-per-node", None, "--gpus-per-node=1"), ("none", None, None)],
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(
    tmp_path: Path, request_by: str, kind: str | None, option: str | None
):
    options = render(frozen(tmp_path), launch(gpu_request=request_by, gpu_type=kind)).options
    asked = [each for each in options if each.startswith(("--gres", "--gpus"))]
    assert asked == ([] if option is None else [option])


def test_a_stage_that_trains_has_a_task_for_each_device_of_each_node(tmp_path: Path):
    (member,) = compose_members(
        "unclip plan", ["launch=slurm_gpu", "trainer.devices=4", "trainer.num_nodes=2", f"paths.outputs={tmp_path}"]
    )
    jobs = {job.stage.stage: job.batch.options for job in plan_jobs([plan_run(member.config)])}
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(jobs["decoder"])
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"} <= set(jobs["evaluate"])
    assert not [option for option in jobs["prepare"] if option.startswith("--gpus")]


def test_jobs_share_stages_and_need_exactly_what_is_not_finished(tmp_path: Path):
    members = compose_members(
        "unclip plan", ["-m", "launch=slurm", "stage.decoder.clip_loss.weight=0,0.1,0.3", "seed=1,2",
                        f"paths.outputs={tmp_path}"]
    )  # fmt: skip
    jobs = plan_jobs([plan_run(member.config, member.overrides) for member in members])
    names = [job.stage.stage for job in jobs]
    assert {name: names.count(name) for name in set(names)} == {
        "prepare": 1, "clip": 2, "embed": 2, "prior": 2, "decoder": 6, "upsampler": 2, "judge_clip": 2, "judge": 2,
        "evaluate": 6, "export": 6,
    }  # fmt: skip
    by_key = {job.key: job for job in jobs}
    decoder = next(job for job in jobs if job.stage.stage == "decoder")
    assert [by_key[key].stage.stage for key in decoder.needs] == ["prepare", "clip", "embed"]
    assert all(list(by_key).index(key) < list(by_key).index(job.key) for job in jobs for key in job.needs)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("launch.partitions=x", ["launch.partitions", "unknown key", "did you mean 'partition'?", "qos"]),
        ("launch.stages.decoder.mem=1", ["launch.stages.decoder.mem", "unknown key", "mem_gib", "time_limit_min"]),
        ("launch.stages.decodr.mem_gib=1", ["launch.stages.decodr", "names no stage", "decoder"]),
        ("launch.time_limit_min=2", ["stop_before_s 120", "time_limit_min 2", "use less than 120"]),
        ("launch.environment.WANDB_API_KEY=x", ["WANDB_API_KEY", "batch script", "export it before"]),
        ('launch.partition="a\nb"', ["launch.partition", "match pattern"]),
        ("launch=slrum", ["launch/slrum", "is no choice", "local, slurm, slurm_gpu"]),
        ("launch.sbatch_arguments=[nice]", ["launch.sbatch_arguments", "nice"]),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_before_anything_is_submitted(
    tmp_path: Path, arguments: str, fragments: list[str]
):
    profile = [] if arguments.startswith("launch=") else ["launch=slurm"]

    def submit() -> None:
        (member,) = compose_members("unclip submit", [*profile, arguments, f"paths.outputs={tmp_path}"])
        plan_jobs([plan_run(member.config)])

    with pytest.raises(UserError) as refusal:
        submit()
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value
    assert "\n" not in str(refusal.value)


def test_jobs_inherit_no_marks_of_the_job_that_submits_them():
    own = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/x", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "WANDB_API_KEY": "k"}
    assert environment_of_jobs(own) == {"SLURM_CONF": "/x", "WANDB_API_KEY": "k"}


def test_the_code_of_the_submission_comes_first_and_the_job_s_directory_last(tmp_path: Path):
    stage = frozen(tmp_path / NASTY.replace("\n", "")).model_copy(update={"code": "0123"})
    script = render(stage, launch(environment={"PYTHONPATH": "/of/a/profile"}).resources_of("clip", "clip")).script
    found = run_lines_of_environment(script, tmp_path)
    assert found["PYTHONPATH"] == f"{stage.outputs}/code/0123:/of/a/profile:{tmp_path}"
    assert found["PYTHONSAFEPATH"] == "1"
