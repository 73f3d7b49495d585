"""A sweep of the whole workflow, by the command that a user types, on the real cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.workflow.runs import read_runs, run_artifacts
from tests.support import world
from tests.support.command import said
from tests.support.tiny_runs import tiny_without

pytestmark = pytest.mark.usefixtures("cluster")

UNCLIP = str(Path(sys.executable).parent / "unclip")
SHARED = ("prepare", "clip", "embed", "prior", "upsampler", "judge", "judge_clip")
OF_A_MEMBER = ("decoder", "evaluate", "export")


def unclip(*arguments: str) -> str:
    done = subprocess.run(
        [UNCLIP, *arguments], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_submitted_sweep_trains_shared_stages_once_and_ends_without_a_driver(tmp_path: Path, is_whole: bool):
    left_out = () if is_whole else ("embed", "prior", "upsampler", "judge", "judge_clip", "evaluate", "export")
    shared, own = (set(stages).difference(left_out) for stages in (SHARED, OF_A_MEMBER))
    line = [
        *tiny_without(*left_out),
        f"stage.decoder.condition={'image_embed' if is_whole else 'text_embed'}",
        "run.name=sweep", "stage.decoder.clip_loss.weight=0,0.1", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    profile = ["launch=slurm", "launch.mem_gib=2", "launch.stages.decoder.time_limit_min=30", "launch.max_parallel=3"]
    dry = said("plan", "-m", *line, *profile)
    assert "--time=30" in dry
    assert "scontrol requeue" in dry
    assert not list(tmp_path.iterdir())
    shown = unclip("submit", "-m", *line, *profile)
    assert shown.partition("unclip status")[0].count("submitted") == len(shared) + 2 * len(own)
    assert "queued already" in said("submit", "-m", *line, *profile)

    def is_finished() -> bool:
        states = world.slurm("squeue", "-h", "-o", "%T").split()
        return not states

    world.wait("the sweep", is_finished, timeout_s=600)
    members = read_runs(tmp_path, "sweep")
    assert [member.name for member in members] == ["sweep.0", "sweep.1"]
    of_members = [run_artifacts(tmp_path, member) for member in members]
    assert all(set(artifacts) == shared | own for artifacts in of_members), said(
        "status", "sweep", "--outputs", str(tmp_path)
    )
    first, second = of_members
    assert {name for name in first if first[name].path == second[name].path} == shared
    status = said("status", "sweep", "--outputs", str(tmp_path))
    assert status.count("finished") == len(shared) + 2 * len(own)
    assert "0-1" in status
    assert "every stage is finished" in said("submit", "-m", *line, *profile)
