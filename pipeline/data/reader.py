"""Reads samples at their byte offsets; nothing is read to be skipped. Imports no torch."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pipeline.data.captions import JSON, MAIN_CAPTION, TEXT, CaptionSources, parse_attributes
from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.data.index import ABSENT, Members, ShardIndex
from pipeline.data.remote import forget, local_shard
from pipeline.data.shards import is_url
from pipeline.data.summary import index_command
from pipeline.data.tar import BLOCK, member_digest, parse_header
from pipeline.errors import UserError

_MAX_OPEN_SHARDS = 128
_OPEN_ATTEMPTS = 3
_NAME_BYTES = 80


class SampleReader:
    """Reads the rows of an index whose local shards lie under `root`; remote ones are streamed to `cache_dir`.

    Whatever is read is what was indexed: each member is compared, with its header, with the digest in the index.
    The cache keeps to `cache_bytes` where that is given.
    Files stay open, the last 128 of them. `pread` carries its own position, so that forked loader workers can share
    them; a pickled reader opens its own.
    """

    def __init__(
        self,
        index: ShardIndex,
        root: Path,
        cache_dir: Path,
        cache_bytes: int | None = None,
        captions: CaptionSources = TEXT,
        remedy: str | None = None,
    ) -> None:
        self.index = index
        self.root = root
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes
        self.captions = captions
        self._extensions = captions.extensions
        self.remedy = remedy or f"{index_command(root)} --again"
        self._open: OrderedDict[int, int] = OrderedDict()
        self._fetched_anew: set[int] = set()

    def image(self, sample: int) -> bytes:
        """The encoded picture.

        Raises:
            DecodeError: it is not the picture that was indexed, as a disk can damage it.
            UserError: as `text`.
        """
        content = self._read(sample, self.index.image)
        if content is None:
            raise DecodeError(DecodeFault.CHANGED, self.index.key(sample))
        return content

    def text(self, sample: int, extension: str) -> bytes | None:
        """A text of the sample; None where it has none of that extension.

        Raises:
            UserError: the shard holds something else there than what was indexed.
        """
        members = self.index.texts.get(extension)
        if members is None or members.offset.item(sample) == ABSENT:
            return None
        content = self._read(sample, members)
        if content is None:
            raise self._changed(sample)
        return content

    def caption(self, sample: int, draw: float = MAIN_CAPTION) -> str:
        """The caption that a draw in [0, 1) chooses, without surrounding white space; raises DecodeError for none."""
        found = {extension: self.text(sample, extension) for extension in self._extensions}
        return self.captions.choose(found, draw)

    def attributes(self, sample: int) -> dict[str, Any] | None:
        """The JSON's fields; None where there is no JSON or it holds no object."""
        content = self.text(sample, JSON)
        return None if content is None else parse_attributes(content)

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

    def _read(self, sample: int, members: Members) -> bytes | None:
        """A member's content; None where it is another one under the header that was indexed.

        Raises:
            DecodeError: the shard ends before.
            UserError: another header stands there than the one that was indexed.
        """
        # `item` gives Python's own numbers, and at a tenth of the cost of an index into a mapped array.
        offset, size = members.offset.item(sample), members.size.item(sample)
        digest, shard = members.digest.item(sample), self.index.shard.item(sample)
        header, content = self._member(shard, offset, size)
        is_indexed = member_digest(header, content) == digest
        if not is_indexed and self._fetch_anew(shard):
            header, content = self._member(shard, offset, size)
            is_indexed = member_digest(header, content) == digest
        if len(content) != size:
            raise DecodeError(DecodeFault.SHORT_READ, f"{len(content)} of {size} bytes of {self.index.key(sample)}")
        if is_indexed:
            return content
        if not self._is_header_of(sample, header, size):
            raise self._changed(sample)
        return None

    def _member(self, shard: int, offset: int, size: int) -> tuple[bytes, bytes]:
        """The header and the content of a member; shorter where the shard ends."""
        found = os.pread(self._descriptor(shard), BLOCK + size, offset - BLOCK)
        return found[:BLOCK], found[BLOCK:]

    def _fetch_anew(self, shard: int) -> bool:
        """Whether a remote shard was dropped from the cache, once: what was kept of it may be older than the index."""
        name = self.index.shards[shard].name
        if not is_url(name) or shard in self._fetched_anew:
            return False
        self._fetched_anew.add(shard)
        forget(name, self.cache_dir)
        if shard in self._open:
            os.close(self._open.pop(shard))
        return True

    def _is_header_of(self, sample: int, block: bytes, size: int) -> bool:
        header = parse_header(block)
        if header is None or header.size != size:
            return False
        key = self.index.key(sample)
        # Long names and those of other alphabets stand in a header of their own.
        return len(key) > _NAME_BYTES or not key.isascii() or header.name.startswith(f"{key}.".encode())

    def _changed(self, sample: int) -> UserError:
        shard = self.index.shards[self.index.shard[sample]]
        return UserError(
            f"data.shards: {shard.name} holds something else at sample {self.index.key(sample)} than when it was "
            f"indexed; put the shard back, or run `{self.remedy}`"
        )

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
