"""The design's rules on who imports whom, held by reading the sources."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

LISTED = ("stages/prepare/sources/*.py", "stages/decoder/networks/*.py", "stages/evaluate/metrics/*.py")
"""Modules that planning finds by listing their folder."""

HEAVY = {"torch", "torchvision", "pytorch_lightning", "lightning_fabric", "diffusers", "transformers", "torchmetrics"}
SLURM_COMMANDS = {"sbatch", "squeue", "sacct", "scancel", "scontrol", "srun", "sinfo"}


def sources(*patterns: str) -> list[Path]:
    found = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    assert found, f"no source matches {patterns}"
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_when_loaded(path: Path) -> Iterator[str]:
    """The modules that importing a file imports: those outside of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += [child for child in node.orelse if isinstance(child, ast.stmt)]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def run_by() -> set[str]:
    """The module of each stage that does its work, as the catalog's declarations say."""
    module, _, name = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["catalog"].partition(":")
    catalog = getattr(import_module(module), name)
    return {declaration.run.partition(":")[0] for declaration in catalog.stages.values()}


RUN_BY = run_by()
STAGES = sorted({module.rpartition(".")[0] for module in RUN_BY})
"""The folder of each stage."""


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def offenders(paths: list[Path], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in paths
        for module in imports(path)
        if is_within(module, *forbidden) and not is_within(module, *but)
    ]


def users(*packages: str) -> set[str]:
    paths = sources("pipeline/**/*.py", "stages/**/*.py")
    return {
        str(path.relative_to(ROOT)) for path in paths if any(is_within(module, *packages) for module in imports(path))
    }


def test_the_pipeline_never_imports_stages():
    assert offenders(sources("pipeline/**/*.py"), "stages", "tests") == []


def test_the_workflow_imports_only_settings_and_errors_of_the_pipeline():
    own = ("pipeline.workflow", "pipeline.config", "pipeline.errors")
    assert offenders(sources("pipeline/workflow/**/*.py"), "pipeline", but=own) == []


def test_the_data_layer_imports_only_settings_options_and_errors_of_the_pipeline():
    own = ("pipeline.data", "pipeline.config", "pipeline.options", "pipeline.errors")
    assert offenders(sources("pipeline/data/**/*.py"), "pipeline", but=own) == []


def test_training_imports_data_and_workflow_and_no_command_line():
    own = (
        *("pipeline.training", "pipeline.tracking", "pipeline.data"),
        *("pipeline.launch.identity", "pipeline.workflow", "pipeline.picture_grid"),
        *("pipeline.config", "pipeline.errors"),
    )
    assert offenders(sources("pipeline/training/**/*.py"), "pipeline", but=own) == []


def test_the_forecast_imports_training_and_the_terminal_and_is_loaded_when_asked_for():
    own = (
        *("pipeline.forecast", "pipeline.training", "pipeline.data", "pipeline.workflow", "pipeline.terminal"),
        *("pipeline.config", "pipeline.errors"),
    )
    assert offenders(sources("pipeline/forecast/**/*.py"), "pipeline", but=own) == []
    others = sources("pipeline/**/*.py")
    eager = [
        str(path.relative_to(ROOT))
        for path in others
        if any(is_within(module, "pipeline.forecast") for module in imports_when_loaded(path))
    ]
    assert {path for path in eager if not path.startswith("pipeline/forecast/")} == set()


def test_launchers_import_the_terminal_and_the_workflow_and_no_training():
    own = (
        "pipeline.launch",
        "pipeline.terminal",
        "pipeline.workflow",
        "pipeline.config",
        "pipeline.errors",
        "pipeline.overrides",
        "pipeline.secrecy",
    )
    assert offenders(sources("pipeline/launch/**/*.py"), "pipeline", but=own) == []
    assert offenders(sources("pipeline/launch/**/*.py"), *HEAVY, "wandb") == []


def test_the_terminal_imports_the_workflow_alone():
    own = ("pipeline.terminal", "pipeline.workflow", "pipeline.config", "pipeline.errors")
    assert offenders(sources("pipeline/terminal/**/*.py"), "pipeline", but=own) == []
    assert offenders(sources("pipeline/terminal/**/*.py"), *HEAVY, "wandb") == []


def test_what_is_made_of_the_record_imports_the_workflow_and_no_training():
    own = ("pipeline.tracking", "pipeline.workflow", "pipeline.config", "pipeline.options", "pipeline.errors")
    paths = sources("pipeline/tracking/**/*.py")
    assert offenders(paths, "pipeline", but=own) == []
    heavy = [module for path in paths for module in imports_when_loaded(path) if is_within(module, *HEAVY, "wandb")]
    assert heavy == []


def test_the_report_imports_the_workflow_and_no_training():
    own = (
        "pipeline.report",
        "pipeline.terminal",
        "pipeline.workflow",
        "pipeline.config",
        "pipeline.errors",
        "pipeline.picture_grid",
    )
    assert offenders(sources("pipeline/report/**/*.py"), "pipeline", but=own) == []
    assert offenders(sources("pipeline/report/**/*.py"), *HEAVY, "wandb") == []


def test_the_store_imports_launchers_and_the_workflow_and_no_training():
    own = (
        *("pipeline.store", "pipeline.terminal", "pipeline.launch.launcher", "pipeline.workflow"),
        *("pipeline.data.place", "pipeline.config", "pipeline.errors"),
    )
    assert offenders(sources("pipeline/store/**/*.py"), "pipeline", but=own) == []
    assert offenders(sources("pipeline/store/**/*.py"), *HEAVY, "wandb") == []


