"""Data: `load_data` opens, checks and decodes; loaders give batches of uint8 images."""

from safer_fast.data.batch import Batch, Loader, as_pixels
from safer_fast.data.load import Data, load_data, load_evaluation_data
from safer_fast.data.mixing import Mixing
from safer_fast.data.prefetch import ahead
from safer_fast.data.subset import describe_subset

__all__ = [
    "Batch",
    "Data",
    "Loader",
    "Mixing",
    "ahead",
    "as_pixels",
    "describe_subset",
    "load_data",
    "load_evaluation_data",
]
