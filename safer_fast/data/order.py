"""Which images come in which batch of which rank: decided by the seed and the epoch alone."""

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
    """How a loader goes through its images.

    batch_size: the most images of a batch, of all ranks together. augmentation: none, shift, crop
    or random-resized-crop; None makes an evaluation loader. multiple: every rank's part of a
    training batch is filled up to a multiple of this.
    """

    batch_size: int
    seed: int
    augmentation: str | None = None
    rank: int = 0
    num_ranks: int = 1
    multiple: int = 1


class RankShare(NamedTuple):
    """What a rank reads of one batch.

    position: where the first of `indices` stands in the order of all ranks together.
    """

    position: int
    indices: Indices


class OrderedLoader(ABC):
    """The order of images; subclasses read them. Satisfies `Loader`.

    An epoch is cut into the fewest batches of at most `batch_size` images, equal to within one
    image: none is dropped, none weighs much more than another, and filling all up to one size costs
    next to nothing. Ranks take consecutive parts of each batch, so that a batch is the same
    whatever their number. Images that do not fill a batch are one batch. Raises ValueError when
    there is no image. labels: the class of each image, by which a part of them is drawn; None where
    images have none of their own.
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
        largest = -(-num_images // len(self))
        part = -(-largest // ordering.num_ranks)
        self.batch_size = -(-part // ordering.multiple) * ordering.multiple

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
        order = self._permutation("order", number) if is_training else self._places(limit)
        parts = self._parts(np.array_split(order, len(self)), limit)[start:]
        batches = self._read_parts(parts, number if is_training else None, self.batch_size)
        # what was left out, or comes from where nobody fills up
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
        """The images of each index array, augmented as in `epoch` unless it is None.

        Images that cannot be read and are to be skipped are left out of their batch. Batches may be
        filled up to `size` already, where that saves a copy.
        """

    def _read_parts(
        self, parts: Sequence[RankShare], epoch: int | None, size: int
    ) -> Iterator[Batch]:
        """The images of each part, which know their position."""
        batches = self._read([part.indices for part in parts], epoch, size)
        for part, batch in zip(parts, batches, strict=True):
            yield replace(batch, position=part.position)

    def _parts(self, batches: Sequence[Indices], limit: int | None = None) -> list[RankShare]:
        """This rank's part of each batch that has some of the first `limit` images."""
        rank, num_ranks = self.ordering.rank, self.ordering.num_ranks
        parts, start = [], 0
        for batch in batches:
            if limit is not None and start >= limit:
                break
            counted = batch if limit is None else batch[: limit - start]
            # the first ranks have one image more where they do not have as many
            share, num_larger = divmod(len(counted), num_ranks)
            first = rank * share + min(rank, num_larger)
            last = first + share + (rank < num_larger)
            parts.append(RankShare(start + first, counted[first:last]))
            start += len(batch)
        return parts

    def _places(self, limit: int | None) -> Indices:
        """The order of evaluation: as the images lie, or a subset of all classes first."""
        if limit is None or limit >= self.num_images:
            return np.arange(self.num_images)
        return self._subset_first

    @cached_property
    def _subset_first(self) -> Indices:
        if self._classes is None:
            return np.arange(self.num_images)
        return fixed_order(self._classes)

    def _permutation(self, purpose: str, number: int) -> Indices:
        return make_permutation(self.num_images, self.seed, purpose, number)
