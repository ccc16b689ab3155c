"""Copies to the device that overlap the work on the batch before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from safer_fast.data.batch import Batch


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device, in order; on a GPU the next one is copied meanwhile.

    The copies run on a stream of their own, from pinned memory, and are waited for on the device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    previous: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        if batch.images.is_cuda:  # it was prepared there
            yield batch
            continue
        with torch.cuda.stream(stream):
            copied = batch.pinned().to(device, non_blocking=True)
            is_there = stream.record_event()
        if previous is not None:
            yield _ready(*previous)
        previous = copied, is_there
    if previous is not None:
        yield _ready(*previous)


def _ready(batch: Batch, is_there: torch.cuda.Event) -> Batch:
    """The batch, for the stream that goes on from here."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(is_there)
    batch.images.record_stream(stream)
    batch.labels.record_stream(stream)
    return batch
