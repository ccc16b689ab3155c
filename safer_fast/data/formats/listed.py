"""Labels and class names that datasets of torch and torchvision list beside their items."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def listed_labels(dataset: Any) -> NDArray[np.int64] | None:
    """Labels in an attribute of a dataset of torch or torchvision; None if there is none."""
    if isinstance(dataset, Subset):
        known = listed_labels(dataset.dataset)
        return None if known is None else known[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [listed_labels(part) for part in dataset.datasets]
        whole = [part for part in parts if part is not None]
        return np.concatenate(whole) if len(whole) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    for name in ("targets", "labels"):
        if (values := getattr(dataset, name, None)) is not None:
            return _integers(values)
    return None


def _integers(values: Any) -> NDArray[np.int64] | None:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim == 1 else None


def listed_names(dataset: Any) -> list[str] | None:
    """Names of the classes where a dataset lists them, as torchvision's do."""
    if isinstance(dataset, Subset):
        return listed_names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = [listed_names(part) for part in dataset.datasets]
        return found[0] if all(names == found[0] for names in found) else None
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names and all(isinstance(item, str) for item in names):
        return list(names)
    return None
