"""Where shards are, as a config or a command line says it. Imports neither numpy nor torch."""

import shlex
from pathlib import Path

from braceexpand import braceexpand

from pipeline.config import PositiveFloat, Settings
from pipeline.data.shards import expand_shards, is_url

DEFAULT_CACHE_DIR = Path("outputs/cache")


class ShardPlace(Settings):
    """Which shards, and where their index and the copies of remote ones are kept. No part of what the data is.

    `shards` are directories, paths, URLs and brace patterns. At most `cache_gib` of remote shards are kept in
    `cache_dir`. The index is beside the shards or, where that cannot be written, in `cache_dir`; `index_dir` is another
    place for it.
    """

    shards: tuple[str, ...]
    allow_shell_urls: bool = False
    cache_dir: Path = DEFAULT_CACHE_DIR
    cache_gib: PositiveFloat | None = None
    index_dir: Path | None = None

    def expand(self) -> list[str]:
        """The shards in their order: absolute paths and URLs. Raises `UserError` as `expand_shards` does."""
        return expand_shards(self.shards, allow_shell_urls=self.allow_shell_urls)

    def from_anywhere(self) -> "ShardPlace":
        """The same place for a process in another working directory."""
        parts = [each for part in self.shards for each in _with_a_beginning(part)]
        shards = tuple(part if is_url(part) else str(Path(part).expanduser().absolute()) for part in parts)
        index_dir = None if self.index_dir is None else self.index_dir.absolute()
        return self.model_copy(
            update={"shards": shards, "cache_dir": self.cache_dir.absolute(), "index_dir": index_dir}
        )

    @property
    def index_command(self) -> str:
        """The command that indexes these shards, as a shell takes it."""
        words = ["unclip", "shards", "index", *self.shards]
        if self.allow_shell_urls:
            words.append("--allow-shell-urls")
        if self.index_dir is not None:
            words += ["--index", str(self.index_dir)]
        if self.cache_dir.absolute() != DEFAULT_CACHE_DIR.absolute():
            words += ["--cache", str(self.cache_dir)]
        return shlex.join(words)

    @property
    def cache_bytes(self) -> int | None:
        """How much of remote shards is kept, if there is a limit."""
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)


def _with_a_beginning(part: str) -> list[str]:
    """A pattern as it is; of one that begins with a brace, what it stands for: each is absolute or not."""
    if not part.startswith("{"):
        return [part]
    try:
        return list(braceexpand(part))
    except ValueError:
        return [part]  # `expand` says what is wrong
