"""Imports all that commands import, for processes that are forked to run them.

Garbage is not looked for meanwhile, which takes a third of the time, nor ever after in what was
imported, which would copy that memory into each process that is forked.
"""

import gc
import importlib
import pkgutil
from contextlib import suppress

from PIL import Image

import safer_fast
from safer_fast.config.command_line import parse_config
from safer_fast.config.conversion import converted
from safer_fast.runtime.command import freeze

gc.disable()
NAMES = [
    *(found.name for found in pkgutil.walk_packages(safer_fast.__path__, "safer_fast.")),
    "docstring_parser",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "nvidia.dali.pipeline",
    "nvidia.dali.plugin.pytorch",
    "pyarrow.parquet",
    "sklearn.datasets",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
    "yaml",
]
for name in NAMES:
    with suppress(ImportError):
        importlib.import_module(name)
Image.init()

converted(parse_config([]))  # makes the parsers
freeze()
gc.enable()
