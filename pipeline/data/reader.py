"""Reads samples at their byte offsets; nothing is read to be skipped. Imports no torch."""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.data.index import ShardIndex
from pipeline.data.remote import local_shard
from pipeline.data.shards import is_url
from pipeline.errors import UserError

_MAX_OPEN_SHARDS = 128
_OPEN_ATTEMPTS = 3


@dataclass(frozen=True)
class RawSample:
    """A sample as its shard holds it: the encoded picture, the caption, and the JSON's fields where there is a JSON."""

    key: str
    image: bytes
    caption: str
    attributes: dict[str, Any] | None


class SampleReader:
    """Reads the rows of an index whose local shards lie under `root`; remote ones are streamed to `cache_dir`.

    The cache keeps to `cache_bytes` where that is given.
    Files stay open, the last 128 of them. `pread` carries its own position, so that forked loader workers can share
    them; a pickled reader opens its own.
    """

    def __init__(self, index: ShardIndex, root: Path, cache_dir: Path, cache_bytes: int | None = None) -> None:
        self.index = index
        self.root = root
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> RawSample:
        """Read all of a sample. Raises DecodeError where the bytes are not there or the caption is none."""
        return RawSample(self.index.key(sample), self.image(sample), self.caption(sample), self.attributes(sample))

    def image(self, sample: int) -> bytes:
        """The encoded picture."""
        index = self.index
        return self._read(sample, int(index.image_offset[sample]), int(index.image_size[sample]))

    def caption(self, sample: int) -> str:
        """The caption without surrounding white space; raises DecodeError where nothing is left or it is not UTF-8."""
        index = self.index
        content = self._read(sample, int(index.caption_offset[sample]), int(index.caption_size[sample]))
        try:
            caption = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DecodeError(DecodeFault.CAPTION_NOT_UTF8, str(error)) from error
        if not caption:
            raise DecodeError(DecodeFault.EMPTY_CAPTION)
        return caption

    def attributes(self, sample: int) -> dict[str, Any] | None:
        """The JSON's fields; None where there is no JSON or it holds no object."""
        index = self.index
        if index.json_offset[sample] < 0:
            return None
        try:
            content = json.loads(self._read(sample, int(index.json_offset[sample]), int(index.json_size[sample])))
        except ValueError:
            return None
        return content if isinstance(content, dict) else None

    def fetch(self, shard: int) -> Path:
        """A file with the shard's bytes, by its number in the index; streams a remote one that is not in the cache."""
        entry = self.index.shards[shard]
        if is_url(entry.name):
            return local_shard(entry.name, self.cache_dir, self.cache_bytes, entry.bytes)
        return self.root / entry.name

    def close(self) -> None:
        """Close the shards; the next read opens its own again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _read(self, sample: int, offset: int, size: int) -> bytes:
        content = os.pread(self._descriptor(int(self.index.shard[sample])), size, offset)
        if len(content) != size:
            raise DecodeError(DecodeFault.SHORT_READ, f"{len(content)} of {size} bytes of {self.index.key(sample)}")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        descriptor = self._open_shard(shard)
        self._open[shard] = descriptor
        if len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _open_shard(self, shard: int) -> int:
        for attempt in range(_OPEN_ATTEMPTS):
            path = self.fetch(shard)
            try:
                return os.open(path, os.O_RDONLY)
            except OSError as error:
                # A cached shard can be removed between being found and being opened.
                if path.parent != self.cache_dir or attempt + 1 == _OPEN_ATTEMPTS:
                    raise UserError(
                        f"data.shards: {path} cannot be opened ({error.strerror}); put the shard back"
                    ) from error
        raise AssertionError("the last attempt returns or raises")
