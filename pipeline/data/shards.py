"""Names of shards: what `data.shards` may say. Imports no torch."""

import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import braceexpand

from pipeline.errors import UserError

REMOTE_SCHEMES = frozenset({"http", "https", "hf", "gs", "htgs", "ais", "sftp", "ftps", "scp"})
"""What webdataset's `gopen` opens with an argument list, that is without a shell."""

OBJECT_SCHEMES = frozenset({"s3"})
"""What fsspec opens."""

SHELL_SCHEMES = frozenset({"pipe"})
"""What webdataset's `gopen` hands to a shell."""

SHARDS_PER_BLOCK = 32
"""How many shards are mixed with each other: large enough to mix well, small enough to keep on a local disk."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_OBJECT = re.compile(r"^s3://[^/]+/", re.IGNORECASE)
_LOGIN = re.compile(r"^s3:/*(?!arn:)[^/]*[:@]", re.IGNORECASE)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


def is_url(shard: str) -> bool:
    """Tell a remote shard from a path."""
    return _scheme(shard) is not None


def is_s3(shard: str) -> bool:
    """Tell an object of S3 from other remote shards."""
    return _scheme(shard) in OBJECT_SCHEMES


def expand_shards(shards: str | Sequence[str], *, allow_shell_urls: bool) -> list[str]:
    """List the shards that `data.shards` stands for: local paths (absolute) and URLs, in a fixed order.

    Each part is a directory (all its `*.tar`), a path, a URL, or a brace pattern of either (`part-{0000..0099}.tar`).
    A directory of S3 is a URL that ends in a slash; its listing is the one look that is taken at the network.

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


def shard_parent(shard: str) -> str:
    """The directory of a local shard (absolute), or what stands before the last part of a URL."""
    if not is_url(shard):
        return str(Path(shard).parent)
    scheme = _scheme(shard)
    return f"{scheme}:" if scheme in SHELL_SCHEMES else shard.rpartition("/")[0]


def index_in_cache(parent: str, cache_dir: Path) -> Path:
    """The place in the cache for the index of what has this parent."""
    digest = blake2b(parent.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return cache_dir / f"index-{digest}"


def shard_names(shards: Sequence[str], directory: Path) -> list[str]:
    """The names that shards have in the index at `directory`: relative to it where they lie in it."""
    return [
        str(Path(shard).relative_to(directory))
        if not is_url(shard) and Path(shard).is_relative_to(directory)
        else shard
        for shard in shards
    ]


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
        return _expand_name(part)
    try:
        names = list(braceexpand.braceexpand(part))
    except ValueError:
        raise UserError(f"data.shards: {part} has a brace without its pair; write 'part-{{0000..0099}}.tar'") from None
    for name in names:
        _check_scheme(name, allow_shell_urls)
    missing = [name for name in names if not is_url(name) and not Path(name).expanduser().exists()]
    if missing:
        raise UserError(
            f"data.shards: {missing[0]} does not exist ({len(missing)} of {len(names)} missing); "
            "give a directory of tars, a path, a URL or a brace pattern"
        )
    return [shard for name in names for shard in _expand_name(name)]


def _expand_name(name: str) -> list[str]:
    if not is_url(name):
        path = Path(name).expanduser()
        return _tars_in(path) if path.is_dir() else [str(path.absolute())]
    if not name.endswith("/"):
        return [name]
    if not is_s3(name):
        raise UserError(f"data.shards: {name} cannot be listed; name its shards, as in {name}{{0000..0099}}.tar")
    from pipeline.data.s3 import list_tars

    return list_tars(name)


def _tars_in(directory: Path) -> list[str]:
    tars = sorted(str(path.absolute()) for path in directory.glob("*.tar") if _is_shard(path))
    if not tars:
        beside = passed_over(directory)
        found = f" ({', '.join(f'{count} {what}' for what, count in beside.items())})" if beside else ""
        raise UserError(f"data.shards: {directory} holds no *.tar{found}; give the directory that holds the shards")
    return tars


def _is_shard(path: Path) -> bool:
    # macOS puts `._00000.tar` beside `00000.tar` on foreign disks.
    return path.is_file() and not path.name.startswith("._")


def passed_over(directory: Path) -> dict[str, int]:
    """What a directory of shards holds beside them that somebody may take for shards, by what it is."""
    compressed = [path for path in directory.iterdir() if path.name.lower().endswith(_COMPRESSED)]
    apple = [path for path in directory.glob("._*.tar") if path.is_file()]
    dangling = [path for path in directory.glob("*.tar") if not path.exists()]
    below = [path for path in directory.glob("*/**/*.tar") if _is_shard(path)]
    counts = {
        "compressed tars, which cannot be read from the middle: unpack them": len(compressed),
        "AppleDouble files ._*.tar, which macOS adds": len(apple),
        "links *.tar to nothing": len(dangling),
        "tars in sub-directories: name those directories too": len(below),
    }
    return {what: count for what, count in counts.items() if count}


def _check_scheme(shard: str, allow_shell_urls: bool) -> None:
    scheme = _scheme(shard)
    if scheme is None or scheme in REMOTE_SCHEMES:
        return
    if scheme in OBJECT_SCHEMES:
        _check_object(shard)
        return
    if scheme in SHELL_SCHEMES:
        if not allow_shell_urls:
            raise UserError(
                f"data.shards: {shard} would run a shell command; set data.allow_shell_urls=true if you trust it "
                "(--allow-shell-urls for unclip shards)"
            )
        return
    known = ", ".join(sorted(REMOTE_SCHEMES | OBJECT_SCHEMES))
    raise UserError(f"data.shards: {shard} has the scheme {scheme}, which is not opened; use a path or one of {known}")


def _check_object(shard: str) -> None:
    if _LOGIN.match(shard):  # not repeated: the names of shards are written down
        raise UserError("data.shards: an s3:// URL holds a login; give it by the environment (AWS_*), see AWS_PROFILE")
    if not _OBJECT.match(shard):
        raise UserError(f"data.shards: {shard} names no object; write s3://bucket/path/{{0000..0099}}.tar")
