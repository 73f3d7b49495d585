import json

import numpy as np
import pytest

from pipeline.data.captions import MAIN_CAPTION, parse_sources
from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.errors import UserError

TEXTS = {
    "txt": b"alt text",
    "blip.txt": b"a red square",
    "json": json.dumps({"synthetic": " long ", "all": ["x", "y", " ", "z"]}).encode(),
}


@pytest.mark.parametrize(
    ("source", "caption"),
    [
        ("txt", "alt text"),
        (".txt", "alt text"),
        ("TXT", "alt text"),
        (".blip.txt", "a red square"),
        ("json:synthetic", "long"),
    ],
)
def test_a_caption_is_read_from_an_extension_or_a_field(source: str, caption: str):
    sources = parse_sources({source: 1})
    for draw in (0.0, 0.5, 0.999):
        assert sources.choose(TEXTS, draw) == caption


@pytest.mark.parametrize(
    ("source", "texts", "fault"),
    [
        ("txt", {}, DecodeFault.MISSING_CAPTION),
        ("json:caption", TEXTS, DecodeFault.MISSING_CAPTION),
        ("json:caption", {"json": b"no json"}, DecodeFault.MISSING_CAPTION),
        ("json:caption", {"json": b"[1]"}, DecodeFault.MISSING_CAPTION),
        ("json:caption", {"json": b'{"caption": null}'}, DecodeFault.MISSING_CAPTION),
        ("json:caption", {"json": b'{"caption": 3}'}, DecodeFault.EMPTY_CAPTION),
        ("json:caption", {"json": b'{"caption": []}'}, DecodeFault.EMPTY_CAPTION),
        ("txt", {"txt": b" \n"}, DecodeFault.EMPTY_CAPTION),
        ("txt", {"txt": b"\xff\xfe"}, DecodeFault.CAPTION_NOT_UTF8),
        ("txt", {"txt": bytes(14)}, DecodeFault.CAPTION_NOT_UTF8),
    ],
)
def test_a_sample_without_the_caption_has_a_fault(source: str, texts: dict[str, bytes], fault: DecodeFault):
    with pytest.raises(DecodeError) as caught:
        parse_sources({source: 1}).choose(texts, 0.3)
    assert caught.value.fault is fault


def test_several_sources_are_drawn_by_their_weights():
    sources = parse_sources({"txt": 1, "blip.txt": 3})
    drawn = [sources.choose(TEXTS, draw) for draw in np.linspace(0, 1, 4000, endpoint=False)]
    assert drawn.count("a red square") == 3000
    assert drawn.count("alt text") == 1000


def test_the_main_caption_is_that_of_the_largest_weight_and_the_first_of_a_list():
    assert parse_sources({"txt": 1, "blip.txt": 3}).choose(TEXTS, MAIN_CAPTION) == "a red square"
    assert parse_sources({"txt": 1, "blip.txt": 1}).choose(TEXTS, MAIN_CAPTION) == "alt text"
    assert parse_sources({"json:all": 1}).choose(TEXTS, MAIN_CAPTION) == "x"


def test_of_a_list_all_captions_are_drawn_alike():
    drawn = [parse_sources({"json:all": 2}).choose(TEXTS, draw) for draw in np.linspace(0, 1, 3000, endpoint=False)]
    assert {caption: drawn.count(caption) for caption in "xyz"} == {"x": 1000, "y": 1000, "z": 1000}


def test_a_source_that_a_sample_lacks_leaves_its_share_to_the_others():
    sources = parse_sources({"txt": 1, "json:synthetic": 1, "blip.txt": 2})
    drawn = [
        sources.choose({"txt": b"a", "blip.txt": b" ", "json": TEXTS["json"]}, d) for d in np.linspace(0, 0.999, 1000)
    ]
    assert abs(drawn.count("a") - 500) <= 1
    assert abs(drawn.count("long") - 500) <= 1


@pytest.mark.parametrize("name", ["", ".", "json", ".json", "json:"])
def test_a_name_of_nothing_is_refused(name: str):
    with pytest.raises(UserError, match=r"data\.captions: .* names no caption; write an extension such as txt"):
        parse_sources({name: 1})


def test_one_source_under_two_names_is_refused():
    with pytest.raises(UserError, match=r"data\.captions names txt twice"):
        parse_sources({"txt": 1, ".TXT": 2})
