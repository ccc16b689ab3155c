"""Correct predictions: one definition for training, evaluations, audits and benchmarks."""

from __future__ import annotations

from torch import Tensor


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose class, or most probable class, the logits [B, K] put first; bool [B].

    A row of logits with a NaN or an infinity is never right: argmax takes the first NaN for the
    largest. Nothing waits for the device.
    """
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    logits = logits.detach()
    return (logits.argmax(1) == classes) & has_finite(logits)


def has_finite(logits: Tensor) -> Tensor:
    """Images all of whose logits [B, K] are finite; bool [B]."""
    return logits.detach().isfinite().all(1)
