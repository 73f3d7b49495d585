"""experiment=paper: Table 3 of arXiv 2204.06125, composed, validated, and built on the meta device."""

import re
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from pipeline.compose import CONFIG_DIRECTORY, compose_members
from pipeline.config import Settings, validate
from pipeline.workflow.declaration import StageSettings, Workflow
from stages.catalog import CATALOG
from stages.clip.network import ClipModel, Towers
from stages.clip.settings import ClipSettings
from stages.decoder.network import build_decoder
from stages.decoder.settings import DecoderSettings
from stages.prior.network import build_prior
from stages.prior.settings import PriorSettings
from stages.upsampler.network import build_upsampler
from stages.upsampler.settings import UpsamplerSettings

PAPER_BILLIONS = {"prior": 1.0, "decoder": 3.5, "upsampler 256": 0.7, "upsampler 1024": 0.3}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Settings]:
    (member,) = compose_members("unclip plan", ["experiment=paper", f"data.shards={tmp_path_factory.mktemp('shards')}"])
    found = {}
    for name, values in member.config.stage.items():
        own = {key: value for key, value in values.items() if key not in ("kind", "trainer")}
        found[name] = validate(CATALOG.stages[values["kind"]].settings, own, f"stage.{name}")
    return found


@pytest.fixture(scope="module")
def billions(settings: Mapping[str, Settings]) -> Mapping[str, tuple[float, ...]]:
    """Parameters of each network of the table, in billions: one or more parts."""
    clip, prior, decoder = settings["clip"], settings["prior"], settings["decoder"]
    upsamplers = {
        f"upsampler {each.high_size}": each for each in settings.values() if isinstance(each, UpsamplerSettings)
    }
    assert isinstance(clip, ClipSettings)
    assert isinstance(prior, PriorSettings)
    assert isinstance(decoder, DecoderSettings)
    with torch.device("meta"):
        text_tower = ClipModel(clip.network, towers=Towers.TEXT)
        networks: dict[str, tuple[nn.Module, ...]] = {
            "prior": (build_prior(prior.network, clip.network.embed_dim, clip.network.context_length),),
            "decoder": (build_decoder(decoder, clip.network.embed_dim), text_tower),
            **{name: (build_upsampler(each.network, each.high_size),) for name, each in upsamplers.items()},
        }
    return {name: tuple(map(_billions, each)) for name, each in networks.items()}


def _billions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e9


def test_the_networks_are_of_the_paper_s_sizes(billions: Mapping[str, tuple[float, ...]]):
    assert billions.keys() == PAPER_BILLIONS.keys()
    for name, paper in PAPER_BILLIONS.items():
        assert sum(billions[name]) == pytest.approx(paper, rel=0.25), name


def test_the_header_states_the_sizes_that_the_networks_have(billions: Mapping[str, tuple[float, ...]]):
    header = (CONFIG_DIRECTORY / "experiment" / "paper.yaml").read_text()
    for name, parts in billions.items():
        (line,) = re.findall(rf"^#   {name} +(.*)$", header, re.MULTILINE)
        stated = [float(number) for number in re.findall(r"([\d.]+) B", line)]
        assert stated[: len(parts)] == [round(part, 2) for part in parts], name
        assert stated[len(parts)] == PAPER_BILLIONS[name]


def test_the_stages_fit_together_and_end_at_the_paper_s_resolution(settings: Mapping[str, Settings]):
    kinds = {"upsampler_1": "upsampler", "upsampler_2": "upsampler"}
    stages = {
        name: StageSettings(kinds.get(name, name), each)
        for name, each in settings.items()
        if name != "prepare"  # the shards are the user's
    }
    CATALOG.check(Workflow(stages))
    last = settings["upsampler_2"]
    assert isinstance(last, UpsamplerSettings)
    assert (last.low_size, last.high_size, last.crop_size) == (256, 1024, 256)


def test_batches_and_steps_are_the_paper_s(settings: Mapping[str, Settings]):
    table = {
        "prior": (4096, 600_000),
        "decoder": (2048, 800_000),
        "upsampler_1": (1024, 10**6),
        "upsampler_2": (512, 10**6),
    }
    for name, (batch, steps) in table.items():
        stage = settings[name]
        assert isinstance(stage, PriorSettings | DecoderSettings | UpsamplerSettings)
        assert (stage.global_batch_size, stage.max_steps) == (batch, steps), name
