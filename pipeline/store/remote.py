"""`unclip push` and `unclip pull`: finished stages and the record of a run, in a store that fsspec reaches.

There they lie as they do here. A manifest is written after the files of its artifact, and read before them, so that
what has one is whole; the record of the run comes last.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline.errors import UserError, is_disk_full
from pipeline.terminal.words import format_bytes
from pipeline.workflow.artifacts import MANIFEST, Artifact, ArtifactStore, read_artifact, write_json_atomically
from pipeline.workflow.in_use import store_lock
from pipeline.workflow.runs import RECORD, RunRecord, read_run, run_artifacts, run_directory

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PULLING = ".pulling-"
"""Begins the name of what a pull has fetched so far; a pull that is begun again goes on from it."""
Say = Callable[[str], None]


class RemoteStore:
    """A store at a URL: `s3://bucket/prefix`, a path, or whatever else fsspec has a file system for."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` where fsspec has none, or the URL is empty."""
        import fsspec

        if not url.strip():
            raise UserError(f"{url!r} is no address of a store; give one such as s3://BUCKET/PREFIX, or a directory")
        self.url = url.rstrip("/")
        is_local = "://" not in url or url.startswith(("file://", "local://"))
        options = {"auto_mkdir": True} if is_local else {"use_listings_cache": False}
        try:
            found = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)
        except (ImportError, ValueError) as error:
            remedy = "for s3:// it is pip install -e '.[s3]'"
            raise UserError(f"{url} cannot be reached ({_one_line(error)}); install what it needs, {remedy}") from error
        self._filesystem: AbstractFileSystem = found[0]
        self._root: str = found[1]

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, now."""
        with self._said(name):
            return bool(self._filesystem.isfile(self._at(name)))

    def put(self, file: Path, name: str) -> None:
        """Write a file there."""
        with self._said(name, is_read=False):
            self._filesystem.put_file(str(file), self._at(name))

    def get(self, name: str, file: Path) -> None:
        """Fetch one. Raises `FileNotFoundError` where there is none."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._said(name):
            self._filesystem.get_file(self._at(name), str(file))

    def names_in(self, directory: str) -> list[str]:
        """What stands in a directory; nothing where there is none."""
        try:
            with self._said(directory):
                found = self._filesystem.ls(self._at(directory), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(each).name for each in found)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _said(self, name: str, *, is_read: bool = True) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # file systems have no common one
            if (is_read and isinstance(error, FileNotFoundError)) or (
                isinstance(error, OSError) and is_disk_full(error)
            ):
                raise
            raise UserError(
                f"{self.url}/{name} cannot be reached ({_one_line(error)}); see to the address, the network and your "
                "credentials, and run it again: it goes on where it stopped"
            ) from error


def push(outputs: Path, name: str, url: str, say: Say) -> None:
    """Copy a run and its finished stages there. Raises `UserError` where nothing is finished, or it is not possible."""
    record = read_run(outputs, name)
    artifacts = run_artifacts(outputs, record)
    if not artifacts:
        raise UserError(f"run {name} has no finished stage; run it first")
    remote = RemoteStore(url)
    _require_same_run(remote, record)
    for artifact in artifacts.values():
        title, place = _title(artifact), f"artifacts/{artifact.name}"
        if remote.has(f"{place}/{MANIFEST}"):
            say(f"{title}  is there")
            continue
        artifact = artifact.opened()
        for each in artifact.manifest.files:
            remote.put(artifact.path / each.path, f"{place}/{each.path}")
        remote.put(artifact.path / MANIFEST, f"{place}/{MANIFEST}")
        say(f"{title}  pushed, {_size(artifact)}")
    remote.put(run_directory(outputs, name) / RECORD, f"runs/{name}/{RECORD}")
    left = [stage.name for stage in record.stages if stage.name not in artifacts]
    say(f"run {name} is at {remote.url}" + (f", without {', '.join(left)}, not finished" if left else ""))


