"""Where tests stand."""

from pathlib import Path

import pytest

from tests.support import ROOT

TESTS = ROOT / "tests"


@pytest.mark.parametrize("package", ["pipeline", "stages"])
def test_folders_of_tests_mirror_the_package_s(package: str):
    folders = {path.parent.relative_to(TESTS) for path in (TESTS / package).rglob("test_*.py")}
    assert folders
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []


def test_what_tests_share_stands_in_one_package():
    def is_a_helper(path: Path) -> bool:
        return not path.name.startswith("test_") and path.name not in ("conftest.py", "__init__.py")

    helpers = {path for path in TESTS.rglob("*.py") if is_a_helper(path)}
    assert helpers
    assert {path.parent for path in helpers} == {TESTS / "support"}
