import shlex
from pathlib import Path

import pytest

from pipeline.compose import Member, compose_members, registered_commands, run_by_hydra
from pipeline.errors import UserError
from pipeline.workflow.declaration import resolve


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def compose(*arguments: str) -> list[Member]:
    return compose_members("unclip plan", [*arguments, "tracking=none"])


def test_without_overrides_one_member_is_the_demo():
    (member,) = compose_members("unclip plan", [])
    assert member.config.run.name == "demo"
    assert member.config.run.group is None
    assert member.overrides == ()
    assert next(iter(member.config.stage)) == "prepare"
    assert member.config.stage["prepare"]["data"] == member.config.data


def test_overrides_are_applied_and_kept_as_they_were_typed():
    (member,) = compose("stage.decoder.clip_loss.weight=0.25", "run.name=mine")
    assert member.config.stage["decoder"]["clip_loss"]["weight"] == 0.25
    assert member.config.run.name == "mine"
    assert member.overrides == ("stage.decoder.clip_loss.weight=0.25", "run.name=mine", "tracking=none")


def test_a_sweep_has_a_member_for_each_point_named_after_it():
    members = compose("-m", "run.name=sweep", "seed=1,2", "stage.decoder.clip_loss.weight=0,0.1")
    assert [member.config.run.name for member in members] == ["sweep.0", "sweep.1", "sweep.2", "sweep.3"]
    assert {member.config.run.group for member in members} == {"sweep"}
    points = [(each.config.seed, each.config.stage["decoder"]["clip_loss"]["weight"]) for each in members]
    assert points == [(1, 0), (1, 0.1), (2, 0), (2, 0.1)]


