"""Fixtures that several folders' conftest.py import."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.tiny import SCRIPT


@pytest.fixture(autouse=True)
def one_thread_and_no_script() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    SCRIPT.__init__()
    yield
    SCRIPT.__init__()
    torch.set_num_threads(threads)
