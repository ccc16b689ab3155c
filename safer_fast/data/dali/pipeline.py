"""A DALI pipeline that decodes requested parts of image files, some batches in advance."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safer_fast.data.dali.request import Request
from safer_fast.data.images import ImageFormat
from safer_fast.data.reading import Samples
from safer_fast.runtime.micro_batch import fill_

END_OF_ERROR = "pipeline object is no longer valid"
INSTALL = "pip install nvidia-dali-cuda130"


@functools.cache
def why_no_dali(device: torch.device) -> str:
    """Reason why DALI does not decode for `device`; empty if it does."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return f"it is not installed: {INSTALL}"
    try:
        slot = PipelineSlot(device, ImageFormat(8, 3))
        slot.start(iter([Request(slot.image_format)]), 1).next_batch()
    except Exception as error:  # for example an old driver or a missing library
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    """The line of a DALI error with the reason, the last one before its closing lines."""
    lines = [line for line in str(error).splitlines() if line.strip() and END_OF_ERROR not in line]
    return lines[-1].strip() if lines else type(error).__name__


class PipelineSlot:
    """Holds the only live pipeline of a run: the memory of several would add up.

    image_format: of all batches. num_threads: threads that decode. prefetch: batches decoded in
    advance. report: receives a line when DALI fails.
    """

    def __init__(
        self,
        device: torch.device,
        image_format: ImageFormat,
        num_threads: int = 1,
        prefetch: int = 1,
        report: Callable[[str], None] = print,
    ) -> None:
        self.device, self.image_format = device, image_format
        self.num_threads, self.prefetch, self.report = num_threads, prefetch, report
        self.run: DecodingRun | None = None
        self._has_failed = False

    def report_failure(self, error: RuntimeError) -> None:
        """Report, the first time only, that DALI could not decode a batch."""
        if not self._has_failed:
            self.report(f"note:       DALI failed on a batch, PIL decoded it ({_reason(error)})")
        self._has_failed = True

    def start(self, requests: Iterator[Request], batch_size: int) -> DecodingRun:
        """End the current pipeline and start one for requests of at most `batch_size` images."""
        self.clear()
        self.run = DecodingRun(requests, batch_size, self)
        return self.run

    def clear(self) -> None:
        """End the pipeline, if there is one."""
        if self.run is not None:
            self.run.pipeline = None
        self.run = None


class DecodingRun:
    """A pipeline that works through requests, some batches in advance."""

    def __init__(self, requests: Iterator[Request], batch_size: int, slot: PipelineSlot) -> None:
        self.device = slot.device
        self._waiting: deque[Request] = deque()
        self._last: Request | None = None

        def inputs() -> Iterator[tuple[Any, ...]]:
            for request in requests:
                self._waiting.append(request)
                on_gpu = request.regions() if slot.device.type == "cuda" else ()
                yield request.boxes() + on_gpu

        self.pipeline: Any = _build(inputs(), batch_size, slot)

    def next_batch(self) -> Samples:
        """Return the images of the next request, on the device.

        Raises RuntimeError if DALI cannot decode it.
        """
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
        (output,) = self.pipeline.run(stream)
        request = self._waiting.popleft()
        # DALI reads the files in place, on a GPU possibly until now: keep them for one more batch
        self._last = request
        labels = torch.tensor(request.labels, dtype=torch.int64)
        indices = np.array(request.indices, dtype=np.int64)
        if stream is None:
            images = request.finish(output)
            labels = fill_(labels.resize_(len(images)), len(indices))
        else:
            images = _copied(output, stream)[: len(labels)]
            labels = labels.to(self.device, non_blocking=True)
        return Samples(images, labels, indices, request.faults)


def _build(inputs: Iterator[tuple[Any, ...]], batch_size: int, slot: PipelineSlot) -> Any:
    """Build a pipeline; its output is uint8 [B, C, S, S] on a GPU, boxes [H, W, C] on a CPU."""
    from nvidia.dali import Pipeline, fn, types

    is_cuda, index = slot.device.type == "cuda", slot.device.index
    size, num_channels = slot.image_format.size, slot.image_format.num_channels
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=slot.num_threads,
        device_id=torch.cuda.current_device() if is_cuda and index is None else index,
        prefetch_queue_depth=slot.prefetch,
    )
    with pipeline:
        files, corner, extent, *regions = fn.external_source(
            source=inputs, num_outputs=6 if is_cuda else 3, batch=True, no_copy=True
        )
        images = fn.decoders.image_slice(
            files,
            start=corner,
            shape=extent,
            axis_names="HW",
            output_type=types.GRAY if num_channels == 1 else types.RGB,
            # as PIL, whose image sizes the boxes refer to
            adjust_orientation=False,
            device="mixed" if is_cuda else "cpu",
        )
        if is_cuda:
            start, end, flips = regions
            images = fn.resize(images, size=[size, size], roi_start=start, roi_end=end)
            images = fn.crop_mirror_normalize(
                images,
                mirror=flips,
                dtype=types.UINT8,
                output_layout="CHW",
                mean=[0.0] * num_channels,
                std=[1.0] * num_channels,
            )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _copied(output: Any, stream: torch.cuda.Stream) -> Tensor:
    """Copy DALI's images on the GPU to memory of torch."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    images = output.as_tensor()
    copied = torch.empty(images.shape(), dtype=torch.uint8, device=stream.device)
    feed_ndarray(images, copied, cuda_stream=stream)
    return copied
