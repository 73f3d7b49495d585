"""Captions that a user typed, checked before anything is made of them."""

import logging
from collections.abc import Sequence

from pipeline.errors import UserError
from stages.clip.network import ClipModel, ClipTokenizer

_log = logging.getLogger(__name__)

_SHOWN = 40
_MARKS_OF_TOKENS = 2


def require_captions(captions: Sequence[str], clip: ClipModel) -> list[str]:
    """The captions, all of which CLIP can read. One that is longer than CLIP's context is warned of: it is cut there.

    Raises:
        UserError: there is none, or one is no text, or holds what CLIP takes for its begin or end.
    """
    if not captions:
        raise UserError("no caption is given; give one or more")
    for caption in captions:
        _require(caption, clip.tokenize)
    return list(captions)


def _require(caption: object, tokenizer: ClipTokenizer) -> None:
    if not isinstance(caption, str):
        raise UserError(f"{caption!r} is no caption; give text")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the caption {_short(caption)} is no valid text ({error.reason}); give it in UTF-8") from error
    ids = tokenizer.plain_token_ids(caption)
    special = next((text for each, text in tokenizer.special_tokens.items() if each in ids), None)
    if special is not None:
        raise UserError(
            f"the caption {_short(caption)} holds {special!r}, which CLIP takes for its own mark; leave it out"
        )
    room = tokenizer.context_length - _MARKS_OF_TOKENS
    if len(ids) > room:
        _log.warning("the caption %s has %d tokens, and the first %d count", _short(caption), len(ids), room)


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN]}...")
