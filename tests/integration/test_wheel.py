"""What `pip install .` installs works without the checkout: in an environment of its own, from an empty directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT

Command = Callable[..., subprocess.CompletedProcess[str]]


def run(
    *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; for the libraries it looks into the one that runs the tests."""
    place = tmp_path_factory.mktemp("wheel")
    # Building leaves files beside the sources.
    source = place / "source"
    for name in ("pipeline", "stages", "conf", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source)
    shutil.rmtree(source)
    environment = place / "environment"
    venv.create(environment)
    (wheel,) = place.glob("*.whl")
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    own = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    # A line of a .pth file is a place for modules alone: the editable install over there is not taken up.
    (Path(own) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return environment


@pytest.fixture
def unclip(installed: Path, tmp_path: Path) -> Command:
    """The installed command, in an empty directory."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(installed / "bin" / "unclip", *arguments, cwd=tmp_path, env=environment)

    code = "import pipeline, stages; print(pipeline.__file__, stages.__file__)"
    places = run(installed / "bin" / "python", "-c", code, cwd=tmp_path, env=environment).stdout.split()
    assert all(Path(place).is_relative_to(installed) for place in places)
    return command


def test_the_installed_command_plans_and_brings_its_configs_and_batch_script(unclip: Command, tmp_path: Path):
    assert unclip("plan").stdout.count("│ run") == 10
    assert "scontrol requeue" in unclip("plan", "launch=slurm").stdout
    assert not list(tmp_path.iterdir())


def test_a_folder_of_one_s_own_adds_to_the_configs(unclip: Command, tmp_path: Path):
    own = tmp_path / "conf" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - smoke\n  - _self_\nrun:\n  name: of-my-own\n")
    assert "of-my-own" in unclip("plan", "--config-dir", "conf", "experiment=mine").stdout


@pytest.mark.slow
def test_the_installed_command_trains_and_samples(unclip: Command, tmp_path: Path):
    unclip("run", "experiment=smoke", "trainer.accelerator=cpu")
    assert len(list(tmp_path.glob("outputs/artifacts/*/*/manifest.json"))) == 10
