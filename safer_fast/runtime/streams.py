"""Standard streams that are closed, or whose reader is gone, do not end a command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from typing import Any

_IS_LOST = (errno.EPIPE, errno.EIO)  # the reader of a pipe is gone, or a terminal


def secure_streams(outlives_reader: bool) -> None:
    """Make printing raise no OSError when a stream is closed or its reader is gone.

    Closed streams are opened on /dev/null, so that no file of the run gets their descriptor, and
    with it the output of libraries. outlives_reader: continue when the reader of standard output is
    gone; otherwise the process ends silently with the status of SIGPIPE, 141. Streams that were
    replaced are left alone.
    """
    for number in range(3):
        _open_if_closed(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _Secured(stream, outlives_reader or name == "stderr"))


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


class _Secured:
    """A stream that is redirected to /dev/null once its reader is gone."""

    def __init__(self, stream: Any, outlives_reader: bool) -> None:
        self._stream, self._outlives_reader = stream, outlives_reader

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno not in _IS_LOST:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()
        if not self._outlives_reader and not sys.is_finalizing():
            sys.exit(128 + signal.SIGPIPE)
