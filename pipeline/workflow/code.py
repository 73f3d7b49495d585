"""The code that a stage was started with, kept beside the artifacts: what waits in a queue does not follow a checkout.

A snapshot holds this package, and those that the catalog's stages are in, in a directory named by its contents:
`code/<digest>/`. Processes find it in front of all else that they could import.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.workflow.artifacts import CODE_RECORD as RECORD
from pipeline.workflow.declaration import Catalog, resolve
from pipeline.workflow.sealed import DamagedRecordError, content_of, read_json, warn, write_json_atomically

DIRECTORY = "code"
UNKNOWN = "unknown"

_ROOT = Path(__file__).resolve().parents[2]
_MAX_MIB = 64
_TRIED = "UNCLIP_CODE"
"""The environment variable with the digest of the code that a process was started anew for: once is enough."""
_GIT_TIMEOUT_S = 30.0
_OF_NO_STAGE = tuple(
    f"pipeline/{name}"
    for name in ("report/", "terminal/", "forecast/", "launch/", "cli.py", "compose.py", "overrides.py")
)
"""Modules that change nothing of what a stage computes."""


@dataclass(frozen=True)
class Code:
    """The files of a snapshot by their paths in it, as they were when this process first planned with them.

    `sources` are the packages' own places, as `pipeline` -> `/somewhere/pipeline`.
    """

    digest: str
    files: Mapping[str, bytes]
    sources: Mapping[str, Path]

    @property
    def sha256(self) -> dict[str, str]:
        """The digest of each file."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}

    def keep(self, outputs: Path) -> Path:
        """The snapshot under `outputs`, made if it is not there. Raises `UserError` where it was edited."""
        place = snapshot(outputs, self.digest)
        if os.path.lexists(place):
            edited = _edited_in(place, self.sha256)
            if edited is not None:
                raise UserError(edited)
            if read_record(place) is None:  # lost; the files say what it said
                self._write_record(place)
            return place
        building = place.with_name(f".{self.digest}-{os.getpid()}")
        for name, content in self.files.items():
            file = building / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            self._take_compiled(name, file)
        self._write_record(building)
        try:
            building.rename(place)
        except OSError:  # another command was as fast
            shutil.rmtree(building)
        return place

    def changed_since(self, record: Mapping[str, Any] | None, within: str = "") -> list[str]:
        """Python files, below `within`, that are others than in a record; none without a record."""
        if record is None:
            return []
        before, now = record["files"], self.sha256
        return sorted(
            name for name in before.keys() | now.keys()
            if name.startswith(within) and name.endswith(".py") and before.get(name) != now.get(name)
            and not name.startswith(_OF_NO_STAGE)
        )  # fmt: skip

    def _write_record(self, place: Path) -> None:
        record = {"digest": self.digest, **_surroundings(self.sources), "files": self.sha256}
        write_json_atomically(place / RECORD, record)

    def _take_compiled(self, name: str, file: Path) -> None:
        """Bring what Python has compiled of a module, which is valid for a file of the same age."""
        top, _, rest = name.partition("/")
        source = self.sources[top] / rest
        compiled = Path(cache_from_source(str(source))) if name.endswith(".py") else None
        if compiled is not None and compiled.is_file():
            shutil.copystat(source, file)
            target = Path(cache_from_source(str(file)))
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(compiled, target)


def fault_of(place: Path) -> str | None:
    """What is to be said of a snapshot that is not as it was submitted; None of one that is."""
    record = read_record(place)
    if record is None:
        return f"{place / RECORD} is gone or damaged; remove {place} and run again"
    return _edited_in(place, record["files"])


def _edited_in(place: Path, digests: Mapping[str, str]) -> str | None:
    for name, sha256 in digests.items():
        content = _read(place / name)
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            return f"{place / name} is not as it was submitted; remove {place} and run again"
    return None


def snapshot(outputs: Path, digest: str) -> Path:
    """Where the snapshot of that digest is."""
    return outputs / DIRECTORY / digest


@cache
def current_code(catalog: str) -> Code:
    """The code of a catalog's stages and of this package, read once in a process, so that a sweep has one code.

    Raises `UserError` for a package that is too large for code alone.
    """
    stages: Catalog = resolve(catalog)
    named = [catalog, *(name for each in stages.stages.values() for name in (each.run, each.settings.__module__))]
    names = sorted({__name__.partition(".")[0], *(each.partition(":")[0].partition(".")[0] for each in named)})
    sources = {place.name: place for place in map(_place_of, names)}
    files = {name: content for top, place in sources.items() for name, content in _files(top, place)}
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return Code(digest.hexdigest()[:16], files, sources)


