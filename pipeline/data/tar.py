"""Reads the headers of a tar strictly: what is damaged is said, and costs no more than itself. Imports no torch.

Python's `tarfile` takes whatever is no header for the end of the archive, and so loses in silence what comes after it.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

BLOCK = 512
"""Headers are one block long, and contents are filled up to whole blocks."""


class Damage(StrEnum):
    """What is wrong with an archive. Reading goes on at the next header that is whole."""

    DAMAGED_HEADER = "damaged_header"
    TRUNCATED = "truncated"
    ZEROED_BLOCK = "zeroed_block"
    BEHIND_END_MARK = "behind_end_mark"
    NO_END_MARK = "no_end_mark"
    MISSING_BYTES = "missing_bytes"


class NotAFile(StrEnum):
    """Members that are no regular files. Each costs itself alone."""

    LINK = "link"
    SPARSE_FILE = "sparse_file"
    SPECIAL_FILE = "special_file"


class Member(NamedTuple):
    """A regular file: its name and where its content lies. `digest` is that of `member_digest`."""

    name: str
    offset: int
    size: int
    digest: int


class Header(NamedTuple):
    """One header block: the name without what an extended header says of it, the size of the content, the kind."""

    name: bytes
    size: int
    kind: bytes


_FIELDS = struct.Struct("100s24x12s12x8sc188x155s12x")
_MAGIC = b"ustar"
_MAGIC_AT = 257
_ZERO_BLOCK = bytes(BLOCK)
_NOT_ZERO = re.compile(rb"[^\0]")
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_TELLING = re.compile(rb"path=|size=|GNU\.sparse\.")
_OCTAL = re.compile(rb" *[0-7]{4,}[ \0]")
_NUMBERS = ((100, 108), (124, 136), (148, 156))  # the rights, the size, the checksum
_ADLER_MODULUS = 65521

_ARCHIVE = ".tar"
"""Such a member may hold headers."""

_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY = b"5"
_LINKS = (b"1", b"2")
_WITHOUT_CONTENT = (*_LINKS, _DIRECTORY, b"3", b"4", b"6")
_SPARSE = b"S"
_LONG_NAME = b"L"
_LONG_LINK = b"K"
_PAX = (b"x", b"X")
_PAX_GLOBAL = b"g"
_EXTENDED = (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_GLOBAL)
_UNREADABLE = b""
"""In the place of a record: the name of the next member is not known."""

_SPARSE_IS_EXTENDED_AT = 482
_SPARSE_GOES_ON_AT = 504


def parse_header(block: bytes) -> Header | None:
    """The header in a block of 512 bytes; None where its checksum does not fit or a number cannot be read."""
    name, size, checksum, kind, prefix = _FIELDS.unpack(block)
    try:
        # Adler-32's low half is 1 + the sum of the bytes: the sum of a header in one call.
        expected = _number(checksum) - 8 * ord(" ") + sum(checksum)
        if (zlib.adler32(block) & 0xFFFF) != (1 + expected) % _ADLER_MODULUS and not _has_signed_sum(block, checksum):
            return None
        content = _number(size)
    except ValueError:
        return None
    if content < 0:
        return None
    path = name.partition(b"\0")[0]
    if prefix[:1] != b"\0" and kind not in (_SPARSE, _LONG_NAME, _LONG_LINK):
        path = prefix.partition(b"\0")[0] + b"/" + path
    if kind == b"\0" and path.endswith(b"/"):
        kind = _DIRECTORY  # as tars before POSIX write directories
    return Header(path, content, kind)


def member_digest(header: bytes, content: bytes | memoryview) -> int:
    """64 bits of a member: of its content, and of the name, size and kind in the header block before it.

    The times, owners and rights in the header do not count. XXH3 notices accidents; it keeps off no forger.
    """
    named = zlib.crc32(header[345:500], zlib.crc32(header[124:136] + header[156:157], zlib.crc32(header[:100])))
    return xxhash.xxh3_64_intdigest(content, named)


def read_members(archive: memoryview) -> Iterator[Member | Damage | NotAFile]:
    """Yield the regular files of an archive, and what else was found, in order. Directories are passed over.

    An archive is whole that ends with its mark (one block of zeros or more) and nothing but zeros behind it.
    """
    end = len(archive)
    offset = 0
    pending: dict[bytes, bytes] = {}
    held: Member | None = None  # given out when what is behind it shows that it ends where it should
    headers = _headers_on_grid(archive)
    grid = iter(headers)
    next_on_grid = next(grid, end)
    while True:
        block = bytes(archive[offset : offset + BLOCK])
        header = parse_header(block) if len(block) == BLOCK and block != _ZERO_BLOCK else None
        if header is None:
            # Where not even a broken header stands, the content before it is not what its header says.
            is_broken = block.strip(b"\0") and len(block) == BLOCK and not _looks_like_header(block)
            if held is not None and not is_broken:
                yield Damage.MISSING_BYTES if _holds_header(archive, held) else held
            held = None
            pending = {}
            damage, offset = _behind_members(archive, offset, block)
            if damage is not None:
                yield damage
            if offset >= end:
                return
            continue
        if held is not None:
            yield held
            held = None
        start = offset + BLOCK
        if header.kind in _EXTENDED:
            offset = start + _in_blocks(header.size)
            if start + header.size > end:
                yield Damage.TRUNCATED
                offset = _next_header(archive, start)
                if offset >= end:
                    return
            elif header.kind != _PAX_GLOBAL:
                records = _records(header.kind, bytes(archive[start : start + header.size]))
                if records is None:
                    yield Damage.DAMAGED_HEADER
                pending |= {_UNREADABLE: b""} if records is None else records
            continue
        size = int(pending[b"size"]) if pending.get(b"size", b"").isdigit() else header.size
        if header.kind == _SPARSE:
            start = _behind_sparse_map(archive, start, block)
        if header.kind in _WITHOUT_CONTENT and _is_followed_by_member(archive, start):
            size = 0
        is_known = _UNREADABLE not in pending
        found = _kind_of(header, pending)
        name = pending.get(b"path", header.name).decode("utf-8", "surrogateescape")
        pending = {}
        while next_on_grid < start:
            next_on_grid = next(grid, end)
        if next_on_grid < min(start + size, end) and not name.endswith(_ARCHIVE) and _is_header(archive, next_on_grid):
            yield Damage.MISSING_BYTES
            offset = next_on_grid
            continue
        offset = start + _in_blocks(size)
        if start + size > end:
            yield Damage.TRUNCATED
            offset = _next_header(archive, start)
            if offset >= end:
                return
            continue
        if found is None and is_known:
            held = Member(name, start, size, member_digest(block, archive[start : start + size]))
        elif found not in (None, _DIRECTORY):
            yield NotAFile(found)


def _looks_like_header(block: bytes) -> bool:
    """Whether a block was a header before it was damaged."""
    return block.startswith(_MAGIC, _MAGIC_AT) or any(_OCTAL.match(block, *field) for field in _NUMBERS)


def _headers_on_grid(archive: memoryview) -> list[int]:
    """Where headers stand on the grid of blocks, in the order of the archive; all do in one that is whole.

    One that stands in a member's content shows that bytes of that member are missing.
    """
    blocks: NDArray[np.uint8] = np.frombuffer(archive[: len(archive) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
    found = np.flatnonzero(blocks[:, _MAGIC_AT] == _MAGIC[0])
    for place, letter in enumerate(_MAGIC[1:], 1):
        found = found[blocks[found, _MAGIC_AT + place] == letter]
    return (found * BLOCK).tolist()


def _is_header(archive: memoryview, offset: int) -> bool:
    block = bytes(archive[offset : offset + BLOCK])
    return len(block) == BLOCK and block != _ZERO_BLOCK and parse_header(block) is not None


def _holds_header(archive: memoryview, member: Member) -> bool:
    """Whether a member's content has a header in it, on no grid: so it is where an archive stands behind a cut one."""
    end = member.offset + member.size
    return not member.name.endswith(_ARCHIVE) and _next_header(archive[:end], member.offset) < end


