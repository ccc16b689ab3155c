"""Order of images: the batches of each rank, determined by the seed and the epoch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from safer_fast.data.batch import Batch
from safer_fast.data.subset import Indices, Labels, draw, fixed_order
from safer_fast.runtime.seeds import make_permutation


@dataclass(frozen=True)
class Ordering:
    """Settings of the order in which a loader yields its images.

    batch_size: most images of a batch, over all ranks. augmentation: none, shift, crop or
    random-resized-crop; None makes an evaluation loader. multiple: the part of a training batch of
    every rank is filled up to a multiple of this.
    """

    batch_size: int
    seed: int
    augmentation: str | None = None
    rank: int = 0
    num_ranks: int = 1
    multiple: int = 1


class RankShare(NamedTuple):
    """The part of one batch that a rank reads.

    position: place of the first of `indices` in the order over all ranks.
    """

    position: int
    indices: Indices


class OrderedLoader(ABC):
    """Base of all loaders: determines the order of images, which subclasses read.

    An epoch is divided into the fewest batches of at most `batch_size` images, equal to within one
    image: no image is dropped, all weigh about the same, and padding to one size costs next to
    nothing. Ranks take consecutive parts of each batch, so that a batch does not depend on their
    number. Raises ValueError if there is no image. labels: the class of each image, for stratified
    subsets; None if images have none.
    """

    backend: str

    def __init__(self, num_images: int, ordering: Ordering, labels: Labels | None = None) -> None:
        self.num_images, self._classes = num_images, labels
        self.seed, self.augmentation = ordering.seed, ordering.augmentation
        if not num_images:
            raise ValueError(
                "data.path: expected an image that can be read in every split, got none"
            )
        self.ordering = replace(ordering, batch_size=min(ordering.batch_size, num_images))
        self.batch_size = self._part_of(-(-num_images // len(self)))

    @property
    def images_per_epoch(self) -> int:
        """See `Loader.images_per_epoch`."""
        return self.num_images

    @property
    def digest(self) -> str:
        """See `Loader.digest`."""
        content = np.array([self.num_images], dtype="<i8").tobytes()
        if self._classes is not None:
            content += np.ascontiguousarray(self._classes, dtype="<i8").tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def __len__(self) -> int:
        return -(-self.num_images // self.ordering.batch_size)

    def epoch(self, number: int, start: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """See `Loader.epoch`."""
        is_training = self.augmentation is not None
        parts = self._parts(self._batches(number, limit), limit)[start:]
        batches = self._read_parts(parts, number if is_training else None, self.batch_size)
        # images that were left out, or readers that do not fill up
        return (batch.padded(self.batch_size) for batch in batches)

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        """See `Loader.probe`."""
        order = self._permutation("probe", number)
        if self._classes is None:
            order = order[:num_images]
        else:
            order = draw(order, self._classes, num_images)
        ends = range(self.ordering.batch_size, len(order), self.ordering.batch_size)
        return self._read_parts(self._parts(np.split(order, ends)), None, 0)

    @abstractmethod
    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        """Yield the images of each index array, augmented for `epoch` unless it is None.

        Images that cannot be read and are to be skipped are left out of their batch. Batches may
        already be filled up to `size`, if that saves a copy.
        """

    def _batches(self, number: int, limit: int | None) -> list[Indices]:
        """Indices of the images of each batch of epoch `number`, over all ranks."""
        is_training = self.augmentation is not None
        order = self._permutation("order", number) if is_training else self._evaluation_order(limit)
        return np.array_split(order, len(self))

    def _part_of(self, num_images: int) -> int:
        """Number of images of a rank's part of a batch, padding included."""
        part = -(-num_images // self.ordering.num_ranks)
        return -(-part // self.ordering.multiple) * self.ordering.multiple

    def _read_parts(
        self, parts: Sequence[RankShare], epoch: int | None, size: int
    ) -> Iterator[Batch]:
        """Yield the images of each part as a batch with its position."""
        batches = self._read([part.indices for part in parts], epoch, size)
        for part, batch in zip(parts, batches, strict=True):
            yield replace(batch, position=part.position)

    def _parts(self, batches: Sequence[Indices], limit: int | None = None) -> list[RankShare]:
        """The part of this rank of each batch that has any of the first `limit` images."""
        rank, num_ranks = self.ordering.rank, self.ordering.num_ranks
        parts, start = [], 0
        for batch in batches:
            if limit is not None and start >= limit:
                break
            counted = batch if limit is None else batch[: limit - start]
            # images that do not divide evenly go to the first ranks
            share, num_larger = divmod(len(counted), num_ranks)
            first = rank * share + min(rank, num_larger)
            last = first + share + (rank < num_larger)
            parts.append(RankShare(start + first, counted[first:last]))
            start += len(batch)
        return parts

    def _evaluation_order(self, limit: int | None) -> Indices:
        """Order of evaluation: that of the data, or with a limit a stratified one."""
        if limit is None or limit >= self.num_images:
            return np.arange(self.num_images)
        return self._stratified_order

    @cached_property
    def _stratified_order(self) -> Indices:
        if self._classes is None:
            return np.arange(self.num_images)
        return fixed_order(self._classes)

    def _permutation(self, purpose: str, number: int) -> Indices:
        return make_permutation(self.num_images, self.seed, purpose, number)
