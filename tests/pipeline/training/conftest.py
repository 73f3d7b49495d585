from tests.support.fixtures import one_thread_and_no_script  # noqa: F401 - a fixture