def _kind_of(header: Header, pending: dict[bytes, bytes]) -> NotAFile | bytes | None:
    """None for a regular file."""
    if header.kind == _SPARSE or (pending and any(key.startswith(b"GNU.sparse.") for key in pending)):
        return NotAFile.SPARSE_FILE
    if header.kind in _REGULAR:
        return None
    if header.kind == _DIRECTORY:
        return _DIRECTORY
    return NotAFile.LINK if header.kind in _LINKS else NotAFile.SPECIAL_FILE


def _behind_members(archive: memoryview, offset: int, block: bytes) -> tuple[Damage | None, int]:
    """What is found where a header should be and none is, and where to go on: the archive's length for nowhere."""
    end = len(archive)
    if offset >= end:
        return Damage.NO_END_MARK, end
    if block.strip(b"\0"):
        if len(block) < BLOCK:
            return Damage.TRUNCATED, end
        return Damage.DAMAGED_HEADER, _next_header(archive, offset + 1)
    if len(block) < BLOCK:
        return Damage.MISSING_BYTES, end
    behind = _NOT_ZERO.search(archive, offset)
    if behind is None:
        return Damage.MISSING_BYTES if end % BLOCK else None, end
    resumed = _next_header(archive, offset + 1)
    block_behind = behind.start() // BLOCK * BLOCK
    ended = block_behind - offset >= 2 * BLOCK and resumed == block_behind
    return Damage.BEHIND_END_MARK if ended or resumed >= end else Damage.ZEROED_BLOCK, resumed


