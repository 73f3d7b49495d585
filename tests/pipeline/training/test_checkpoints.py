import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.progress import latest_checkpoint_samples

PART = "fragments-00000-of-00001.000.safetensors"


def checkpoint(work: Path, samples: int) -> Path:
    directory = work / "checkpoints"
    directory.mkdir(exist_ok=True)
    path = directory / f"samples-{samples:012}.ckpt"
    path.mkdir()
    (path / "trainer.pt").write_bytes(b"loops")
    (path / PART).write_bytes(b"state at %d" % samples)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    record = {"samples_seen": samples, "files": files, "elapsed_s": samples / 10, "sizes": sizes}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


def test_without_checkpoints_there_is_none(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint_samples(tmp_path) is None


def test_the_newest_is_the_one_with_most_samples_whatever_the_file_times(tmp_path: Path):
    checkpoint(tmp_path, 1_000)
    checkpoint(tmp_path, 900)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.samples_seen, found.elapsed_s, found.writers) == (1_000, 100.0, 1)
    assert latest_checkpoint_samples(tmp_path) == 1_000


@pytest.mark.parametrize("damage", ["cut", "changed", "part missing", "missing", "torn record", "another record"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    checkpoint(tmp_path, 100)
    newest = checkpoint(tmp_path, 200)
    match damage:
        case "cut":
            (newest / PART).write_bytes((newest / PART).read_bytes()[:-1])
        case "changed":
            (newest / PART).write_bytes((newest / PART).read_bytes().replace(b"2", b"3"))
        case "part missing":
            (newest / PART).unlink()
        case "missing":
            shutil.rmtree(newest)
        case "torn record":
            newest.with_suffix(".json").write_text('{"samples_seen": 2')
        case "another record":
            newest.with_suffix(".json").write_text('{"samples": 200}')
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.samples_seen == 100
    assert f"{newest} is damaged and passed over" in capsys.readouterr().err
    # Plans and status read no checkpoint: what its record and sizes tell they see.
    is_seen = damage not in ("changed", "another record")
    assert latest_checkpoint_samples(tmp_path) == (100 if is_seen else 200)
    assert ("it is passed over" in capsys.readouterr().err) == is_seen


def test_a_checkpoint_without_its_record_is_not_used(tmp_path: Path):
    checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 200).with_suffix(".json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.samples_seen == 100


def test_when_all_are_damaged_training_begins_anew(tmp_path: Path):
    (checkpoint(tmp_path, 100) / PART).write_bytes(b"")
    assert latest_checkpoint(tmp_path) is None
