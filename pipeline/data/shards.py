"""Names of shards: what `data.shards` may say, and where the bytes of a shard are found. Imports no torch."""

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse
from urllib.request import url2pathname
from uuid import uuid4

import braceexpand
from filelock import FileLock

from pipeline.errors import UserError

REMOTE_SCHEMES = frozenset({"http", "https", "hf", "gs", "htgs", "ais", "sftp", "ftps", "scp"})
"""What webdataset's `gopen` opens with an argument list, that is without a shell."""

SHELL_SCHEMES = frozenset({"pipe"})
"""What webdataset's `gopen` hands to a shell."""

READ_ATTEMPTS = 5
FIRST_WAIT_S = 1.0
"""Doubled before every further attempt at a remote shard."""

_LOCK = ".lock"
_PARTIAL = ".partial"
_CACHED = re.compile(r"^[0-9a-f]{16}-")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


def is_url(shard: str) -> bool:
    """Tell a remote shard from a path."""
    return _scheme(shard) is not None


def expand_shards(shards: str | Sequence[str], *, allow_shell_urls: bool) -> list[str]:
    """List the shards that `data.shards` stands for: local paths (absolute) and URLs, in a fixed order.

    Each part is a directory (all its `*.tar`), a path, a URL, or a brace pattern of either (`part-{0000..0099}.tar`).

    Raises:
        UserError: a path does not exist, a directory holds no tar, or a URL is of a kind that is not opened.
    """
    parts = [shards] if isinstance(shards, str) else list(shards)
    expanded = [shard for part in parts for shard in _expand_part(part, allow_shell_urls)]
    if not expanded:
        raise UserError("data.shards names no shard; give a directory, a path, a URL or a brace pattern")
    repeated = [shard for shard, count in Counter(expanded).items() if count > 1]
    if repeated:
        raise UserError(f"data.shards names {repeated[0]} more than once; name each shard once")
    return expanded


def index_directory(shards: Sequence[str], cache_dir: Path) -> Path:
    """Where the index of these shards belongs: beside them, or in the cache where they share no local directory."""
    parents = {None if is_url(shard) else Path(shard).parent for shard in shards}
    if len(parents) == 1 and (parent := parents.pop()) is not None:
        return parent
    digest = blake2b("\n".join(shards).encode(), digest_size=8).hexdigest()
    return cache_dir / f"index-{digest}"


def shard_names(shards: Sequence[str], directory: Path) -> list[str]:
    """The names that shards have in the index at `directory`: relative to it where they lie in it."""
    return [
        str(Path(shard).relative_to(directory))
        if not is_url(shard) and Path(shard).is_relative_to(directory)
        else shard
        for shard in shards
    ]


def local_shard(shard: str, cache_dir: Path, cache_bytes: int | None = None, expected_bytes: int | None = None) -> Path:
    """Give a file with the shard's bytes: a local shard as it is, a remote one from the cache, streamed there once.

    Several processes may ask for the same shard: one streams it, the others wait. A broken transfer leaves nothing.
    Where the cache has grown past `cache_bytes`, the shards that were asked for the longest ago are removed; who has
    one of them open goes on reading it. A transfer that does not give `expected_bytes` is a broken one.

    Raises:
        UserError: the remote shard cannot be read.
    """
    if not is_url(shard):
        return Path(shard)
    cached = cache_dir / _cache_name(shard)
    if _is_kept(cached):
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_name(cached.name + _LOCK)):
        if not _is_kept(cached):
            _stream(shard, cached, expected_bytes)
            if cache_bytes is not None:
                _evict(cache_dir, cache_bytes, cached)
    return cached


def _is_kept(cached: Path) -> bool:
    try:
        os.utime(cached)
    except FileNotFoundError:
        return False
    except PermissionError:  # somebody else's cache
        return cached.exists()
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
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and not _is_disk_full(error)),
        reraise=True,
    )
    try:
        retrying(_stream_once, url, target, expected_bytes)
    except (OSError, ValueError) as error:
        if _is_disk_full(error):
            raise
        raise UserError(
            f"data.shards: {url} cannot be read after {READ_ATTEMPTS} attempts ({error}); check the URL and the network"
        ) from error


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _stream_once(url: str, target: Path, expected_bytes: int | None) -> None:
    from webdataset.gopen import gopen  # imports torch: only who reads a remote shard pays for it

    partial = target.with_name(f"{target.name}.{uuid4().hex}{_PARTIAL}")
    try:
        with gopen(url, "rb") as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy, length=1 << 20)
        found = partial.stat().st_size
        if expected_bytes not in (None, found):
            raise OSError(f"{found} bytes, and {expected_bytes} when it was indexed")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _cache_name(url: str) -> str:
    base = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(urlparse(url).path).name)[-80:]
    return f"{blake2b(url.encode(), digest_size=8).hexdigest()}-{base or 'shard'}"


def _scheme(shard: str) -> str | None:
    match = _SCHEME.match(shard)
    return match.group(1).lower() if match else None


def _expand_part(part: str, allow_shell_urls: bool) -> list[str]:
    scheme = _scheme(part)
    if scheme in SHELL_SCHEMES:
        # What follows `pipe:` is a shell command, whose braces belong to the shell.
        _check_scheme(part, allow_shell_urls)
        return [part]
    if scheme == "file":
        part = url2pathname(urlparse(part).path)
    elif scheme is None and Path(part).expanduser().is_dir():
        return _tars_in(Path(part).expanduser())
    try:
        names = list(braceexpand.braceexpand(part))
    except ValueError:
        raise UserError(f"data.shards: {part} has a brace without its pair; write 'part-{{0000..0099}}.tar'") from None
    for name in names:
        _check_scheme(name, allow_shell_urls)
    missing = [name for name in names if not is_url(name) and not Path(name).expanduser().is_file()]
    if missing:
        raise UserError(
            f"data.shards: {missing[0]} does not exist ({len(missing)} of {len(names)} missing); "
            "give a directory of tars, a path, a URL or a brace pattern"
        )
    return [name if is_url(name) else str(Path(name).expanduser().absolute()) for name in names]


def _tars_in(directory: Path) -> list[str]:
    tars = sorted(str(path.absolute()) for path in directory.glob("*.tar") if path.is_file())
    if not tars:
        raise UserError(f"data.shards: {directory} holds no *.tar; give the directory that holds the shards")
    return tars


def _check_scheme(shard: str, allow_shell_urls: bool) -> None:
    scheme = _scheme(shard)
    if scheme is None or scheme in REMOTE_SCHEMES:
        return
    if scheme in SHELL_SCHEMES:
        if not allow_shell_urls:
            raise UserError(
                f"data.shards: {shard} would run a shell command; set data.allow_shell_urls=true if you trust it"
            )
        return
    known = ", ".join(sorted(REMOTE_SCHEMES))
    raise UserError(f"data.shards: {shard} has the scheme {scheme}, which is not opened; use a path or one of {known}")
