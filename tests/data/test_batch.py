"""Batches are resized on the device, image by image."""

import torch
from torchvision.transforms.v2 import functional

from safer_fast.data import Batch, as_pixels
from safer_fast.data.batch import resized


def batch(num_images: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(num_images), num_padding=1, position=7)


def test_images_are_resized_as_torchvision_does_with_antialiasing() -> None:
    whole = batch()
    whole.images[0], whole.images[1] = 0, 255
    smaller = resized(whole, 8)
    expected = functional.resize(as_pixels(whole.images), [8, 8], antialias=True)
    assert smaller.images.dtype == torch.float32
    assert torch.allclose(smaller.images, expected, atol=1e-6)
    assert 0 <= float(smaller.images.min()) <= float(smaller.images.max()) <= 1
    assert (smaller.num_padding, smaller.position) == (1, 7)
    assert torch.equal(smaller.labels, whole.labels)
    assert whole.images.shape == (5, 3, 12, 12)


def test_an_image_is_resized_alike_in_any_batch_and_as_bytes_or_pixels() -> None:
    whole = batch()
    pixels = Batch(as_pixels(whole.images), whole.labels)
    for other in (pixels, Batch(whole.images[3:4], whole.labels[3:4])):
        number = 3 if len(other.labels) == 5 else 0
        assert torch.equal(resized(whole, 8).images[3], resized(other, 8).images[number])


def test_without_a_size_a_batch_is_as_it_was() -> None:
    whole = batch()
    assert resized(whole, None) is whole