def test_a_sweep_over_config_groups_composes_each_member_from_its_files():
    members = compose("-m", "run.name=s", "workflow=unclip,glide", "seed=1,2")
    assert [("prior" in each.config.stage, each.config.seed) for each in members] == [
        (True, 1), (True, 2), (False, 1), (False, 2),
    ]  # fmt: skip
    assert [each.config.run.name for each in members] == ["s.0", "s.1", "s.2", "s.3"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("stage.decoder.objective.prediction_type", ["epsilon", "v_prediction"]),
        ("stage.decoder.image_size", ["16", "32"]),  # the upsampler's low_size is interpolated from it
        ("stage.upsampler.low_size", ["16", "8"]),  # an interpolation itself
        ("data.seed", ["1", "2"]),  # a part of what is interpolated as a whole
        ("stage.clip.global_batch_size", ["${stage.embed.batch_size}", "64"]),
        ("stage.decoder.network.channels", ["[16,32,64]", "[32,32,64]"]),
        ("stage.prior.optimizer.freeze", ["[]", "['a*']"]),
        ("stage.clip.optimizer.layer_decay", ["null", "0.5"]),
        ("run.name", ["'1'", "two"]),
        ("stage.clip.trainer.devices", ["1", "2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_swept_values_give_the_configs_that_they_give_alone(key: str, values: list[str]):
    swept = compose("-m", f"{key}={','.join(values)}", "stage.prior.trainer.devices=2")
    for value, member in zip(values, swept, strict=True):
        (alone,) = compose(f"{key}={value}", "stage.prior.trainer.devices=2")
        assert member.config.model_copy(update={"run": alone.config.run}) == alone.config
        assert member.config.run.group == alone.config.run.name


def test_members_from_a_file_are_paired_quoted_and_commented(tmp_path: Path):
    (tmp_path / "members").write_text(
        "seed=1 stage.decoder.clip_loss.weight=0.5\n\n# a comment\n"
        "stage.clip.trainer.devices=2 'stage.prior.network={layers: 3}'  # two\nworkflow=glide\n"
    )
    members = compose("--members", str(tmp_path / "members"), "run.name=pairs", "stage.clip.max_samples=64")
    assert [each.config.run.name for each in members] == ["pairs.0", "pairs.1", "pairs.2"]
    one, two, three = (each.config for each in members)
    assert (one.seed, one.stage["decoder"]["clip_loss"]["weight"]) == (1, 0.5)
    assert (two.stage["clip"]["trainer"], two.stage["prior"]["network"]["layers"]) == ({"devices": 2}, 3)
    assert "prior" not in three.stage
    assert {each.stage["clip"]["max_samples"] for each in (one, two, three)} == {64}
    assert members[0].overrides[-2:] == ("seed=1", "stage.decoder.clip_loss.weight=0.5")


@pytest.mark.parametrize(
    ("content", "arguments", "fragments"),
    [
        ("seed=1,2", [], ["members:1", "several values", "one member per line"]),
        ("seed", [], ["members:1", "no list of overrides"]),
        ("'seed=1", [], ["members:1", "No closing quotation"]),
        ("# nothing", [], ["has no member"]),
        ("sed=1", [], ["sed is an unknown key", "did you mean 'seed'?"]),
        ("seed=1", ["-m"], ["--members", "-m", "use one of the two"]),
        ("seed=1", ["--members=b"], ["--members is given 2 times", "one file"]),
        ("seed=1 seed=2", [], ["members:1", "seed is given twice (seed=1, seed=2)", "give it once"]),
        ("# two\n++seed=1", ["seed=2"], ["members:2", "(seed=2, ++seed=1)", "on the command line or in the file"]),
        ("data=emoji data=scenes", [], ["members:1", "data is given twice"]),
    ],
)
def test_a_file_of_members_that_is_wrong_is_refused_with_its_line(
    tmp_path: Path, content: str, arguments: list[str], fragments: list[str]
):
    (tmp_path / "members").write_text(content)
    with pytest.raises(UserError) as refusal:
        compose("--members", str(tmp_path / "members"), *arguments)
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value
    with pytest.raises(UserError, match="No such file"):
        compose("--members", "nowhere")


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize(
    "arguments", [["seed=1", "++seed=2"], ["data=scenes", "data=emoji"], ["~stage.judge", "~stage.judge"]]
)
def test_a_key_that_is_given_twice_is_refused(sweep: list[str], arguments: list[str]):
    with pytest.raises(UserError, match=r"is given twice .*; give it once"):
        compose(*sweep, *arguments)
    with pytest.raises(UserError, match=r"is given twice .*; give it once"):
        run_by_hydra("unclip run", ["-m", "hydra/sweeper=optuna", *arguments])


def test_a_default_holds_where_its_key_is_not_given(tmp_path: Path):
    (tmp_path / "members").write_text("launch=slurm_gpu\nseed=1\n")
    cpus = {}
    for typed in ([], ["launch=slurm_gpu"], ["--members", "members"]):
        members = compose_members("unclip submit", ["tracking=none", *typed], default="launch=slurm")
        cpus[" ".join(typed)] = [each.config.launch["cpus_per_task"] for each in members]
    assert cpus == {"": [2], "launch=slurm_gpu": [8], "--members members": [8, 2]}


def test_a_brace_pattern_needs_no_quotes_of_its_own(tmp_path: Path):
    values = {
        "/x/{00000..00003}.tar": "/x/{00000..00003}.tar",
        "/x/{a,b}.tar": "/x/{a,b}.tar",
        "{a,b}.tar": "{a,b}.tar",
        "'/x/{0..3}.tar'": "/x/{0..3}.tar",
        "[/x/{0..1}.tar,/y]": ["/x/{0..1}.tar", "/y"],
        "https://host/{0..1}.tar": "https://host/{0..1}.tar",
        "${paths.outputs}/{0..1}.tar": "outputs/{0..1}.tar",
    }
    (tmp_path / "members").write_text("".join(f'"data.shards={typed}"\n' for typed in values))
    members = compose("--members", "members", "data=webdataset")
    assert [each.config.data["shards"] for each in members] == list(values.values())


def test_a_recorded_brace_pattern_can_be_given_again_as_it_is_and_through_a_shell():
    (member,) = compose("data=webdataset", "data.shards=[/x/{0..1}.tar,/y]")
    for again in (member.overrides[:-1], shlex.split(" ".join(member.overrides[:-1]))):
        assert compose(*again) == [member]


def test_a_sweep_takes_brace_patterns_as_its_values():
    members = compose("-m", "data=webdataset", "data.shards=/x/{0..1}.tar,/y/{a,b}.tar")
    assert [each.config.data["shards"] for each in members] == ["/x/{0..1}.tar", "/y/{a,b}.tar"]


def test_a_mapping_is_no_brace_pattern():
    (member,) = compose("stage.prior.network={layers: 3}")
    assert member.config.stage["prior"]["network"]["layers"] == 3


def test_a_stage_s_own_trainer_settings_are_typed_like_any_others():
    (member,) = compose("stage.clip.trainer.micro_batch_size=2")
    assert member.config.stage["clip"]["trainer"] == {"micro_batch_size": 2}
    assert member.overrides[0] == "stage.clip.trainer.micro_batch_size=2"


def test_composing_writes_nothing(tmp_path: Path):
    compose("experiment=smoke")
    assert list(tmp_path.iterdir()) == []


def test_composing_twice_in_one_process_gives_equal_configs():
    assert compose("experiment=smoke") == compose("experiment=smoke")


@pytest.mark.parametrize(
    ("argument", "fragments"),
    [
        ("sed=1", ["sed is an unknown key", "did you mean 'seed'?", "valid keys here: catalog, data"]),
        ("stage.decoder.clip_loss.wieght=1", ["stage.decoder.clip_loss.wieght", "did you mean 'weight'?"]),
        ("stage.clp.max_samples=1", ["stage.clp is an unknown key", "did you mean 'clip'?"]),
        ("workflow=unclipp", ["workflow/unclipp", "glide, unclip, unclip_two_upsamplers"]),
        ("experiment=nope", ["experiment/nope", "emoji", "smoke"]),
        ("trainer.precision=fp8", ["trainer.precision='fp8'", "'bf16-mixed'"]),
        ("trainer.devices=0", ["trainer.devices=0", "greater than 0"]),
        ("seed=-1", ["seed=-1", "greater than or equal to 0"]),
        ("seed=many", ["seed='many'", "valid integer"]),
        ("run.name=../up", ["run.name='../up'"]),
        ("launch.kind=moon", ["launch.kind='moon'", "'local'"]),
        ("data=webdataset", ["data.shards has no value; set data.shards=..."]),
        ("no_equals_sign", ["'no_equals_sign' cannot be read as an override", "write key=value"]),
        ("seed=[1", ["'seed=[1' cannot be read as an override", "write key=value"]),
        ("seed=1 2 =", ["'seed=1 2 =' cannot be read as an override"]),
        ("+data=emoji", ["data has a value already; write data=... without the +"]),
        ("seed=${nowhere}", ["seed", "nowhere"]),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_key_and_remedy(argument: str, fragments: list[str]):
    with pytest.raises(UserError) as caught:
        compose(argument)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_every_registered_command_can_be_imported():
    commands = registered_commands()
    assert "sample" in commands
    assert all(callable(resolve(function)) for function in commands.values())


@pytest.mark.parametrize(
    "line",
    [["data=null"], ["+data=null"], ["data=3"], ["data=true"], ["-m", "data=null,scenes"], ["model/unet@stage.x=null"]],
)
def test_a_group_that_is_given_no_name_is_refused_with_its_choices(line: list[str]):
    with pytest.raises(UserError, match=r"'[^']+' names no choice; there are .*(scenes|demo_decoder)"):
        compose_members("unclip plan", line)
