"""Where the bytes of a shard are found: a local one where it lies, a remote one in the cache. Imports no torch."""

import errno
import os
import re
import shutil
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse
from uuid import uuid4

from filelock import FileLock

from pipeline.data.s3 import fetch_object
from pipeline.data.shards import is_s3, is_url
from pipeline.data.summary import index_command
from pipeline.errors import UserError

READ_ATTEMPTS = 5
FIRST_WAIT_S = 1.0
"""Doubled before every further attempt at a remote shard."""

_LOCK = ".lock"
_PARTIAL = ".partial"
_CACHED = re.compile(r"^[0-9a-f]{16}-")


def local_shard(shard: str, cache_dir: Path, cache_bytes: int | None = None, expected_bytes: int | None = None) -> Path:
    """Give a file with the shard's bytes: a local shard as it is, a remote one from the cache, streamed there once.

    Several processes may ask for the same shard: one streams it, the others wait. A broken transfer leaves nothing.
    Where the cache has grown past `cache_bytes`, the shards that were asked for the longest ago are removed; who has
    one of them open goes on reading it. A transfer that does not give `expected_bytes` is a broken one.

    Raises:
        UserError: the remote shard cannot be read, at once where no further attempt can mend it.
        OSError: the disk is full.
    """
    if not is_url(shard):
        return Path(shard)
    cached = cache_dir / _cache_name(shard)
    if _is_kept(cached, expected_bytes):
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_name(cached.name + _LOCK)):
        if not _is_kept(cached, expected_bytes):
            _stream(shard, cached, expected_bytes)
            if cache_bytes is not None:
                _evict(cache_dir, cache_bytes, cached)
    return cached


def forget(shard: str, cache_dir: Path) -> None:
    """Drop the copy of a remote shard, so that the next reader fetches it anew."""
    if is_url(shard):
        (cache_dir / _cache_name(shard)).unlink(missing_ok=True)


def _is_kept(cached: Path, expected_bytes: int | None) -> bool:
    try:
        if expected_bytes not in (None, cached.stat().st_size):
            return False  # a copy of what was there before it was indexed again
        with suppress(PermissionError):  # somebody else's cache
            os.utime(cached)
    except FileNotFoundError:
        return False
    return True


def _evict(cache_dir: Path, cache_bytes: int, newest: Path) -> None:
    found = []
    for path in cache_dir.iterdir():
        with suppress(FileNotFoundError):
            # Only what is named like a cached shard: the directory may hold the user's own files too.
            if _CACHED.match(path.name) and path.suffix not in (_LOCK, _PARTIAL) and path.is_file():
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= cache_bytes:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


def _stream(url: str, target: Path, expected_bytes: int | None) -> None:
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    retrying = Retrying(
        stop=stop_after_attempt(READ_ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_S),
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and not is_disk_full(error)),
        reraise=True,
    )
    try:
        retrying(_stream_once, url, target, expected_bytes)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"data.shards: {url} cannot be read after {READ_ATTEMPTS} attempts ({error}); check the URL and the network"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no space is left, or no more is allowed."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _stream_once(url: str, target: Path, expected_bytes: int | None) -> None:
    partial = target.with_name(f"{target.name}.{uuid4().hex}{_PARTIAL}")
    try:
        if is_s3(url):
            fetch_object(url, partial)
        else:
            _copy_opened(url, partial)
        found = partial.stat().st_size
        if expected_bytes not in (None, found):
            if is_s3(url):  # which says how long an object is, so that a transfer that breaks off is seen before
                raise UserError(
                    f"data.shards: {url} has {found} bytes, and {expected_bytes} when it was indexed; put it back, or "
                    f"run `{index_command(url)} --again`"
                )
            raise OSError(f"{found} bytes, and {expected_bytes} when it was indexed by `{index_command(url)} --again`")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _copy_opened(url: str, target: Path) -> None:
    from webdataset.gopen import gopen  # imports torch: only who reads such a shard pays for it

    with gopen(url, "rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, length=1 << 20)


def _cache_name(url: str) -> str:
    base = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(urlparse(url).path).name)[-80:]
    return f"{blake2b(url.encode(), digest_size=8).hexdigest()}-{base or 'shard'}"
