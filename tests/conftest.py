"""What every test shares."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured in tests is remembered by tests alone, those in other processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread_and_the_default_attention() -> Iterator[None]:
    """Small tensors are fastest on one thread, and no test sees another's process-wide settings."""
    threads, backends = torch.get_num_threads(), torch.backends.cuda
    settings = {
        backends.enable_flash_sdp: backends.flash_sdp_enabled(),
        backends.enable_mem_efficient_sdp: backends.mem_efficient_sdp_enabled(),
        backends.enable_cudnn_sdp: backends.cudnn_sdp_enabled(),
        backends.enable_math_sdp: backends.math_sdp_enabled(),
    }
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for enable, is_enabled in settings.items():
        enable(is_enabled)
