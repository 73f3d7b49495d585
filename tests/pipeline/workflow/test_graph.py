import re
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.workflow.declaration import Arity, Catalog, Input, StageSettings
from pipeline.workflow.graph import build_graph
from tests.support.fakes import (
    STAGES,
    DecoderSettings,
    EncoderSettings,
    EnlargerSettings,
    JudgeSettings,
    LossSettings,
    SourceSettings,
)

CATALOG = Catalog(STAGES)
SOURCE = StageSettings("source", SourceSettings(pictures=1))
ENCODER = StageSettings("encoder", EncoderSettings(width=1))
DECODER = StageSettings("decoder", DecoderSettings(channels=(1,), loss=LossSettings(weight=0)))
ENLARGER = StageSettings("enlarger", EnlargerSettings(size=1))
JUDGE = StageSettings("judge", JudgeSettings(samples=1))


def test_edges_follow_from_declared_inputs_and_outputs():
    graph = build_graph({"s": SOURCE, "e": ENCODER, "d": DECODER, "j": JUDGE}, CATALOG)
    assert graph.node("s").inputs == {}
    assert graph.node("e").inputs == {"data": ("s",)}
    assert graph.node("d").inputs == {"data": ("s",), "clip": ("e",), "prior": ()}
    assert graph.node("j").inputs == {"clip": ("e",), "decoder": ("d",), "upsampler": ()}


def test_a_stage_class_may_stand_twice_and_feeds_an_input_for_any_number_in_the_config_s_order():
    stages = {"s": SOURCE, "big": ENLARGER, "a": ENLARGER, "e": ENCODER, "d": DECODER, "j": JUDGE}
    assert build_graph(stages, CATALOG).node("j").inputs["upsampler"] == ("big", "a")


def test_stages_come_after_their_inputs_however_the_config_orders_them():
    graph = build_graph({"j": JUDGE, "d": DECODER, "e": ENCODER, "u": ENLARGER, "s": SOURCE}, CATALOG)
    order = [node.name for node in graph]
    assert sorted(order) == ["d", "e", "j", "s", "u"]
    for node in graph:
        assert all(order.index(name) < order.index(node.name) for name in node.upstream)


def test_stages_that_do_not_wait_for_each_other_keep_the_config_s_order():
    graph = build_graph({"s": SOURCE, "u2": ENLARGER, "e": ENCODER, "u1": ENLARGER, "d": DECODER}, CATALOG)
    assert [node.name for node in graph] == ["s", "u2", "e", "u1", "d"]


def test_two_producers_of_one_output_are_refused_by_name():
    with pytest.raises(UserError, match=r"first and second both produce 'clip'.*remove one"):
        build_graph({"s": SOURCE, "first": ENCODER, "second": ENCODER}, CATALOG)


def test_a_missing_producer_is_named_with_what_there_is():
    with pytest.raises(UserError, match=r"stage d needs 'clip', which no stage .* produces; add one .*data, decoder"):
        build_graph({"s": SOURCE, "d": DECODER}, CATALOG)


def test_an_input_for_one_stage_refuses_two_producers_of_a_repeatable_output():
    picky = replace(STAGES["judge"], inputs=(Input("upsampler", Arity.OPTIONAL),))
    stages = {"s": SOURCE, "a": ENLARGER, "b": ENLARGER, "j": JUDGE}
    with pytest.raises(UserError, match="stage j takes one 'upsampler', and a, b produce it: remove one"):
        build_graph(stages, Catalog({**STAGES, "judge": picky}))


def test_a_cycle_is_printed():
    circular = {
        "encoder": replace(STAGES["encoder"], inputs=(Input("decoder"),)),
        "decoder": replace(STAGES["decoder"], inputs=(Input("clip"),)),
    }
    with pytest.raises(UserError) as caught:
        build_graph({"chicken": ENCODER, "egg": DECODER}, Catalog(circular))
    assert re.search(r"chicken -> egg -> chicken|egg -> chicken -> egg", str(caught.value))


def test_an_unknown_kind_lists_the_valid_ones_and_the_closest():
    with pytest.raises(UserError) as caught:
        build_graph({"d": StageSettings("decodr", DECODER.settings)}, CATALOG)
    message = str(caught.value)
    assert "stage.d.kind='decodr'" in message
    assert "did you mean 'decoder'?" in message
    assert "decoder, encoder, enlarger, judge, source" in message
