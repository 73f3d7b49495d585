"""The copy of a state on a GPU from which a checkpoint is written."""

import pytest
import torch

from pipeline.training.strategies.host_memory import HostMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_a_copy_is_pinned_stays_as_it_was_and_has_its_place_until_it_is_given_back():
    memory = HostMemory()
    state = [torch.randn(1_000_003, device="cuda"), torch.ones(1, device="cuda")]
    before = [each.cpu() for each in state]
    copied = memory.copies(state, processes=1)
    assert copied is not None
    assert all(each.is_pinned() for each in copied)
    for each in state:
        each.zero_()
    assert all(map(torch.equal, copied, before))
    again = memory.copies(state, processes=1)
    assert again is not None
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in copied]
    memory.release()
    assert not again[0].is_pinned()
