import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workflow import artifacts, digests
from pipeline.workflow import publish as publishing
from pipeline.workflow.artifacts import (
    MANIFEST,
    SET_ASIDE,
    VERIFIED,
    Artifact,
    ArtifactStore,
)
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.sealed import read_json, write_json_atomically
from tests.support.fakes import manifest_of

FINGERPRINT = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "outputs")


def build(store: ArtifactStore, content: bytes = b"0123456789") -> Path:
    building = publishing.start_building(store, "clip", FINGERPRINT, 1)
    (building / "part").mkdir()
    (building / "part" / "weights.bin").write_bytes(content)
    (building / "config.json").write_text("{}")
    return building


def publish(store: ArtifactStore, content: bytes = b"0123456789") -> Artifact:
    building = build(store, content)
    return publishing.publish(store, building, manifest_of("clip", FINGERPRINT, building))


def test_a_published_artifact_is_found_with_its_manifest(store: ArtifactStore):
    published = publish(store)
    found = store.find("clip", FINGERPRINT)
    assert found is not None
    assert found == published
    assert found.path == store.outputs / "artifacts" / "clip" / FINGERPRINT
    assert found.manifest.metrics == {"loss": 0.5}


def test_the_manifest_lists_every_file_with_size_and_digest(store: ArtifactStore):
    files = {record.path: record for record in publish(store).manifest.files}
    assert sorted(files) == ["config.json", "part/weights.bin"]
    assert files["part/weights.bin"].size == 10
    # sha256sum of "0123456789"
    assert files["part/weights.bin"].sha256 == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"


def test_without_a_manifest_an_artifact_does_not_exist(store: ArtifactStore):
    artifact = publish(store)
    (artifact.path / MANIFEST).unlink()
    assert store.find("clip", FINGERPRINT) is None
    assert list(store.all_of("clip")) == []


def test_what_is_being_built_is_not_found(store: ArtifactStore):
    building = build(store)
    write_json_atomically(building / MANIFEST, manifest_of("clip", FINGERPRINT, building).model_dump(mode="json"))
    assert store.find("clip", FINGERPRINT) is None
    assert list(store.all_of("clip")) == []


def test_building_begins_with_an_empty_directory_after_a_crash(store: ArtifactStore):
    (build(store) / "left over").write_text("by a crash")
    assert list(publishing.start_building(store, "clip", FINGERPRINT, 1).iterdir()) == []


def test_building_leaves_a_later_attempt_s_directory_alone(store: ArtifactStore):
    later = publishing.start_building(store, "clip", FINGERPRINT, 3)
    publishing.start_building(store, "clip", FINGERPRINT, 2)
    assert later.exists()


def test_what_was_taken_from_an_overtaken_attempt_cannot_be_published_as_an_empty_artifact(store: ArtifactStore):
    overtaken = build(store)
    manifest = manifest_of("clip", FINGERPRINT, overtaken)
    publishing.start_building(store, "clip", FINGERPRINT, 2)
    with pytest.raises(FileNotFoundError):
        publishing.publish(store, overtaken, manifest)
    assert store.find("clip", FINGERPRINT) is None


def test_a_published_artifact_never_changes(store: ArtifactStore):
    first = publish(store, b"first")
    second = publish(store, b"second")
    assert second == first
    assert (first.path / "part" / "weights.bin").read_bytes() == b"first"
    assert [path.name for path in first.path.parent.iterdir()] == [FINGERPRINT]


def test_a_directory_that_lost_its_manifest_is_replaced(store: ArtifactStore):
    (publish(store, b"first").path / MANIFEST).unlink()
    assert (publish(store, b"second").path / "part" / "weights.bin").read_bytes() == b"second"
    assert store.find("clip", FINGERPRINT) is not None


def damaged(artifact: Artifact, damage: str) -> Path:
    file = artifact.path / "part" / "weights.bin"
    match damage:
        case "flip a byte":
            file.write_bytes(b"0123456780")
        case "cut":
            file.write_bytes(b"01234")
        case "remove":
            file.unlink()
    return file


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "remove"])
def test_opening_names_a_damaged_file_and_sets_the_artifact_aside(store: ArtifactStore, damage: str):
    artifact = publish(store)
    assert artifact.opened() == artifact
    before = (artifact.path / MANIFEST).read_bytes()
    file = damaged(artifact, damage)
    with pytest.raises(DamagedArtifactError, match=rf"{file} .*: stage clip is set aside; .*on_damage=rebuild"):
        store.open("clip", FINGERPRINT)
    assert store.find("clip", FINGERPRINT) is None
    assert store.known_damage("clip", FINGERPRINT) is not None
    # Nothing is deleted, and whoever has the other files open goes on.
    assert (artifact.path / SET_ASIDE).read_bytes() == before
    assert (artifact.path / "config.json").exists()


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_another_size_is_known_without_reading_a_file(store: ArtifactStore, damage: str):
    file = damaged(publish(store), damage)
    assert str(file) in str(store.known_damage("clip", FINGERPRINT))


