"""`unclip push` and `unclip pull`: finished stages and the record of a run, in a store that fsspec reaches.

There they lie as they do here. A manifest is written after the files of its artifact, and read before them, so that
what has one is whole; the record of the run comes last.
"""

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline.errors import UserError, is_disk_full, typed
from pipeline.terminal.words import format_bytes
from pipeline.workflow.artifacts import MANIFEST, Artifact, ArtifactStore, read_artifact
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.digests import fault
from pipeline.workflow.in_use import Needs, in_use, store_lock
from pipeline.workflow.ownership import PULLED, TAKEN_AWAY, was_published
from pipeline.workflow.publish import publish
from pipeline.workflow.runs import (
    RECORD,
    DamagedRunError,
    RunRecord,
    RunStage,
    is_member,
    keys_of,
    make_runs,
    read_run,
    run_artifacts,
    run_directory,
    store_of,
    write_run,
)
from pipeline.workflow.sealed import write_json_atomically

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PULLING = ".pulling-"
"""Begins the name of what a pull has fetched so far; a pull that is begun again goes on from it."""
Say = Callable[[str], None]


class NoFileError(FileNotFoundError):
    """A directory is in the place of a file."""


class RemoteStore:
    """A store at a URL: `s3://bucket/prefix`, a path, or whatever else fsspec has a file system for."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` where fsspec has none, or the URL is empty."""
        import fsspec

        scheme, _, path = url.rpartition("://")
        if not path.strip() or (scheme and not path.strip("/")):
            raise UserError(f"{url!r} is no address of a store; give one such as s3://BUCKET/PREFIX, or a directory")
        if scheme == "memory":
            raise UserError(f"{url} is gone when this command ends; give a place that lasts")
        self.url = url.rstrip("/")
        is_local = scheme in ("", "file", "local")
        options = {"auto_mkdir": True} if is_local else {"use_listings_cache": False}
        try:
            found = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)
        except (ImportError, ValueError) as error:
            remedy = "for s3:// it is pip install -e '.[s3]'"
            raise UserError(f"{url} cannot be reached ({_one_line(error)}); install what it needs, {remedy}") from error
        except OSError as error:
            raise UserError(f"{url} cannot be used as a store ({_one_line(error)}); give another address") from error
        self._filesystem: AbstractFileSystem = found[0]
        self._root: str = found[1]
        self._is_local = is_local

    def is_at(self, path: Path, name: str = "") -> bool:
        """Whether what has that name there is the same thing as a path here."""
        return self._is_local and Path(self._root, name).resolve() == path.resolve()

    def is_tree_of(self, outputs: Path) -> bool:
        """Whether it is one of the trees of a store here, or below one."""
        trees = [*map(outputs.joinpath, ("runs", "artifacts", "work", "code"))]
        return self._is_local and any(Path(self._root).resolve().is_relative_to(each.resolve()) for each in trees)

    def sizes_in(self, directory: str) -> dict[str, int]:
        """The files below a directory, now, and their bytes; nothing where there is none."""
        at = self._at(directory)
        try:
            with self._said(directory):
                found = self._filesystem.find(at, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(f"{at}/"): entry["size"] for path, entry in dict(found).items()}

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._said(name, is_read=False):
            self._filesystem.rm_file(self._at(name))

    def put(self, file: Path, name: str) -> None:
        """Write a file there."""
        with self._said(name, is_read=False):
            self._filesystem.put_file(str(file), self._at(name))

    def get(self, name: str, file: Path) -> None:
        """Fetch one. Raises `FileNotFoundError` where there is none, and `NoFileError` for a directory."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._said(name):
            self._filesystem.get_file(self._at(name), str(file))
        if file.is_dir():
            shutil.rmtree(file)
            raise NoFileError(name)

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
            if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
                raise UserError(
                    f"{self.url}/{name} cannot be {'read' if is_read else 'written'}: a file or directory is in the "
                    "way there; remove it there, and run this again"
                ) from error
            place = "that path" if self._is_local else "the address, the network and your credentials"
            raise UserError(
                f"{self.url}/{name} cannot be reached ({_one_line(error)}); see to {place}, and run it again: it goes "
                "on where it stopped"
            ) from error


def push(outputs: Path, name: str, url: str, say: Say, *, is_anew: bool = False) -> None:
    """Copy a run and its finished stages there: what is there is left, unless a file is cut or missing, or `is_anew`.

    Raises `UserError` where nothing is finished, where a finished stage is damaged, or it is not possible.
    """
    record = read_run(outputs, name)
    artifacts = run_artifacts(outputs, record)
    if not artifacts:
        raise UserError(f"run {name} has no finished stage; run it first")
    remote = RemoteStore(url)
    if remote.is_at(outputs) or remote.is_tree_of(outputs):
        part = "" if remote.is_at(outputs) else "part of "
        raise UserError(f"{url} is {part}the store of run {name} itself; give the address of another one")
    _require_same_run(remote, outputs, record)
    for artifact in artifacts.values():
        title, place = _title(artifact), f"artifacts/{artifact.name}"
        if remote.is_at(artifact.path, place):
            artifact.opened()
            say(f"{title}  is there, and linked to from here")
            continue
        sizes = remote.sizes_in(place)
        if not is_anew and _is_whole(remote, place, sizes):
            say(f"{title}  is there")
            continue
        artifact = artifact.opened()
        if MANIFEST in sizes:  # none is there for as long as its files are not
            remote.remove(f"{place}/{MANIFEST}")
        for each in artifact.manifest.files:
            remote.put(artifact.path / each.path, f"{place}/{each.path}")
        remote.put(artifact.path / MANIFEST, f"{place}/{MANIFEST}")
        say(f"{title}  pushed, {_size(artifact)}")
    with TemporaryDirectory() as temporary:  # with its present name, which a rename that was killed may not have given
        path = Path(temporary) / RECORD
        write_json_atomically(path, record.model_dump(mode="json"))
        remote.put(path, f"runs/{name}/{RECORD}")
    left = [stage for stage in record.stages if stage.name not in artifacts]
    store = store_of(outputs, [record])
    for stage in left:
        damage = store.known_damage(stage.name, stage.fingerprint)
        if damage is None and was_published(store.work(stage.name, stage.fingerprint)):
            damage = f"{store.path(stage.name, stage.fingerprint)} {TAKEN_AWAY}"
        if damage is not None:
            raise UserError(f"run {name} is at {remote.url}, without {stage.name}: {damage}")
    names = ", ".join(stage.name for stage in left)
    say(f"run {name} is at {remote.url}" + (f", without {names}, not finished" if left else ""))


def runs_at(url: str, name: str) -> list[str]:
    """The run of that name there, or the members of the sweep, in their order."""
    names = RemoteStore(url).names_in("runs")
    members = [] if name in names else [each for each in names if is_member(each, name)]
    return sorted(members, key=lambda each: int(each.rpartition(".")[2])) or [name]


def pull(outputs: Path, name: str, url: str, say: Say) -> None:
    """Fetch a run and its stages from there, each file compared with its digest.

    Raises `UserError` where there is none, or another run here has the name.
    """
    remote = RemoteStore(url)
    if not name or PurePosixPath(name).name != name:
        raise UserError(f"{name!r} is no name of a run")
    if outputs.exists() and not outputs.is_dir():
        raise UserError(f"--outputs {outputs} is a file; give a directory")
    make_runs(outputs)
    staging = outputs / f"{PULLING}{name}"
    staging.mkdir(exist_ok=True)
    try:
        with FileLock(staging / "lock", timeout=0):
            record = _fetched_run(remote, staging, name)
            mine = run_directory(outputs, name) / RECORD
            if mine.exists() and not _is_same(read_run(outputs, name), record):
                rename = typed(outputs, "mv", name, "NEW")
                raise UserError(f"another run {name} is here; rename it ({rename}), or give another --outputs")
            store = ArtifactStore(outputs)
            with ExitStack() as stack:
                with store_lock(outputs):
                    stack.enter_context(in_use(outputs, Needs(runs=[name], stages=keys_of(record), code=[])))
                fetched = [_fetch(remote, staging, store, record, stage, say) for stage in record.stages]
                with store_lock(outputs):
                    write_run(mine.parent, record)
                shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(f"another pull of run {name} is at work here; wait for it") from error
    left = [stage for stage, is_there in zip(record.stages, fetched, strict=True) if not is_there]
    made_from = {each for stage in record.stages if stage not in left for each in stage.upstream}
    lost = [stage.name for stage in left if stage.name in made_from or remote.sizes_in(_place(stage))]
    if lost:
        remedy = _push_anew(remote, name)
        raise UserError(f"run {name} is here, without {', '.join(lost)}, of which a part is lost there; {remedy}")
    names = ", ".join(stage.name for stage in left)
    say(f"run {name} is here" + (f", without {names}, not finished there" if left else ""))


def _fetched_run(remote: RemoteStore, staging: Path, name: str) -> RunRecord:
    try:
        remote.get(f"runs/{name}/{RECORD}", run_directory(staging, name) / RECORD)
    except FileNotFoundError as error:
        names = remote.names_in("runs")
        if name in names:
            raise _damaged_there(remote, name, f"runs/{name}/{RECORD}", _state(error, "gone")) from error
        known = f"runs there: {', '.join(names)}" if names else "nothing was pushed there; see to the address"
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"no run {name!r} at {remote.url}; {known}") from error
    try:
        return read_run(staging, name)
    except DamagedRunError as error:
        raise _damaged_there(remote, name, f"runs/{name}/{RECORD}") from error


def _push_anew(remote: RemoteStore, run: str) -> str:
    return (
        f"where the run is whole, type {shlex.join(['unclip', 'push', run, remote.url, '--anew'])}, then pull it again"
    )


def _damaged_there(remote: RemoteStore, run: str, what: str, state: str = "damaged") -> UserError:
    return UserError(f"{remote.url}/{what} is {state}; {_push_anew(remote, run)}")


def _state(error: FileNotFoundError, missing: str) -> str:
    return "a directory, which is to be removed there" if isinstance(error, NoFileError) else missing


def _place(stage: RunStage) -> str:
    return f"artifacts/{stage.name}/{stage.fingerprint}"


def _fetch(
    remote: RemoteStore, staging: Path, store: ArtifactStore, record: RunRecord, run_stage: RunStage, say: Say
) -> bool:
    """Fetch an artifact, unless it is here; whether there is one."""
    stage, fingerprint = run_stage.name, run_stage.fingerprint
    try:
        if store.open(stage, fingerprint) is not None:
            say(f"{stage}/{fingerprint[:12]}  is here")
            return True
    except DamagedArtifactError as error:
        say(f"{error.fault}: stage {stage} is fetched anew")
    place, at = ArtifactStore(staging).path(stage, fingerprint), _place(run_stage)
    try:
        remote.get(f"{at}/{MANIFEST}", place / MANIFEST)
    except NoFileError as error:
        raise _damaged_there(remote, record.name, f"{at}/{MANIFEST}", _state(error, "")) from error
    except FileNotFoundError:
        return False
    try:
        artifact = read_artifact(place)
    except DamagedArtifactError as error:
        raise _damaged_there(remote, record.name, f"{at}/{MANIFEST}") from error
    assert artifact is not None, "its manifest was fetched"
    if (artifact.manifest.stage, artifact.manifest.fingerprint) != (stage, fingerprint):
        raise _damaged_there(remote, record.name, at, "another artifact than its name says")
    for each in artifact.manifest.files:
        file = place / each.path
        if not file.resolve().is_relative_to(place.resolve()):
            raise UserError(f"{remote.url}/{at} names the file {each.path!r}, which is none of its own; do not use it")
        if fault(place, [each]) is not None:  # what a pull before has left is as good as what is fetched now
            try:
                remote.get(f"{at}/{each.path}", file)
            except FileNotFoundError as error:
                raise _damaged_there(remote, record.name, f"{at}/{each.path}", _state(error, "missing")) from error
    if fault(place, artifact.manifest.files) is not None:
        damaged = next(each for each in artifact.manifest.files if fault(place, [each]) is not None)
        (place / damaged.path).unlink()  # to be fetched anew
        raise _damaged_there(remote, record.name, f"{at}/{damaged.path}")
    store.path(stage, fingerprint).parent.mkdir(parents=True, exist_ok=True)
    published = publish(store, place, artifact.manifest)
    work = store.work(stage, fingerprint)
    work.mkdir(parents=True, exist_ok=True)
    write_json_atomically(work / PULLED, {"run": record.name})
    say(f"{_title(published)}  pulled, {_size(published)}")
    return True


def _require_same_run(remote: RemoteStore, outputs: Path, record: RunRecord) -> None:
    """Refuse to push over another run of that name."""
    name = record.name
    with TemporaryDirectory() as temporary:
        there = Path(temporary)
        try:
            remote.get(f"runs/{name}/{RECORD}", run_directory(there, name) / RECORD)
        except FileNotFoundError:
            return
        with suppress(DamagedRunError):  # one is written in its place
            if _is_same(read_run(there, name), record):
                return
            rename = typed(outputs, "mv", name, "NEW")
            raise UserError(f"another run {name} is at {remote.url}; rename this one: {rename}")


def _is_whole(remote: RemoteStore, place: str, sizes: Mapping[str, int]) -> bool:
    """Whether an artifact there is complete, as far as sizes tell."""
    if MANIFEST not in sizes:
        return False
    with TemporaryDirectory() as temporary:
        here = Path(temporary) / place
        remote.get(f"{place}/{MANIFEST}", here / MANIFEST)
        try:
            artifact = read_artifact(here)
        except UserError:
            return False
    return artifact is not None and all(sizes.get(each.path) == each.size for each in artifact.manifest.files)


def _is_same(one: RunRecord, other: RunRecord) -> bool:
    return one.stages == other.stages


def _title(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}/{artifact.manifest.fingerprint[:12]}"


def _size(artifact: Artifact) -> str:
    return format_bytes(sum(each.size for each in artifact.manifest.files))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
