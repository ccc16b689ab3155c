"""Batches decoded by NVIDIA DALI, in the order and with the crops of the other loaders.

DALI draws no random numbers and keeps no order here: each request names the part of each file to
decode. Its pipeline therefore has no state to save, and an epoch can start at any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from safer_fast.data.augmentation import PADDING, Crop, DeviceDraws, draw, draw_crop
from safer_fast.data.bad_images import BadImages
from safer_fast.data.batch import Batch
from safer_fast.data.dali.pipeline import DecodingRun, PipelineSlot
from safer_fast.data.dali.request import Request, as_file
from safer_fast.data.formats import EncodedSource
from safer_fast.data.images import (
    BadImageError,
    centre,
    check_size,
    decode,
    open_encoded,
    read_encoded,
)
from safer_fast.data.order import OrderedLoader, Ordering
from safer_fast.data.reading import Reader, Samples, usable
from safer_fast.data.subset import Indices
from safer_fast.runtime.seeds import derive_seed

# Formats that DALI decodes to the same bits as PIL on a CPU (tested); others are decoded by PIL.
FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "PPM"}
END_OF_JPEG = b"\xff\xd9"


class DaliLoader(OrderedLoader):
    """Decodes parts of image files with DALI.

    On a GPU DALI decodes and resizes, with antialias. On a CPU it decodes, bit-identical to PIL,
    and torchvision resizes the tensors, to within two levels of 255 of its result on PIL images:
    DALI's own resizing takes four times as long there (bench/README.md). A batch that DALI cannot
    decode is decoded by PIL.
    """

    backend = "dali"

    def __init__(
        self,
        source: EncodedSource,
        rows: Indices,
        ordering: Ordering,
        slot: PipelineSlot,
        bad: BadImages,
    ) -> None:
        super().__init__(len(rows), ordering, source.labels[rows])
        self.source, self.rows, self.slot, self.bad = source, rows, slot, bad
        self._sizes = np.zeros((len(rows), 2), dtype=np.int32)

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        crop_seed = None
        if epoch is not None and self.augmentation == "random-resized-crop":
            crop_seed = derive_seed(self.seed, "augmentation", epoch)
        augment = self._augmentation(epoch)
        run: DecodingRun | None = None
        try:
            for position, indices in enumerate(batches):
                try:
                    if run is None or self.slot.run is not run:
                        # at the first batch, and if another loader has used the slot since
                        run = self._start(batches[position:], crop_seed, size)
                    samples = run.next_batch()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    run = None
                    samples = self._read_by_pil(indices, crop_seed, error)
                # only now: requests are made in advance, and again when a pipeline restarts
                samples = usable(samples, self.bad)
                batch = samples.batch()
                yield batch if augment is None else augment(batch, samples.indices)
        finally:
            if run is not None and self.slot.run is run:
                self.slot.clear()

    def _start(self, batches: Sequence[Indices], crop_seed: int | None, size: int) -> DecodingRun:
        requests = (self._request(indices, crop_seed, size) for indices in batches)
        return self.slot.start(requests, max(1, *map(len, batches)))

    def _request(self, indices: Indices, crop_seed: int | None, size: int) -> Request:
        request = Request(self.slot.image_format, size)
        for index in indices.tolist():
            try:
                self._add(request, index, crop_seed)
            except BadImageError as error:
                request.faults.append(error)
        return request

    def _add(self, request: Request, index: int, crop_seed: int | None) -> None:
        """Add one image to a request; raises BadImageError if its header or end is damaged."""
        row = int(self.rows[index])
        size = (int(self._sizes[index, 0]), int(self._sizes[index, 1]))
        if size != (0, 0):
            file = read_encoded(self.source, row)
        else:
            file, size = self._look(index, row)
        if crop_seed is None:
            crop = _unresized_centre(size, request.image_format.size)
        else:
            crop = draw_crop(*size, crop_seed, index)
        request.add(file, size, crop, index, int(self.source.labels[row]))

    def _look(self, index: int, row: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """File for DALI to decode, and width and height of the image.

        The size is remembered if the file is the original one; other files are decoded by PIL.
        """
        image_format = self.slot.image_format
        file, image = open_encoded(self.source, row)
        check_size(image, self.source, row, image_format)
        if not _is_decoded_alike(image, file):
            return as_file(decode(self.source, row, image_format)), image.size
        self._sizes[index] = image.size
        return file, image.size

    def _read_by_pil(self, indices: Indices, crop_seed: int | None, error: RuntimeError) -> Samples:
        """Decode with PIL a batch that DALI failed on."""
        self.slot.clear()
        reader = Reader(self.source, self.rows, self.slot.image_format, crop_seed=crop_seed)
        samples = reader.__getitems__(indices.tolist())
        if isinstance(samples, ValueError):
            raise samples
        self.slot.report_failure(error)
        images, labels = (t.to(self.slot.device) for t in (samples.images, samples.labels))
        return samples._replace(images=images, labels=labels)

    def _augmentation(self, epoch: int | None) -> Callable[[Batch, Indices], Batch] | None:
        """Crops and flips of small images in an epoch; None with any other augmentation."""
        if epoch is None or self.augmentation not in PADDING:
            return None
        drawn = draw(self.augmentation, self.num_images, self.seed, epoch)
        draws = DeviceDraws(drawn, self.slot.device)

        def augment(batch: Batch, indices: Indices) -> Batch:
            padded = functional.pad(batch.images[: len(indices)], [draws.padding] * 4)
            images = draws.augment(padded, torch.from_numpy(indices).to(padded.device))
            return Batch(images, batch.labels[: len(indices)])

        return augment


def _is_decoded_alike(image: Image.Image, file: NDArray[np.uint8]) -> bool:
    """True if DALI decodes an image to the same pixels as PIL, and notices the same damage."""
    codec, *_, layout = next(iter(getattr(image, "tile", ())), ("", ""))
    if image.format == "JPEG":  # DALI rounds CMYK differently
        return image.mode != "CMYK" and file[-2:].tobytes() == END_OF_JPEG
    if image.format == "PPM":  # other decoders: values as text, or with another maximum than 255
        return bool(codec == "raw")
    # PNG with 16 bits per channel, which PIL truncates and DALI rounds; BMP with 15 or 16 per pixel
    return image.format in FORMATS and not any(bits in str(layout) for bits in (";15", ";16"))


def _unresized_centre(size: tuple[int, int], wanted: int) -> Crop | None:
    """The centre crop of `fit` if it needs no resizing, so that only it is decoded; else None."""
    *resized, top, left = centre(size, wanted)
    return Crop(top, left, wanted, wanted, False) if tuple(resized) == size else None
