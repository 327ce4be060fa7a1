"""Fixtures that several test files use."""

import os

import pytest
import rooms
import torch

rooms.put_on_path()

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run in the interpreter, with numpy for a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where it is set, each of some hundred processes would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def one_thread():
    """Matrices as small as the tests' only wait for a second thread: a third of the time on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
