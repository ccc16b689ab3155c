"""Reading batches of images from a source, in worker processes or in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from safer_fast.data.augmentation import Draws, augment, draw_crop, pad
from safer_fast.data.bad_images import BadImages
from safer_fast.data.batch import Batch
from safer_fast.data.formats import Source
from safer_fast.data.images import BadImageError, ImageFormat, crop_to, decode, fit
from safer_fast.data.subset import Indices
from safer_fast.data.workers import start_loader
from safer_fast.runtime.machine_errors import machine_error
from safer_fast.runtime.micro_batch import fill_
from safer_fast.runtime.seeds import derive_seed

# Small, because workers return images in shared memory, of which containers have little.
BYTES_PER_TASK = 2**20
TASKS_PER_WORKER = 8
NUM_RANDOM_OPERATIONS = 2


class Samples(NamedTuple):
    """Images that were read, and the faults of those left out.

    images: uint8 [B, C, S, S]. labels: int64 [B]. indices: int64 [N], the indices of the first N
    images; the others are padding. faults: an error of one line for each image left out; its cause
    is lost on the way from a worker process.
    """

    images: Tensor
    labels: Tensor
    indices: Indices
    faults: list[ValueError]

    def batch(self) -> Batch:
        """The images and labels as a batch."""
        return Batch(self.images, self.labels, len(self.labels) - len(self.indices))


def read_batches(
    reader: Reader,
    batches: Sequence[Indices],
    bad: BadImages,
    num_workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Samples]:
    """Yield the images of each index array, in order.

    Bad images that `bad` does not raise are left out of their batch. Raises ValueError naming an
    image that cannot be used, or the setting if worker processes die.
    """
    num_workers = min(num_workers, len(batches))
    lists = [indices.tolist() for indices in batches]
    loader = start_loader(reader, lists, num_workers, prefetch, pin_memory, bad.say_once)
    for samples in loader:
        yield usable(samples, bad)


def usable(samples: Samples | ValueError, bad: BadImages) -> Samples:
    """Report the bad images to `bad` and return the samples; raise them if they are an error."""
    if isinstance(samples, ValueError):
        raise samples
    for fault in samples.faults:
        bad.refuse(fault)
    return samples


def decode_all(
    source: Source, rows: Indices, image_format: ImageFormat, bad: BadImages, num_workers: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode all images of `rows` to one array [N, C, S, S] with labels [N], except those left out.

    Raises ValueError naming the first image that cannot be used. Large sets are decoded by
    processes: for images this small, threads wait for the interpreter more than they decode.
    """
    size = image_format.size
    try:
        images = np.empty((len(rows), image_format.num_channels, size, size), dtype=np.uint8)
    except MemoryError as error:
        raise machine_error(error, source.flag, f"{len(rows)} decoded images") or error from error
    labels = np.empty(len(rows), dtype=np.int64)
    images_per_task = max(1, BYTES_PER_TASK // images[0].nbytes)
    batches = np.split(np.arange(len(rows)), range(images_per_task, len(rows), images_per_task))
    num_workers = min(num_workers, len(batches) // TASKS_PER_WORKER)
    end = 0
    reader = Reader(source, rows, image_format)
    for samples in read_batches(reader, batches, bad, num_workers):
        start, end = end, end + len(samples.indices)
        read = slice(len(samples.indices))
        images[start:end], labels[start:end] = samples.images[read], samples.labels[read]
    return images[:end], labels[:end]


class Reader(Dataset[Any]):
    """Reads whole batches, requested by DataLoader's workers through `__getitems__`.

    size: batches are filled up to this many images. draws: crops and flips of batches. crop_seed:
    seed of random resized crops and flips, drawn with the image's index; None: images are resized
    by `fit`. randaugment: magnitude, drawn with `random_seed` and the image's index; 0: none.
    """

    def __init__(
        self,
        source: Source,
        rows: Indices,
        image_format: ImageFormat,
        size: int = 0,
        draws: Draws | None = None,
        crop_seed: int | None = None,
        randaugment: int = 0,
        random_seed: int = 0,
    ) -> None:
        self.source, self.rows, self.image_format, self.size = source, rows, image_format, size
        self.draws, self.crop_seed, self.random_seed = draws, crop_seed, random_seed
        self.randaugment = None
        if randaugment:
            grey = [128] * image_format.num_channels
            self.randaugment = v2.RandAugment(NUM_RANDOM_OPERATIONS, randaugment, fill=grey)

    def __getitems__(self, indices: list[int]) -> Samples | ValueError:
        """Read images, labels and faults of bad images; any other error is returned.

        An error is returned and not raised, because DataLoader would re-raise it as a page of
        traceback.
        """
        try:
            return self._read_all(indices)
        except (OSError, MemoryError) as error:
            where = f"a batch with {self.source.describe(int(self.rows[indices[0]]))}"
            return machine_error(error, self.source.flag, where) or ValueError(str(error))

    def _read_all(self, indices: list[int]) -> Samples | ValueError:
        num_channels, edge = self.image_format.num_channels, self.image_format.size
        num_slots = max(self.size, len(indices))
        images = np.empty((num_slots, num_channels, edge, edge), dtype=np.uint8)
        read: list[int] = []
        faults: list[ValueError] = []
        for index in indices:
            try:
                images[len(read)] = _channels_first(self._read(index))
                read.append(index)
            except BadImageError as error:
                faults.append(error)
            except ValueError as error:
                return ValueError(str(error))
        known = np.array(read, dtype=np.int64)
        if self.draws is not None and read:
            padded = pad(images[: len(read)], self.draws.padding)
            images[: len(read)] = augment(padded, np.arange(len(read)), self.draws, known)
        labels = torch.empty(num_slots, dtype=torch.int64)
        labels[: len(read)] = torch.from_numpy(self.source.labels[self.rows[known]])
        pixels = fill_(torch.from_numpy(images), len(read))
        return Samples(pixels, fill_(labels, len(read)), known, faults)

    def _read(self, index: int) -> Image.Image:
        image = decode(self.source, int(self.rows[index]), self.image_format)
        size = self.image_format.size
        if self.crop_seed is None:
            image = fit(image, size)
        else:
            image = crop_to(image, draw_crop(*image.size, self.crop_seed, index), size)
        return image if self.randaugment is None else self._augmented(image, index)

    def _augmented(self, image: Image.Image, index: int) -> Image.Image:
        """Apply torchvision's RandAugment (Cubuk et al., 2020), which draws from torch's global
        generator: seeded for it, then restored."""
        assert self.randaugment is not None
        # only the CPU's generator: torch.manual_seed would reseed the GPU's too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.random_seed, "image", index))
            augmented: Image.Image = self.randaugment(image)
        return augmented


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels [C, S, S]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
