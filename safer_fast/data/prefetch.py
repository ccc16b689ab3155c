"""Copies of batches to the device, overlapping with the work on the previous batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from safer_fast.data.batch import Batch


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device, in order; on a GPU the next one is copied meanwhile.

    Copies run from pinned memory on a separate stream; the device waits for them, the host does
    not.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    previous: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        if batch.images.is_cuda:  # prepared on the device
            yield batch
            continue
        with torch.cuda.stream(stream):
            copied = batch.pinned().to(device, non_blocking=True)
            copied_event = stream.record_event()
        if previous is not None:
            yield _ready(*previous)
        previous = copied, copied_event
    if previous is not None:
        yield _ready(*previous)


def _ready(batch: Batch, copied_event: torch.cuda.Event) -> Batch:
    """The batch, made safe for use on the current stream."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied_event)
    batch.images.record_stream(stream)
    batch.labels.record_stream(stream)
    return batch
