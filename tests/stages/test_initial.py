"""Stages that start from another run's weights, or take them as they are: what is planned, and what is made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.compose import compose_members
from pipeline.errors import UserError
from pipeline.workflow.plan import Action, Plan, plan_run
from pipeline.workflow.runs import record_run
from pipeline.workflow.sealed import read_json, write_json_atomically
from tests.stages.clip.test_sources import CONFIGS, write_local_dir
from tests.support.tiny_runs import TINY, run_until, the_last_of_each_key

WITHOUT_CLIP = [each for each in TINY if not each.startswith("stage.clip.")]
OTHER = ["run.name=other", "seed=5"]


def plan_of(outputs: Path, *overrides: str, base: list[str] = TINY) -> Plan:
    (member,) = compose_members("unclip plan", the_last_of_each_key(*base, f"paths.outputs={outputs}", *overrides))
    return plan_run(member.config, member.overrides)


def stage_of(plan: Plan, name: str):
    return next(stage for stage in plan.stages if stage.name == name)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run `base` has a CLIP, a prior and a decoder, and no upsampler yet."""
    outputs = tmp_path_factory.mktemp("outputs")
    record_run(plan_of(outputs, "run.name=base"))
    run_until(outputs, "prior")
    run_until(outputs, "decoder")
    return outputs


def test_a_plan_says_what_a_stage_starts_from_and_counts_it_by_its_contents(outputs: Path):
    plain = stage_of(plan_of(outputs, *OTHER), "decoder")
    started = stage_of(plan_of(outputs, *OTHER, "stage.decoder.initial=run:base"), "decoder")
    by_name = stage_of(plan_of(outputs, *OTHER, "stage.decoder.initial=run:base/decoder"), "decoder")

    assert started.action is Action.RUN
    number = len(load_file(run_until(outputs, "decoder").path / "weights.safetensors"))
    assert started.reason.endswith(f"starts from run:base, {number} weights, made with other clip and embeddings")
    assert started.fingerprint == by_name.fingerprint != plain.fingerprint
    assert started.frozen is not None
    assert started.frozen.initial is not None
    base = stage_of(plan_of(outputs, "run.name=base"), "decoder")
    assert started.frozen.initial.fingerprint == base.fingerprint
    assert stage_of(plan_of(outputs, "stage.decoder.initial=null"), "decoder").action is Action.REUSE


def test_the_network_of_the_weights_takes_the_place_of_the_configured_one(outputs: Path):
    others = [
        each
        for each in TINY
        if not each.startswith(("stage.prior.network", "stage.decoder.network", "stage.decoder.image_size"))
    ]
    plan = plan_of(outputs, *OTHER, "stage.prior.initial=run:base", base=others)
    frozen = stage_of(plan, "prior").frozen
    assert frozen is not None
    assert frozen.settings["network"] == {"layers": 1, "heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage.decoder.initial=run:nobody"], r"stage\.decoder\.initial=run:nobody: no run .nobody..*runs there"),
        (["stage.decoder.initial=run:base/decodr"], r"run base has no stage 'decodr'; write run:base/decoder"),
        (["stage.decoder.initial=run:base/clip"], r"stage clip of run base is of kind clip, not decoder"),
        (["stage.decoder.initial=run:other"], r"is this run itself; give this one another name by run\.name"),
        (
            ["stage.prior.optimizer.layer_decay=0.5"],
            r"stage\.prior\.optimizer\.layer_decay=0\.5 counts the layers of CLIP's",
        ),
        (["stage.decoder.initial=karlo"], r"names no weights; write run:NAME or diffusers:PATH"),
        (["stage.decoder.initial=diffusers:/no/such"], r"has no decoder/config\.json; give a folder of diffusers"),
        (["stage.prior.max_samples=0"], r"stage\.prior\.max_samples=0 trains nothing; set stage\.prior\.initial"),
        (
            ["stage.prior.initial=run:base", "stage.prior.network.layers=3"],
            r"stage\.prior\.network\.layers=3 is not that of run:base, which is 1; leave it out",
        ),
        (
            ["stage.prior.initial=run:base", "stage.clip.network.embed_dim=32", "stage.clip.network.text_width=32"],
            r"works on a CLIP of embed_dim 16, and this workflow's has 32; take the same CLIP",
        ),
        (
            ["stage.clip.initial=run:base", "stage.clip.checkpoint=setup.sh"],
            r"stage\.clip\.checkpoint and stage\.clip\.initial both name weights",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused_at_the_plan(outputs: Path, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        plan_of(outputs, *OTHER, *overrides, base=[each for each in TINY if "prior.network" not in each])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cut_bytes", "message"),
    [
        (
            100,
            r"weights\.safetensors is no file of plain weights, or not whole \(SafetensorError: .*\); save ",
        ),
        (None, r"has manifest schema 2 and this code reads 1; remove it and run again, or use the version of unclip"),
    ],
)
def test_a_damaged_artifact_and_a_newer_one_are_refused_at_the_plan(
    cut_bytes: int | None, message: str, outputs: Path, tmp_path: Path
):
    copied = tmp_path / "outputs"
    shutil.copytree(outputs, copied)
    prior = stage_of(plan_of(copied, "run.name=base"), "prior")
    assert prior.fingerprint is not None
    place = copied / "artifacts" / "prior" / prior.fingerprint
    if cut_bytes is not None:
        weights = place / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-cut_bytes])
    else:
        manifest = read_json(place / "manifest.json")
        write_json_atomically(place / "manifest.json", manifest | {"schema_version": 2})
    with pytest.raises(UserError, match=message):
        plan_of(copied, *OTHER, "stage.prior.initial=run:base")


