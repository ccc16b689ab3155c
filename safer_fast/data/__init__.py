"""Data loading: `load_data` opens and checks data sets; loaders yield batches of uint8 images."""

from safer_fast.data.batch import Batch, Loader, as_pixels
from safer_fast.data.load import Data, load_data, load_evaluation_data, load_own_split
from safer_fast.data.mixing import Mixing
from safer_fast.data.prefetch import prefetch_to_device
from safer_fast.data.subset import describe_subset

__all__ = [
    "Batch",
    "Data",
    "Loader",
    "Mixing",
    "as_pixels",
    "describe_subset",
    "load_data",
    "load_evaluation_data",
    "load_own_split",
    "prefetch_to_device",
]