def pull(outputs: Path, name: str, url: str, say: Say) -> None:
    """Fetch a run and its stages from there, each file compared with its digest.

    Raises `UserError` where there is none, or another run here has the name.
    """
    remote = RemoteStore(url)
    if PurePosixPath(name).name != name:
        raise UserError(f"{name!r} is no name of a run")
    if outputs.exists() and not outputs.is_dir():
        raise UserError(f"--outputs {outputs} is a file; give a directory")
    outputs.mkdir(parents=True, exist_ok=True)
    staging = outputs / f"{PULLING}{name}"
    staging.mkdir(exist_ok=True)
    try:
        with FileLock(staging / "lock", timeout=0):
            record = _fetched_run(remote, staging, name)
            mine = run_directory(outputs, name) / RECORD
            if mine.exists() and not _is_same(read_run(outputs, name), record):
                raise UserError(
                    f"another run {name} is here; rename it (unclip mv {name} NEW), or give another --outputs"
                )
            store = ArtifactStore(outputs)
            fetched = [_fetch(remote, staging, store, stage.name, stage.fingerprint, say) for stage in record.stages]
            with store_lock(outputs):
                mine.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomically(mine, record.model_dump(mode="json"))
            shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(f"another pull of run {name} is at work here; wait for it") from error
    left = [stage.name for stage, is_there in zip(record.stages, fetched, strict=True) if not is_there]
    say(f"run {name} is here" + (f", without {', '.join(left)}, not finished there" if left else ""))


def _fetched_run(remote: RemoteStore, staging: Path, name: str) -> RunRecord:
    try:
        remote.get(f"runs/{name}/{RECORD}", run_directory(staging, name) / RECORD)
    except FileNotFoundError as error:
        names = remote.names_in("runs")
        known = f"runs there: {', '.join(names)}" if names else "nothing was pushed there"
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"no run {name!r} at {remote.url}; {known}") from error
    return read_run(staging, name)


def _fetch(remote: RemoteStore, staging: Path, store: ArtifactStore, stage: str, fingerprint: str, say: Say) -> bool:
    """Fetch an artifact, unless it is here; whether there is one."""
    if store.find(stage, fingerprint) is not None:
        say(f"{stage}/{fingerprint[:12]}  is here")
        return True
    place = ArtifactStore(staging).path(stage, fingerprint)
    at = f"artifacts/{stage}/{fingerprint}"
    try:
        remote.get(f"{at}/{MANIFEST}", place / MANIFEST)
    except FileNotFoundError:
        return False
    artifact = read_artifact(place)
    assert artifact is not None, "its manifest was fetched"
    if (artifact.manifest.stage, artifact.manifest.fingerprint) != (stage, fingerprint):
        raise UserError(
            f"{remote.url}/{at} holds another artifact than its name says; push it again from its own store"
        )
    for each in artifact.manifest.files:
        file = place / each.path
        if not file.resolve().is_relative_to(place.resolve()):
            raise UserError(f"{remote.url}/{at} names the file {each.path!r}, which is none of its own; do not use it")
        if not file.is_file() or file.stat().st_size != each.size:
            try:
                remote.get(f"{at}/{each.path}", file)
            except FileNotFoundError as error:
                raise UserError(f"{remote.url}/{at}/{each.path} is missing; push the run again") from error
    ArtifactStore(staging).open(stage, fingerprint, anew=True)
    store.path(stage, fingerprint).parent.mkdir(parents=True, exist_ok=True)
    published = store.publish(place, artifact.manifest)
    say(f"{_title(published)}  pulled, {_size(published)}")
    return True


def _require_same_run(remote: RemoteStore, record: RunRecord) -> None:
    """Refuse to push over another run of that name."""
    name = record.name
    with TemporaryDirectory() as temporary:
        there = Path(temporary)
        try:
            remote.get(f"runs/{name}/{RECORD}", run_directory(there, name) / RECORD)
        except FileNotFoundError:
            return
        if not _is_same(read_run(there, name), record):
            raise UserError(f"another run {name} is at {remote.url}; rename this one: unclip mv {name} NEW")


def _is_same(one: RunRecord, other: RunRecord) -> bool:
    return one.stages == other.stages


def _title(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}/{artifact.manifest.fingerprint[:12]}"


def _size(artifact: Artifact) -> str:
    return format_bytes(sum(each.size for each in artifact.manifest.files))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
