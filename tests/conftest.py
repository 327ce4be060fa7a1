"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Matrices as small as the tests' only wait for a second thread: a third of the time on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
