"""Running a command: a user's mistake ends it with one clear line and an exit status."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from safer_fast.config.doors import in_flags
from safer_fast.config.messages import as_line
from safer_fast.runtime.ranks import is_quiet
from safer_fast.runtime.signals import ending_at_once
from safer_fast.runtime.streams import secure_streams


def run(main: Callable[[Sequence[str]], None], *, outlives_reader: bool = False) -> None:
    """Run a command; a user's mistake (ValueError, OSError) ends it with one line and status 2.

    outlives_reader: continue when the reader of standard output is gone.
    """
    secure_streams(outlives_reader)
    try:
        with ending_at_once(numbers=[signal.SIGTERM]):  # SIGINT raises KeyboardInterrupt
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
        freeze()
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Freeze what garbage is looked for in, and keep Triton silent about it at the end."""
    gc.freeze()
    atexit.unregister(drop_defaults_of_triton)
    atexit.register(drop_defaults_of_triton)


def drop_defaults_of_triton() -> None:
    """Remove the methods of Triton 3.9 whose default arguments are objects of its own.

    Frozen, they outlive the interpreter, and Triton's bindings would print dozens of lines about
    them. To search for garbage once more at the end would take seconds.
    """
    for name in [name for name in sys.modules if name.startswith("triton._C.")]:
        for kind in [kind for kind in vars(sys.modules[name]).values() if isinstance(kind, type)]:
            for method, function in list(vars(kind).items()):
                if any(map(_has_own_default, getattr(function, "__nb_signature__", ()))):
                    delattr(kind, method)


def _has_own_default(signature: Sequence[Any]) -> bool:
    """Tell whether a default argument of a binding is an object of Triton's extension."""
    defaults = signature[2] if len(signature) > 2 else None
    return any(type(each).__module__.startswith("triton._C.") for each in defaults or ())


def fail(message: str) -> None:
    """Print one line on standard error, once for all ranks, and exit with status 2."""
    if not is_quiet():
        print("error: " + as_line(message), file=sys.stderr)
    sys.exit(2)
