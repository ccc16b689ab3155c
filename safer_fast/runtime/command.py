"""Commands: run with one clear line and an exit status for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from safer_fast.config.messages import as_line
from safer_fast.runtime.ranks import is_quiet
from safer_fast.runtime.streams import secure_streams


def run(main: Callable[[Sequence[str]], None], *, goes_on: bool = False) -> None:
    """Runs a command; a user's mistake (ValueError, OSError) ends it with one line, status 2.

    goes_on: also when nobody reads what it prints any more.
    """
    secure_streams(goes_on)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> None:
    """Prints one line on standard error, once for ranks that all see it; exits with status 2."""
    if not is_quiet():
        print("error: " + as_line(message), file=sys.stderr)
    sys.exit(2)
