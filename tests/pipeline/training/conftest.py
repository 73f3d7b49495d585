from collections.abc import Iterator

import pytest
import torch

from tests.support import tiny


@pytest.fixture(autouse=True)
def _one_thread_and_no_script() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny.SCRIPT.__init__()
    yield
    tiny.SCRIPT.__init__()
    torch.set_num_threads(threads)
