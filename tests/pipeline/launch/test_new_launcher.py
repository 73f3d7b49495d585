"""A launcher is added by two files: a module and a config. Here each stage becomes a plain subprocess."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

MODULE = '''
"""Each stage as a plain subprocess, one after the other."""

import subprocess
import sys

from pipeline.launch.launcher import Launcher, LaunchSettings, StageOutcome
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.progress import Outcome


class PlainLaunch(LaunchSettings):
    niceness: int


class PlainLauncher(Launcher):
    settings = PlainLaunch
    waits = True

    def preview(self, plans):
        return [f"{len(plan.stages)} plain processes" for plan in plans]

    def submit(self, plans, display):
        outcomes = []
        for plan in plans:
            for stage in plan.stages:
                frozen = write_frozen(stage.frozen)
                command = ["nice", "-n", str(plan.config.launch["niceness"]), sys.executable, "-m"]
                done = subprocess.run([*command, "pipeline.training.worker", str(frozen.path)])
                outcome = Outcome.FAILED if done.returncode else Outcome.FINISHED
                display.note(f"{stage.name}: {outcome.value}")
                outcomes.append(StageOutcome(plan.config.run.name, stage.name, stage.fingerprint, outcome))
        return outcomes


LAUNCHER = PlainLauncher()
'''
NOT_NEEDED = ("embed", "prior", "decoder", "upsampler", "judge_clip", "judge", "evaluate", "export")
PROGRAM = """
import json, sys
from pipeline.cli import main
print([main(line) for line in json.loads(sys.argv[1])])
"""


def test_a_launcher_is_one_new_module_and_one_new_config(tmp_path: Path):
    house = tmp_path / "house"
    for folder in ("pipeline", "stages", "conf", "slurm"):
        shutil.copytree(ROOT / folder, house / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path for path in house.rglob("*") if path.is_file()}
    (house / "pipeline" / "launch" / "plain.py").write_text(MODULE)
    (house / "conf" / "launch" / "plain.yaml").write_text("kind: plain\nniceness: 1\n")
    assert len({path for path in house.rglob("*") if path.is_file()} - before) == 2

    line = ["experiment=smoke", "tracking=none", *(f"~stage.{name}" for name in NOT_NEEDED), "launch=plain"]
    commands = [
        ["plan", *line],
        ["plan", *line, "launch.nicenes=2"],
        ["plan", *line, "launch.kind=moon"],
        ["submit", *line],
        ["run", *line, "trainer.accelerator=cpu", "stage.clip.max_samples=16"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=house, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.stdout.splitlines()[-1:] == ["[0, 2, 2, 2, 0]"], said
    assert "2 plain processes" in said
    assert "launch.nicenes is an unknown key" in done.stderr
    assert "there are 'local', 'plain', 'slurm'" in done.stderr
    assert "launch.kind='plain' has no jobs" in done.stderr
    assert "prepare: finished" in said
    assert "clip: finished" in said
    record = json.loads((house / "outputs" / "runs" / "smoke" / "run.json").read_text())
    for stage in record["stages"]:
        assert (house / "outputs" / "artifacts" / stage["name"] / stage["fingerprint"] / "manifest.json").exists()
