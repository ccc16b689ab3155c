"""Choice of the backend that loads a split: device, dali or torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from safer_fast.config.schema import DataConfig
from safer_fast.data.bad_images import BadImages
from safer_fast.data.dali.loader import DaliLoader
from safer_fast.data.dali.pipeline import PipelineSlot, why_no_dali
from safer_fast.data.formats import EncodedSource, Source
from safer_fast.data.formats.synthetic import SyntheticSource
from safer_fast.data.images import LARGEST_UNCROPPED_SIZE, ImageFormat, find_sizes
from safer_fast.data.loaders import CpuSetLoader, GpuSetLoader, StreamLoader, SyntheticLoader
from safer_fast.data.order import OrderedLoader, Ordering
from safer_fast.data.reading import decode_all
from safer_fast.data.subset import Indices

# Data sets of up to this many decoded bytes are held on the device.
MEMORY_LIMIT = 2**30


@dataclass
class Backends:
    """Makes the loaders of a run; they share the device, the bad images and one DALI pipeline.

    num_classes: of the data. notes: a line for each backend that `auto` prefers and cannot use.
    """

    config: DataConfig
    image_format: ImageFormat
    num_classes: int
    device: torch.device
    bad: BadImages
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, report = self.config, self.bad.report
        num_threads = max(1, config.num_workers)
        self.slot = PipelineSlot(
            self.device, self.image_format, num_threads, config.prefetch, report
        )

    def loader(self, source: Source, rows: Indices, ordering: Ordering) -> OrderedLoader:
        """Make a loader of these rows with the backend that `data.backend` names.

        auto: the first of device, dali and torch that can load them. Raises ValueError if the
        named backend cannot.
        """
        wanted = self.config.backend
        if wanted == "auto" and isinstance(source, SyntheticSource):
            return SyntheticLoader(
                len(rows), self.num_classes, self.image_format, ordering, self.device
            )
        candidates: dict[str, Callable[[], str]] = {
            "device": lambda: self._why_not_device(source, rows, ordering),
            "dali": lambda: self._why_not_dali(source, ordering),
            "torch": lambda: "",
        }
        for backend in [wanted] if wanted != "auto" else candidates:
            if not (reason := candidates[backend]()):
                return self._make(backend, source, rows, ordering)
            if wanted != "auto":
                raise ValueError(f"data.backend: expected auto or torch, got {wanted}: {reason}")
        raise AssertionError("torch loads everything")

    def _make(
        self, backend: str, source: Source, rows: Indices, ordering: Ordering
    ) -> OrderedLoader:
        config = self.config
        if backend == "dali":
            assert isinstance(source, EncodedSource)
            return DaliLoader(source, rows, ordering, self.slot, self.bad)
        if backend == "torch":
            return StreamLoader(
                source,
                rows,
                self.image_format,
                ordering,
                self.bad,
                num_workers=config.num_workers,
                prefetch=config.prefetch,
                randaugment=config.randaugment,
            )
        images, labels = decode_all(source, rows, self.image_format, self.bad, config.num_workers)
        if self.device.type == "cpu":
            return CpuSetLoader(images, labels, ordering)
        return GpuSetLoader(images, labels, ordering, self.device)

    def _why_not_device(self, source: Source, rows: Indices, ordering: Ordering) -> str:
        """Reason against holding this set decoded on the device; empty if there is none."""
        size, is_training = self.image_format.size, ordering.augmentation is not None
        if ordering.augmentation == "random-resized-crop":
            return "random-resized-crop needs images in their own size"
        if is_training and self.config.randaugment:
            return "RandAugment is the work of worker processes"
        if len(rows) * self.image_format.num_channels * size * size > MEMORY_LIMIT:
            return f"the set takes more than {MEMORY_LIMIT / 2**30:g} GiB when it is decoded"
        if size > LARGEST_UNCROPPED_SIZE and set(find_sizes([source])) != {(size, size)}:
            return "large images of other sizes are resized when they are needed"
        return ""

    def _why_not_dali(self, source: Source, ordering: Ordering) -> str:
        if not isinstance(source, EncodedSource):
            return "there are no image files to decode"
        if ordering.augmentation is not None and self.config.randaugment:
            return "RandAugment is the work of worker processes"
        if reason := why_no_dali(self.device):
            note = f"DALI: off ({reason}); worker processes decode images"
            self.notes += [note] if note not in self.notes else []
        return reason
