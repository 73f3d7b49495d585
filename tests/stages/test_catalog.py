"""What counts in the fingerprints of the real stages."""

import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from pipeline.compose import compose_members
from pipeline.config import RUNTIME, Settings, validate
from pipeline.errors import UserError
from pipeline.workflow.fingerprint import canonical_json, counted_settings
from pipeline.workflow.plan import plan_run
from stages.catalog import CATALOG
from stages.clip.settings import ClipSettings, identity

KINDS = sorted(CATALOG.stages)


def leaves(settings: Settings, path: tuple[str, ...] = (), runtime: bool = False) -> Iterator[tuple[Any, bool]]:
    """(path, whether it is marked RUNTIME) of every setting, at any depth."""
    for name, field in type(settings).model_fields.items():
        marked = runtime or RUNTIME in field.metadata
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from leaves(value, (*path, name), marked)
        else:
            yield (*path, name), marked


def changed(settings: Settings, path: tuple[str, ...]) -> Settings:
    name, *rest = path
    value = getattr(settings, name)
    other = changed(value, tuple(rest)) if rest else another(value)
    return settings.model_copy(update={name: other})


def another(value: Any) -> Any:
    match value:
        case None:
            return 1
        case bool():
            return not value
        case StrEnum():
            return next(each for each in type(value) if each is not value)
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case Path():
            return value / "x"
        case tuple():
            return (*value, *value) if value else ("x",)
    raise AssertionError(f"no other value known for {value!r}")


@pytest.fixture(scope="module")
def composed() -> dict[str, Settings]:
    (member,) = compose_members("unclip plan", [])
    stages = {values["kind"]: {**values} for values in member.config.stage.values()}
    return {
        kind: validate(CATALOG.stages[kind].settings, {k: v for k, v in values.items() if k != "kind"})
        for kind, values in stages.items()
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_s_identity_changes_with_every_counted_setting_and_with_no_runtime_one(
    composed: dict[str, Settings], kind: str
):
    settings = composed[kind]
    before = canonical_json(counted_settings(settings))
    for path, is_runtime in leaves(settings):
        after = canonical_json(counted_settings(changed(settings, path)))
        assert (after == before) is is_runtime, ".".join(path)


def test_batch_sizes_of_stages_that_train_nothing_are_runtime_settings(composed: dict[str, Settings]):
    runtime = {(kind, ".".join(path)) for kind in KINDS for path, is_runtime in leaves(composed[kind]) if is_runtime}
    assert {("embed", "batch_size"), ("evaluate", "batch_size")} <= runtime


def test_an_open_clip_checkpoint_counts_by_its_contents_and_not_by_its_path(
    composed: dict[str, Settings], tmp_path: Path
):
    settings = composed["clip"]
    assert isinstance(settings, ClipSettings)
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (
        identity(settings.model_copy(update={"checkpoint": tmp_path / name})) for name in ("a.pt", "b.pt", "c.pt")
    )
    assert a == b
    assert a != c
    assert a != identity(settings)


def test_a_checkpoint_that_cannot_be_read_is_refused_before_anything_runs(composed: dict[str, Settings]):
    settings = composed["clip"].model_copy(update={"checkpoint": Path("/no/such.pt")})
    assert isinstance(settings, ClipSettings)
    with pytest.raises(UserError, match=r"stage\.clip\.checkpoint=/no/such\.pt cannot be read .*; give the path"):
        identity(settings)


def test_the_catalog_s_inputs_are_outputs_of_the_catalog():
    outputs = {declaration.output for declaration in CATALOG.stages.values()}
    for kind, declaration in CATALOG.stages.items():
        assert {each.name for each in declaration.inputs} <= outputs, kind


@pytest.mark.parametrize("workflow", ["unclip", "unclip_two_upsamplers", "glide"])
def test_seed_and_precision_count_in_every_stage_that_computes_and_not_in_what_is_gathered(
    workflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (member,) = compose_members("unclip plan", [f"workflow={workflow}", "seed=7"])
    frozen = {stage.name: stage.frozen for stage in plan_run(member.config).stages}
    assert {"prepare", "clip", "judge"} < frozen.keys()
    for name, stage in frozen.items():
        assert stage is not None
        counted = {key: stage.identity[key] for key in ("seed", "precision") if key in stage.identity}
        assert counted == ({} if name == "prepare" else {"seed": 7, "precision": "bf16-products"}), name


def test_the_catalog_imports_no_torch():
    program = "import sys, stages.catalog; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.decoder.network.kind=dit", r"stage\.decoder\.network: kind='dit' is no network .*; there are unet"),
        (
            "+stage.decoder.network.depth=3",
            r"stage\.decoder\.network\.depth is an unknown key; valid .* channels, .*",
        ),
        (
            "stage.evaluate.metrics=[blur]",
            r"stage\.evaluate\.metrics: 'blur' is no metric; there are clip_score, cmmd, .*, frechet, .*",
        ),
        ("+data.colours=3", r"^data\.colours is an unknown key; valid keys here: .*two_objects_share"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(override: str, message: str, tmp_path: Path):
    (member,) = compose_members("unclip plan", [override, f"paths.outputs={tmp_path}"])
    with pytest.raises(UserError, match=message) as error:
        plan_run(member.config)
    assert "\n" not in str(error.value)


def test_a_decoder_of_before_there_was_a_choice_of_networks_is_a_unet(composed: dict[str, Settings]):
    values = composed["decoder"].model_dump(mode="json")
    assert values["network"].pop("kind") == "unet"
    before = validate(CATALOG.stages["decoder"].settings, values)
    assert before == composed["decoder"]
    assert "kind" not in counted_settings(before)["network"]
