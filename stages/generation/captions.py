"""Captions that a user typed, checked before anything is made of them. Imports no torch."""

import html
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from stages.clip.network import ClipModel, ClipTokenizer

_log = logging.getLogger(__name__)

_SHOWN = 40
_MARKS_OF_TOKENS = 2
_MARKS = ("<start_of_text>", "<end_of_text>")
"""What open_clip's tokenizer takes for a caption's begin and end, in letters of any case."""


def require_text(captions: Sequence[str]) -> None:
    """What can be told without a tokenizer.

    Raises:
        UserError: there is no caption, or one is no text, or holds what CLIP takes for its begin or end.
    """
    if not captions:
        raise UserError("no caption is given; give one or more")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{caption!r} is no caption; give text")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the caption {_short(caption)} is no valid text ({error.reason}); give it in UTF-8"
            ) from error
        # open_clip resolves entities twice, too
        cleaned = html.unescape(html.unescape(caption)).lower()
        _refuse_mark(caption, next((mark for mark in _MARKS if mark in cleaned), None))


def require_captions(captions: Sequence[str], clip: "ClipModel") -> list[str]:
    """The captions, all of which CLIP can read. One that is longer than CLIP's context is warned of: it is cut there.

    Raises:
        UserError: there is none, or one is no text, or holds what CLIP takes for its begin or end.
    """
    require_text(captions)
    for caption in captions:
        _require(caption, clip.tokenize)
    return list(captions)


def _require(caption: str, tokenizer: "ClipTokenizer") -> None:
    ids = tokenizer.plain_token_ids(caption)
    _refuse_mark(caption, next((text for each, text in tokenizer.special_tokens.items() if each in ids), None))
    room = tokenizer.context_length - _MARKS_OF_TOKENS
    if len(ids) > room:
        _log.warning("the caption %s has %d tokens, and the first %d count", _short(caption), len(ids), room)


def _refuse_mark(caption: str, mark: str | None) -> None:
    if mark is not None:
        raise UserError(
            f"the caption {_short(caption)} holds {mark!r}, which CLIP takes for its own mark; leave it out"
        )


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN]}...")
