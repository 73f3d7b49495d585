"""In CI a test that is skipped is a test that fails, unless it needs a GPU."""

import pytest

from tests.support import ROOT

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("required", "outcomes"), [("1", {"failed": 1, "skipped": 1}), ("", {"skipped": 2})])
def test_where_all_is_required_only_a_gpu_may_be_missing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcomes: dict[str, int]
):
    monkeypatch.setenv("UNCLIP_REQUIRE_ALL", required)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("""
        import pytest

        def test_of_the_page():
            pytest.skip("no browser here")

        @pytest.mark.gpu
        def test_of_the_device():
            pytest.skip("no GPU here")
    """)
    pytester.runpytest_subprocess("-p", "tests.conftest").assert_outcomes(**outcomes)