def _next_header(archive: memoryview, start: int) -> int:
    """The first whole header at `start` or behind it; the end where there is none.

    It stands on no grid, as bytes may be missing, but for archives from before POSIX, whose headers have no magic.
    """
    with_magic = (found.start() - _MAGIC_AT for found in re.compile(_MAGIC).finditer(archive, start + _MAGIC_AT))
    on_grid = range(_in_blocks(start), len(archive), BLOCK)
    return next((offset for offset in chain(with_magic, on_grid) if _is_header(archive, offset)), len(archive))


def _is_followed_by_member(archive: memoryview, offset: int) -> bool:
    """Links and directories have no content, whatever size they state; some writers give them one all the same."""
    block = bytes(archive[offset : offset + BLOCK])
    return len(block) < BLOCK or block == _ZERO_BLOCK or parse_header(block) is not None


def _behind_sparse_map(archive: memoryview, start: int, block: bytes) -> int:
    goes_on = block[_SPARSE_IS_EXTENDED_AT] != 0
    while goes_on and start + BLOCK <= len(archive):
        goes_on = archive[start + _SPARSE_GOES_ON_AT] != 0
        start += BLOCK
    return start


def _records(kind: bytes, content: bytes) -> dict[bytes, bytes] | None:
    """What an extended header says of the next member; None where it cannot be read."""
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {b"path": content.partition(b"\0")[0]}
    if _TELLING.search(content) is None:
        return {}  # times and owners, which webdataset's own writer states for each member
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        record = _PAX_RECORD.match(content, position)
        if record is None or int(record[1]) <= record.end() - position:
            return None
        records[record[2]] = content[record.end() : position + int(record[1]) - 1]
        position += int(record[1])
    return records


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or in base 256 behind a byte that is none. Raises ValueError."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], signed=False) if field[0] == 0x80 else -1
    digits = field.strip(b" \0")
    return int(digits, 8) if digits else 0


def _has_signed_sum(block: bytes, checksum: bytes) -> bool:
    """Old writers added the bytes up as signed numbers."""
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])
    return signed + 8 * ord(" ") == _number(checksum)