def test_what_was_verified_is_read_again_only_when_somebody_touched_it(store: ArtifactStore, monkeypatch):
    artifact = publish(store)
    read: list[Path] = []
    monkeypatch.setattr(digests, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    store.open("clip", FINGERPRINT)
    store.open("clip", FINGERPRINT)
    assert sorted(path.name for path in read) == ["config.json", "weights.bin"]
    (artifact.path / "config.json").touch()
    store.open("clip", FINGERPRINT)
    assert [path.name for path in read[2:]] == ["config.json"]
    store.open("clip", FINGERPRINT, anew=True)
    assert len(read) == 5


@pytest.mark.parametrize("memory", [b"", b"\xff", b"{", b"[]", b'{"files": 3}', b'{"files": {"config.json": [null]}}'])
def test_a_damaged_memory_of_what_was_verified_is_no_memory(store: ArtifactStore, memory: bytes):
    artifact = publish(store)
    store.open("clip", FINGERPRINT)
    (remembered,) = (store.work("clip", FINGERPRINT) / VERIFIED).glob("*.json")
    remembered.write_bytes(memory)
    damaged(artifact, "flip a byte")
    with pytest.raises(DamagedArtifactError):
        store.open("clip", FINGERPRINT)


def test_a_damaged_artifact_is_found_once_by_all_who_open_it(store: ArtifactStore):
    damaged(publish(store), "flip a byte")

    def opened(_: int) -> str:
        try:
            return "nothing" if store.open("clip", FINGERPRINT) is None else "whole"
        except DamagedArtifactError:
            return "damaged"

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(opened, range(16)))
    assert "damaged" in found
    assert "whole" not in found
    assert store.find("clip", FINGERPRINT) is None


def test_what_was_made_anew_meanwhile_is_not_set_aside(store: ArtifactStore, monkeypatch):
    damaged(publish(store, b"0123456789"), "flip a byte")

    def found_late(*_: object) -> str:
        store.path("clip", FINGERPRINT).rename(store.outputs / "damaged")
        publish(store)
        return "a file is damaged"

    monkeypatch.setattr(artifacts, "fault", found_late)
    with pytest.raises(DamagedArtifactError):
        store.open("clip", FINGERPRINT)
    assert store.find("clip", FINGERPRINT) is not None


def test_what_is_made_anew_takes_the_place_of_what_was_set_aside_which_stays(store: ArtifactStore):
    artifact = publish(store)
    damaged(artifact, "flip a byte")
    with pytest.raises(DamagedArtifactError):
        store.open("clip", FINGERPRINT)
    publish(store)
    assert store.open("clip", FINGERPRINT) is not None
    assert store.known_damage("clip", FINGERPRINT) is None
    (kept,) = artifact.path.parent.glob(f".damaged-{FINGERPRINT}-*")
    assert (kept / "part" / "weights.bin").read_bytes() == b"0123456780"


def test_an_intact_copy_brings_back_what_was_set_aside(store: ArtifactStore):
    file = damaged(publish(store), "cut")
    with pytest.raises(DamagedArtifactError):
        store.open("clip", FINGERPRINT)
    assert not store.take_back("prior", FINGERPRINT)
    with pytest.raises(DamagedArtifactError, match=f"{file} has 5 bytes and had 10: stage clip is set aside"):
        store.take_back("clip", FINGERPRINT)
    file.write_bytes(b"0123456789")
    assert store.take_back("clip", FINGERPRINT)
    assert store.open("clip", FINGERPRINT) is not None


def test_a_manifest_from_before_hardware_was_recorded_is_read(store: ArtifactStore):
    path = publish(store).path / MANIFEST
    values = read_json(path)
    del values["hardware"]
    path.write_text(json.dumps(values))
    (artifact,) = store.all_of("clip")
    assert artifact.manifest.hardware == {}


def test_a_manifest_of_another_schema_says_what_to_do(store: ArtifactStore):
    path = publish(store).path / MANIFEST
    path.write_text(json.dumps({**read_json(path), "schema_version": 99}))
    with pytest.raises(UserError, match=r"schema 99 .* remove it and run again"):
        store.find("clip", FINGERPRINT)


def test_a_manifest_that_is_no_json_says_what_to_do(store: ArtifactStore):
    (publish(store).path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"cannot be read .*on_damage=rebuild"):
        store.find("clip", FINGERPRINT)


def test_a_manifest_of_which_one_value_was_changed_is_damaged(store: ArtifactStore):
    path = publish(store).path / MANIFEST
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.4'))
    with pytest.raises(DamagedArtifactError, match="does not match its own digest"):
        store.open("clip", FINGERPRINT)
    assert store.find("clip", FINGERPRINT) is None


def test_json_is_replaced_whole_and_nothing_is_left_beside(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json_atomically(path, {"a": "ü"})
    write_json_atomically(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [each.name for each in path.parent.iterdir()] == ["value.json"]


def test_a_failed_write_keeps_the_old_json(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert read_json(path) == {"a": 1}


def test_a_file_s_digest_is_its_sha256(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
