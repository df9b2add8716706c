"""What tests of several rooms need."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """On small arrays the threads of torch cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