def test_the_board_imports_what_is_shown_and_no_training():
    own = ("pipeline.board", "pipeline.report", "pipeline.launch", "pipeline.workflow", "pipeline.errors")
    assert offenders(sources("pipeline/board/**/*.py"), "pipeline", but=own) == []
    assert offenders(sources("pipeline/board/**/*.py"), *HEAVY, "wandb") == []


def test_the_workflow_knows_no_report():
    assert offenders(sources("pipeline/workflow/**/*.py", "pipeline/training/**/*.py"), "pipeline.report") == []
    assert offenders(sources("pipeline/workflow/**/*.py"), "pipeline.tracking") == []


def test_settings_and_errors_import_nothing_else_of_the_pipeline():
    paths = sources("pipeline/config.py", "pipeline/config_fault.py", "pipeline/errors.py")
    assert offenders(paths, "pipeline", but=("pipeline.config_fault", "pipeline.errors")) == []


def test_the_engine_names_no_heavy_library_and_no_training():
    paths = sources("pipeline/*.py", "pipeline/workflow/**/*.py")
    assert offenders(paths, *HEAVY, "pipeline.training") == []


def test_what_planning_loads_of_the_stages_and_of_the_data_names_no_heavy_library():
    pending = sources(
        "stages/catalog.py", *LISTED, "pipeline/cli.py", "pipeline/workflow/**/*.py", "pipeline/compose.py"
    )
    loaded: dict[Path, list[str]] = {}
    while pending:
        path = pending.pop()
        loaded[path] = list(imports_when_loaded(path))
        for module in loaded[path]:
            file = ROOT / Path(*module.split(".")).with_suffix(".py")
            if file.exists() and file not in loaded:
                pending.append(file)
    assert ROOT / "pipeline" / "data" / "summary.py" in loaded
    heavy = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, modules in loaded.items()
        for module in modules
        if is_within(module, *HEAVY, "webdataset", "open_clip", "wandb", "deepspeed")
    ]
    assert heavy == []


def test_every_stage_that_a_workflow_can_name_has_a_folder_of_its_own():
    folders = {f"stages.{path.parent.name}" for path in sources("stages/*/train.py", "stages/*/run.py")}
    assert {f"stages.{name}" for name in ("prepare", "clip", "decoder", "judge", "export")} < set(STAGES) == folders


def test_stages_hand_each_other_artifacts_and_nobody_imports_what_makes_them():
    """Each other's settings, networks and samplers they may use, and not what trains or runs a stage."""
    assert offenders(sources("stages/**/*.py"), *RUN_BY) == []


@pytest.mark.parametrize("room", ["captions.py", "pictures.py", "unet.py", "weights.py", "diffusion/*.py"])
def test_what_stages_share_knows_of_no_stage(room: str):
    but = ("stages.clip",) if room == "captions.py" else ()
    assert offenders(sources(f"stages/{room}"), *STAGES, but=but) == []


@pytest.mark.parametrize(
    ("libraries", "door"),
    [
        (("hydra", "omegaconf"), "pipeline/compose"),
        (("wandb",), "pipeline/tracking/"),
        (("deepspeed",), "pipeline/training/strategies/zero.py"),
        (("open_clip",), "stages/clip/network.py"),
        (("webdataset",), "pipeline/data/"),
        (("s3fs", "aiobotocore", "botocore", "boto3"), "pipeline/data/s3.py"),
        (("fsspec",), "pipeline/store/remote.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_every_library_has_one_door(libraries: tuple[str, ...], door: str):
    assert {user for user in users(*libraries) if not user.startswith(door)} == set()


def constants(path: Path) -> list[str]:
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_slurm_s_commands_stand_in_one_file():
    paths = sources("pipeline/**/*.py", "stages/**/*.py")
    named = {str(path.relative_to(ROOT)) for path in paths if SLURM_COMMANDS & set(constants(path))}
    assert named == {"pipeline/launch/slurm/commands.py"}


def test_slurm_is_known_to_its_launcher_alone():
    """Its variables, its commands, and its modules."""
    own = ROOT / "pipeline" / "launch" / "slurm"
    others = [path for path in sources("pipeline/**/*.py", "stages/**/*.py") if own not in path.parents]
    assert [path for path in others if re.search(r"\bSLURM_|SLURMEnvironment", path.read_text(encoding="utf-8"))] == []
    assert {user for user in users("pipeline.launch.slurm") if not user.startswith("pipeline/launch/")} == set()


def test_only_launchers_read_from_the_environment_which_process_of_a_stage_this_is():
    variables = {"LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "UNCLIP_LAUNCHED_BY", "UNCLIP_INTERRUPTED"}
    reading = [str(path.relative_to(ROOT)) for path in sources("pipeline/**/*.py") if variables & set(constants(path))]
    assert {path for path in reading if not path.startswith("pipeline/launch/")} == set()


def test_importing_a_module_does_no_work_on_the_command_line():
    """Only files that are started as programs have an entry point."""
    started = {"pipeline/cli.py", "pipeline/tracking/sender.py", "pipeline/training/worker.py"}
    started |= {"pipeline/launch/slurm/aftermath.py"}
    found = {
        str(path.relative_to(ROOT))
        for path in sources("pipeline/**/*.py", "stages/**/*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    assert found == started
