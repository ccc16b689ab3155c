"""What every test shares."""

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast.data import dali_pipeline

from .pictures import NUM_IMAGES, SIZES, encode, num_alive, photo, write


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


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG of several sizes."""
    sizes = itertools.islice(itertools.cycle(SIZES), NUM_IMAGES)
    images = (photo(*size, seed) for seed, size in enumerate(sizes))
    return write(tmp_path_factory.mktemp("photos"), (encode(i, "jpeg", quality=90) for i in images))


@pytest.fixture(scope="session")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG of one size."""
    images = (photo(32, 32, seed) for seed in range(NUM_IMAGES))
    return write(tmp_path_factory.mktemp("small"), (encode(image, "png") for image in images))


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """All pipelines built from now on, those alive and those not."""
    built: list[weakref.ref[Any]] = []
    build = dali_pipeline._build

    def recording(*arguments: Any) -> Any:
        assert num_alive(built) == 0
        pipeline = build(*arguments)
        built.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali_pipeline, "_build", recording)
    return built