def search_path(outputs: Path, digest: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What is set over an environment for Python to find a snapshot before anything else, and this directory last."""
    places = [str(snapshot(outputs, digest)), *filter(None, [environment.get("PYTHONPATH")]), str(Path.cwd())]
    return {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def become_submitted(frozen: Path) -> None:
    """Start this process anew on the code that a frozen stage was submitted with, if it is there and runs another.

    So whoever starts a stage need not know of its code.
    """
    try:
        values = json.loads(frozen.read_bytes())
        outputs, digest = Path(values["outputs"]), values["code"]
        if not isinstance(digest, str) or digest in (_ROOT.name, os.environ.get(_TRIED)):
            return
        if not (snapshot(outputs, digest) / RECORD).exists():
            return
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads it says so
        return
    environment = {**os.environ, **search_path(outputs, digest, os.environ), _TRIED: digest}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def require(outputs: Path, digest: str) -> dict[str, Any]:
    """The record of the snapshot that this process runs. Raises `UserError` where it runs any other code."""
    place = snapshot(outputs, digest)
    fault = fault_of(place) if os.path.lexists(place) else None
    if fault is not None:
        raise UserError(fault)
    record = read_record(place)
    if _ROOT.name != digest or record is None:
        raise UserError(
            f"the code of this stage is not at {place} any more; start it again, with the code as it is now"
        )
    return record


def begin(work: Path, record: Mapping[str, Any]) -> None:
    """Write down in a stage's work directory which code goes on with it, and after which."""
    before = read_record(work)
    if before is None or before["digest"] != record["digest"]:
        kept = [{name: each[name] for name in ("digest", "version")} for each in [before] if each is not None]
        earlier = [*before.get("before", []), *kept] if before is not None else []
        write_json_atomically(work / RECORD, {**record, "before": earlier})


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of the code in that directory: of a snapshot, a stage in progress or an artifact; None without one."""
    try:
        values = read_json(directory / RECORD)
    except DamagedRecordError as error:
        warn(f"{error}; which code it was is not known")
        return None
    except OSError:
        return None
    is_one = isinstance(values.get("digest"), str) and isinstance(values.get("version"), str)
    return values if is_one and isinstance(values.get("files"), dict) else None


def code_version() -> str:
    """The package's version, and the commit where the code is a git checkout; `unknown` for what cannot be told.

    It is for people alone, so that nothing that is amiss with metadata or git ends a stage.
    """
    record = read_record(_ROOT)
    if record is not None:
        return record["version"]
    try:
        release = metadata.version("unclip") or UNKNOWN
    except Exception:  # not installed, or metadata that are damaged in whatever way
        release = UNKNOWN
    return f"{release}+{_git(_ROOT, 'describe', '--always', '--dirty')}" if (_ROOT / ".git").exists() else release


def _surroundings(sources: Mapping[str, Path]) -> dict[str, Any]:
    """What a record says beside the files: commit and changes of each checkout, and what else is installed."""
    checkouts = {place.parent for place in sources.values() if (place.parent / ".git").exists()}
    return {
        "version": code_version(),
        "diff": {place.name: _git(place, "diff", "HEAD") for place in sorted(checkouts)},
        "python": platform.python_version(),
        "packages": _packages(),
    }


def _packages() -> dict[str, str]:
    found = {}
    for each in metadata.distributions():
        with suppress(Exception):  # metadata that are damaged in whatever way
            found[str(each.name)] = str(each.version)
    return dict(sorted(found.items()))


def _git(root: Path, *arguments: str) -> str:
    try:
        said = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, or one that refuses another user's checkout
        return UNKNOWN
    return said.stdout.strip() or ("" if arguments[0] == "diff" else UNKNOWN)


def _place_of(name: str) -> Path:
    """The directory of a top-level package, or the file of a module."""
    spec = find_spec(name)
    assert spec is not None, f"{name} is imported"
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    assert spec.origin is not None, f"{name} has a file"
    return Path(spec.origin)


def _files(top: str, place: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a package, and of what it links to; what is hidden or compiled is left out."""
    if place.is_file():
        yield top, place.read_bytes()
        return
    total = 0
    for directory, names, files in os.walk(place, followlinks=True):
        names[:] = sorted(each for each in names if not each.startswith((".", "__pycache__")))
        for each in sorted(files):
            path = Path(directory) / each
            total += path.stat().st_size
            if total > _MAX_MIB * 2**20:
                raise UserError(
                    f"{place} holds more than {_MAX_MIB} MiB, too much to keep with every change; move data out of it"
                )
            yield f"{top}/{path.relative_to(place).as_posix()}", path.read_bytes()


def _read(path: Path) -> bytes | None:
    try:
        return content_of(path)
    except OSError:
        return None
