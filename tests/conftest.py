"""What every test shares."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_the_default_attention() -> Iterator[None]:
    """Small tensors are fastest on one thread, and no test sees another's process-wide settings."""
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(flash)