def test_what_is_not_finished_blocks_the_stage(outputs: Path):
    stage = stage_of(plan_of(outputs, *OTHER, "stage.upsampler.initial=run:base"), "upsampler")
    assert stage.action is Action.BLOCKED
    assert "stage upsampler of run base is not finished; run base again first" in stage.reason


def test_a_whole_chain_is_taken_over_without_training_bit_for_bit(outputs: Path):
    taken = [
        item
        for name in ("clip", "prior", "decoder")
        for item in (f"stage.{name}.initial=run:base", f"stage.{name}.max_samples=0")
    ]
    for name in ("clip", "prior", "decoder"):
        base, again = run_until(outputs, name), run_until(outputs, name, *OTHER, *taken)
        (file,) = base.path.glob("*.safetensors")
        weights, expected = load_file(again.path / file.name), load_file(file)
        assert base.path != again.path
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        assert again.manifest.samples_seen == 0


def test_training_goes_on_from_the_weights_and_not_from_the_optimiser(outputs: Path):
    base = load_file(run_until(outputs, "prior").path / "weights.safetensors")
    start = ["stage.prior.initial=run:base", "stage.clip.initial=run:base", "stage.clip.max_samples=0"]
    slow = ["stage.prior.optimizer.learning_rate=1e-9", "stage.prior.optimizer.weight_decay=0.0"]
    tuned = load_file(run_until(outputs, "prior", *OTHER, *start, *slow).path / "weights.safetensors")
    for name, each in base.items():
        torch.testing.assert_close(tuned[name], each, rtol=0, atol=1e-6)
    assert torch.equal(tuned["clip_mean"], base["clip_mean"])
    assert not all(torch.equal(tuned[name], each) for name, each in base.items())


def test_an_open_clip_model_replaces_clip_s_training(tmp_path: Path):
    theirs = write_local_dir(tmp_path / "theirs", CONFIGS["vit"])
    chosen = [f"stage.clip.checkpoint={tmp_path / 'theirs'}", "stage.clip.max_samples=0"]
    planned = stage_of(plan_of(tmp_path, *chosen, base=WITHOUT_CLIP), "clip")
    assert planned.notice == f"starts from {tmp_path / 'theirs'}, all {len(theirs.state_dict())} weights fit"
    clip = run_until(tmp_path, "clip", *chosen, base=WITHOUT_CLIP)

    weights = load_file(clip.path / "clip.safetensors")
    for name, each in theirs.state_dict().items():
        assert torch.equal(weights[name], each.reshape(weights[name].shape)), name
    assert clip.manifest.numbers == {"embed_dim": 32, "context_length": 12, "image_size": 16, "checkpoint": "theirs"}
    assert json.loads((clip.path / "clip.json").read_text())["network"]["kind"] == "vit"
    (tmp_path / "theirs").rename(tmp_path / "moved")
    moved = [f"stage.clip.checkpoint={tmp_path / 'moved'}", "stage.clip.max_samples=0"]
    assert stage_of(plan_of(tmp_path, *moved, base=WITHOUT_CLIP), "clip").action is Action.REUSE


def test_a_model_of_open_clip_by_name_needs_no_sizes_and_takes_none(tmp_path: Path):
    named = plan_of(tmp_path, "stage.clip.model=ViT-S-32", base=WITHOUT_CLIP)
    frozen = stage_of(named, "clip").frozen
    assert frozen is not None
    assert (frozen.settings["network"]["embed_dim"], frozen.settings["network"]["vision_width"]) == (384, 384)
    message = r"stage\.clip\.network\.embed_dim=16 is not that of the model that stage\.clip names, which is 384"
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, "stage.clip.model=ViT-S-32", "stage.clip.network.embed_dim=16", base=WITHOUT_CLIP)


def test_a_checkpoint_of_other_sizes_or_with_code_in_it_is_refused_at_the_plan(tmp_path: Path):
    weights = write_local_dir(tmp_path / "theirs", CONFIGS["vit"]).state_dict()
    torch.save(weights, tmp_path / "theirs.pt")
    message = r"^stage\.clip\.checkpoint=\S+theirs\.pt does not fit: \S+ has shape .* fit\); set stage\.clip\.model"
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, f"stage.clip.checkpoint={tmp_path / 'theirs.pt'}")
    torch.save({"state_dict": weights, "args": tmp_path}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt is no file of plain weights, .* \(UnpicklingError: it names"):
        plan_of(tmp_path, f"stage.clip.checkpoint={tmp_path / 'code.pt'}")
