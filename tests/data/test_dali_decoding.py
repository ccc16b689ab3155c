"""Files that DALI decodes, and the pixels, on each kind of machine."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safer_fast.data import Data
from safer_fast.data.augmentation import Crop
from safer_fast.data.dali import pipeline, request
from safer_fast.data.dali.pipeline import why_no_dali
from safer_fast.data.images import fit
from tests.support.bad_images import BAD, REFUSED_BY_DALI, write_around
from tests.support.cases import named
from tests.support.pictures import (
    ONE_LINE,
    SIZES,
    SMALL,
    assert_same,
    differences,
    encode,
    load,
    load_photos,
    photo,
    whole,
    write,
)

pytest.importorskip("nvidia.dali")


IMAGE = photo(SMALL, SMALL)
GREY = IMAGE.convert("L")
PALETTE = IMAGE.quantize(64)
ALPHA = Image.fromarray((np.indices((SMALL, SMALL)).sum(0) * 2).astype(np.uint8))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
CMYK = Image.merge("CMYK", [*IMAGE.convert("CMYK").split()[:3], ALPHA])


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


DECODED = {
    "JPEG 4:4:4": encode(IMAGE, "jpeg", subsampling=0),
    "JPEG 4:2:2": encode(IMAGE, "jpeg", subsampling=1),
    "JPEG 4:2:0": encode(IMAGE, "jpeg", subsampling=2),
    "progressive JPEG": encode(IMAGE, "jpeg", progressive=True),
    "grey JPEG": encode(GREY, "jpeg"),
    "PNG": encode(IMAGE, "png"),
    "grey PNG": encode(GREY, "png"),
    "black and white PNG": encode(GREY.convert("1"), "png"),
    "palette PNG": encode(PALETTE, "png"),
    "lossless WEBP": encode(IMAGE, "webp", lossless=True),
    "lossy WEBP": encode(IMAGE, "webp", quality=80),
    "BMP": encode(IMAGE, "bmp"),
    "palette BMP": encode(PALETTE, "bmp"),
    "PPM": encode(IMAGE, "ppm"),
    "grey PPM": encode(GREY, "ppm"),
    "JPEG with a profile longer than a first look": encode(
        IMAGE, "jpeg", icc_profile=bytes(range(250)) * 600
    ),
    "JPEG with something after its end": encode(IMAGE, "jpeg") + b"more",
}
LIKE_TORCH = {
    "GIF": encode(PALETTE, "gif"),
    "TIFF": encode(IMAGE, "tiff"),
    "palette PNG with transparency": encode(PALETTE, "png", transparency=bytes(range(0, 256, 4))),
    "PNG with a transparent colour": encode(IMAGE, "png", transparency=(1, 2, 3)),
    "RGBA": encode(with_alpha(IMAGE), "png"),
    "LA": encode(with_alpha(GREY), "png"),
    "RGBA WEBP": encode(with_alpha(IMAGE), "webp", lossless=True),
    "CMYK": encode(CMYK, "jpeg", quality=90),
    "rotated JPEG": encode(IMAGE, "jpeg", exif=ROTATED),
    "several images": encode(IMAGE, "webp", lossless=True, save_all=True, append_images=[GREY]),
}


def read(path: Path, backend: str) -> Tensor:
    """All images in their own size, uint8 [N, C, S, S]."""
    data = load(path, backend, 2, augmentation="none", validation_fraction=0.3)
    assert whole(data).backend == backend
    batches = list(whole(data).epoch(1))
    return torch.cat([batch.images[: batch.num_images] for batch in batches])


def pixels_of(file: bytes, mode: str) -> Tensor:
    """The pixels decoded by PIL, [C, S, S]."""
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("file", DECODED.values(), ids=DECODED.keys())
def test_files_are_decoded_to_the_bits_of_pil(file: bytes, tmp_path: Path) -> None:
    colour = encode(photo(SMALL, SMALL, 1), "png")
    images = read(write(tmp_path, [file, colour, file, colour]), "dali")
    assert torch.equal(images[0], pixels_of(file, "RGB"))
    assert torch.equal(images[2], images[0])


@pytest.mark.parametrize("file", LIKE_TORCH.values(), ids=LIKE_TORCH.keys())
def test_files_that_leave_a_choice_come_out_as_the_torch_backend_makes_them(
    file: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, [file, encode(IMAGE, "png"), file])
    assert torch.equal(read(path, "dali"), read(path, "torch"))


def test_sets_of_grey_images_have_one_channel(tmp_path: Path) -> None:
    names = [name for name in DECODED if name.startswith(("grey", "black"))]
    files = [*(DECODED[name] for name in names), LIKE_TORCH["LA"]]
    path = write(tmp_path, files)
    images = read(path, "dali")
    assert images.shape == (len(files), 1, SMALL, SMALL)
    assert torch.equal(images, read(path, "torch"))
    assert torch.equal(images[0], pixels_of(files[0], "L"))


def test_grey_photos_are_cropped_and_resized_like_colour_ones(tmp_path: Path) -> None:
    images = (photo(*size).convert("L") for size in SIZES)
    path = write(tmp_path, (encode(image, "jpeg") for image in images))
    dali, plain = load_photos(path), load_photos(path, "torch")
    assert dali.num_channels == 1
    assert max(differences(dali.train.epoch(1), plain.train.epoch(1))) < 0.1
    assert max(differences(whole(dali).epoch(1), whole(plain).epoch(1))) < 0.1


def on_dali(data: Data) -> list[str]:
    """All notes but that validation images are those of training, which they are here."""
    return [line for line in data.notes if "holds the training images" not in line]


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    why_no_dali.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvidia.dali", None)
        yield
    why_no_dali.cache_clear()


@pytest.mark.usefixtures("no_dali")
def test_auto_takes_the_torch_backend_where_dali_is_not_installed(jpegs: Path) -> None:
    data = load_photos(jpegs, "auto", validation_path=str(jpegs))
    assert data.train.backend == data.validation.backend == "torch"
    note = f"DALI: off (it is not installed: {pipeline.INSTALL}); worker processes"
    (line,) = on_dali(data)
    assert line.startswith(note)


@pytest.mark.usefixtures("no_dali")
def test_dali_that_is_not_installed_is_named(jpegs: Path) -> None:
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        load_photos(jpegs)
    assert str(caught.value) == (
        f"data.backend: expected auto or torch, got dali: it is not installed: {pipeline.INSTALL}"
    )


def test_auto_takes_dali_where_it_is_installed(jpegs: Path) -> None:
    data = load_photos(jpegs, "auto", validation_path=str(jpegs))
    assert data.train.backend == "dali"
    assert on_dali(data) == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("first line\nno such driver\n", "no such driver"),
        ("no such driver\nCurrent pipeline object is no longer valid.", "no such driver"),
        ("", "RuntimeError"),
    ],
)
def test_a_dali_that_cannot_work_here_is_named_with_its_reason(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch, message: str, reason: str
) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(pipeline, "_build", failing)
    why_no_dali.cache_clear()
    try:
        data = load_photos(jpegs, "auto", validation_path=str(jpegs))
    finally:
        why_no_dali.cache_clear()
    assert data.train.backend == "torch"
    assert on_dali(data) == [f"DALI: off ({reason}); worker processes decode images"]


def test_arrays_are_not_for_dali(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20))
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        load(file)
    assert "data.backend: expected auto or torch, got dali: there are no image files" in str(
        caught.value
    )


def test_randaugment_is_not_for_dali(jpegs: Path) -> None:
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        load_photos(jpegs, randaugment=9)
    assert "got dali: RandAugment is the work of worker processes" in str(caught.value)
    data = load_photos(jpegs, "auto", randaugment=9)
    assert (data.train.backend, data.validation.backend) == ("torch", "dali")


REGIONS = [
    *SIZES,
    (256, 256),
    (300, 400),
    (375, 500),
    (500, 333),
    (97, 1000),
    (1000, 101),
    (73, 72),
]


@pytest.mark.parametrize("wanted", [32, 64, 65, 72, 224])
def test_the_region_that_a_gpu_resizes_is_the_one_that_fit_keeps(wanted: int) -> None:
    for size in REGIONS:
        with named(size):
            image = photo(*size)
            top, left, bottom, right = request._region(image.size, None, wanted)
            assert 0 <= top < bottom <= image.height
            assert 0 <= left < right <= image.width
            box = (left, top, right, bottom)
            found = image.resize((wanted, wanted), Image.Resampling.BILINEAR, box=box)
            difference = np.abs(np.asarray(found, float) - np.asarray(fit(image, wanted), float))
            assert difference.mean() < 1.5


def test_the_region_is_that_of_fit_for_every_size() -> None:
    """Ramps show where an image was cropped: fitted ramps are as long, and begin as far in."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(20, 700, 2).tolist()
        wanted = int(rng.choice([16, 64, 72, 224]))
        top, left, bottom, right = request._region((width, height), None, wanted)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        fitted = fit(torch.from_numpy(np.stack([y, x])), wanted)  # [2, S, S]
        # a pixel's value on a ramp is the place of its centre; the margins show the border
        inner = slice(wanted // 4, -(wanted // 4))
        centres = (torch.arange(wanted) + 0.5) / wanted
        rows = top + centres * (bottom - top) - 0.5
        columns = left + centres * (right - left) - 0.5
        tolerance = 0.02 + 1e-3 * max(height, width)
        torch.testing.assert_close(fitted[0, inner, 0], rows[inner], atol=tolerance, rtol=0)
        torch.testing.assert_close(fitted[1, 0, inner], columns[inner], atol=tolerance, rtol=0)


def test_the_region_of_a_crop_is_all_of_its_box() -> None:
    crop = Crop(5, 7, 30, 40, True)
    assert request._region((100, 90), crop, 72) == (0, 0, 30, 40)
    assert request._box((100, 90), crop) == (5, 7, 30, 40)
    assert request._box((100, 90), None) == (0, 0, 90, 100)
    assert request._region((72, 72), None, 72) == (0, 0, 72, 72)


def gpu(function: Any) -> Any:
    """A test that only a GPU can pass."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(function))


def load_on_gpu(path: Path, backend: Any) -> Data:
    return load_photos(path, backend, device=torch.device("cuda"))


@gpu
def test_training_batches_of_a_gpu_lie_there_and_are_those_of_the_torch_backend(
    jpegs: Path,
) -> None:
    dali, plain = load_on_gpu(jpegs, "dali").train, load_on_gpu(jpegs, "torch").train
    for epoch in (1, 2):
        batches = list(dali.epoch(epoch))
        assert all(batch.images.is_cuda and batch.labels.is_cuda for batch in batches)
        assert max(differences(batches, plain.epoch(epoch))) < 2


@gpu
def test_evaluation_batches_of_a_gpu_are_those_of_the_torch_backend(jpegs: Path) -> None:
    dali, plain = load_on_gpu(jpegs, "dali"), load_on_gpu(jpegs, "torch")
    assert max(differences(whole(dali).epoch(1), whole(plain).epoch(1))) < 1.5
    assert max(differences(dali.train.probe(12, 1), plain.train.probe(12, 1))) < 1.5


@gpu
def test_an_epoch_on_a_gpu_goes_on_at_any_batch_as_if_never_interrupted(jpegs: Path) -> None:
    loader = load_on_gpu(jpegs, "dali").train
    batches = list(loader.epoch(3))
    for start in (1, 4):
        assert_same(loader.epoch(3, start), batches[start:])
        assert_same(load_on_gpu(jpegs, "dali").train.epoch(3, start), batches[start:])


@gpu
def test_bad_images_on_a_gpu_are_left_out_and_what_dali_refuses_is_decoded_by_pil(
    tmp_path: Path,
) -> None:
    path = write_around(tmp_path, BAD["half a PNG"], REFUSED_BY_DALI["a PNG without its end"])
    settings: dict[str, Any] = {"bad_images": "skip", "device": torch.device("cuda")}
    dali, plain = (load_photos(path, kind, reported=[], **settings) for kind in ("dali", "torch"))
    found = differences(whole(dali).epoch(1), whole(plain).epoch(1))
    assert max(found) < 1.5
    assert dali.bad.take() == plain.bad.take() == 1


@gpu
def test_files_on_a_gpu_are_decoded_nearly_as_by_the_torch_backend(tmp_path: Path) -> None:
    files = DECODED | LIKE_TORCH
    path = write(tmp_path, files.values())
    settings: dict[str, Any] = {"augmentation": "none", "device": torch.device("cuda")}
    dali, plain = (load(path, backend, 1, **settings) for backend in ("dali", "torch"))
    found = differences(whole(dali).epoch(1), whole(plain).epoch(1))
    far = {name: levels for name, levels in zip(files, found, strict=True) if levels >= 2}
    assert far == {}
