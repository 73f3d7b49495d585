import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workflow.artifacts import MANIFEST, Artifact, ArtifactStore, file_sha256, write_json_atomically
from tests.support.fakes import manifest_of

FINGERPRINT = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "outputs")


def build(store: ArtifactStore, content: bytes = b"0123456789") -> Path:
    building = store.start_building("clip", FINGERPRINT, 1)
    (building / "part").mkdir()
    (building / "part" / "weights.bin").write_bytes(content)
    (building / "config.json").write_text("{}")
    return building


def publish(store: ArtifactStore, content: bytes = b"0123456789") -> Artifact:
    building = build(store, content)
    return store.publish(building, manifest_of("clip", FINGERPRINT, building))


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
    assert list(store.start_building("clip", FINGERPRINT, 1).iterdir()) == []


def test_building_leaves_a_later_attempt_s_directory_alone(store: ArtifactStore):
    later = store.start_building("clip", FINGERPRINT, 3)
    store.start_building("clip", FINGERPRINT, 2)
    assert later.exists()


def test_what_was_taken_from_an_overtaken_attempt_cannot_be_published_as_an_empty_artifact(store: ArtifactStore):
    overtaken = build(store)
    manifest = manifest_of("clip", FINGERPRINT, overtaken)
    store.start_building("clip", FINGERPRINT, 2)
    with pytest.raises(FileNotFoundError):
        store.publish(overtaken, manifest)
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


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "remove"])
def test_verify_finds_a_damaged_file_and_names_it(store: ArtifactStore, damage: str):
    artifact = publish(store)
    artifact.verify()
    file = artifact.path / "part" / "weights.bin"
    match damage:
        case "flip a byte":
            file.write_bytes(b"0123456780")
        case "cut":
            file.write_bytes(b"01234")
        case "remove":
            file.unlink()
    with pytest.raises(UserError, match=r"part/weights\.bin does not match its manifest; remove .* and run again"):
        artifact.verify()


def test_a_manifest_from_before_hardware_was_recorded_is_read(store: ArtifactStore):
    path = publish(store).path / MANIFEST
    values = json.loads(path.read_text())
    del values["hardware"]
    path.write_text(json.dumps(values))
    (artifact,) = store.all_of("clip")
    assert artifact.manifest.hardware == {}


def test_a_manifest_of_another_schema_says_what_to_do(store: ArtifactStore):
    path = publish(store).path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match=r"schema 99 .* remove it and run again"):
        store.find("clip", FINGERPRINT)


def test_a_manifest_that_is_no_json_says_what_to_do(store: ArtifactStore):
    (publish(store).path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"cannot be read; remove .* and run again"):
        store.find("clip", FINGERPRINT)


def test_json_is_replaced_whole_and_nothing_is_left_beside(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json_atomically(path, {"a": "ü"})
    write_json_atomically(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [each.name for each in path.parent.iterdir()] == ["value.json"]


def test_a_failed_write_keeps_the_old_json(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_file_s_digest_is_its_sha256(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
