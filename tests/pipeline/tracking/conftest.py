from collections.abc import Iterator

import pytest

from pipeline.tracking import sending
from tests.support.fixtures import one_thread_and_no_script  # noqa: F401 - a fixture
from tests.support.tracked import KEY, UNREACHABLE
from tests.support.wandb_server import WandbServer, serving


@pytest.fixture(autouse=True)
def _a_key_and_no_network(monkeypatch: pytest.MonkeyPatch):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that W&B's client, the real one, speaks to. However slow this machine is, it is waited for."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.5")  # else rows leave in 15 s
        monkeypatch.setattr(sending, "_SECONDS_TO_UPLOAD_AT_A_STOP", 120.0)
        monkeypatch.setattr(sending, "_SECONDS_TO_UPLOAD_THE_REST", 120.0)
        yield server
