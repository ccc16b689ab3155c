"""Running a command: a user's mistake ends it with one clear line and an exit status."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from safer_fast.config.doors import in_flags
from safer_fast.config.messages import as_line
from safer_fast.runtime.ranks import is_quiet
from safer_fast.runtime.streams import secure_streams


def run(main: Callable[[Sequence[str]], None], *, outlives_reader: bool = False) -> None:
    """Run a command; a user's mistake (ValueError, OSError) ends it with one line and status 2.

    outlives_reader: continue when the reader of standard output is gone.
    """
    secure_streams(outlives_reader)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (ValueError, OSError, FloatingPointError) as error:
        fail(in_flags(str(error)))
    except ImportError as error:
        if error.name != "safer_fast.kernels":  # its native library was built for another torch
            raise
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def import_all(*names: str) -> None:
    """Import modules without a search for garbage meanwhile, nor ever after in what they hold.

    torch and timm make a million objects that stay; searching them takes a quarter of their import.
    """
    if all(name in sys.modules for name in names):
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def fail(message: str) -> None:
    """Print one line on standard error, once for all ranks, and exit with status 2."""
    if not is_quiet():
        print("error: " + as_line(message), file=sys.stderr)
    sys.exit(2)
