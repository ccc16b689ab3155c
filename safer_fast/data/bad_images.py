"""Images that cannot be used: they raise an error, or are left out, counted and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from safer_fast.config.messages import printable

MOST_REPORTED = 10


class BadImages:
    """Handles images that cannot be used, for all splits of a run.

    policy: error raises at the first one; skip leaves them out. report: receives a line for each
    image that is left out, once, for up to ten of them.
    """

    def __init__(
        self,
        policy: Literal["error", "skip"] = "error",
        report: Callable[[str], None] = print,
    ) -> None:
        self.policy, self.report = policy, report
        self._count = 0
        self._known: set[str] = set()
        self._said: set[str] = set()

    def refuse(self, fault: str | ValueError) -> None:
        """Count and report a bad image, or raise its fault as ValueError with a remedy."""
        message = str(fault)
        if self.policy == "error":
            cause = fault.__cause__ if isinstance(fault, ValueError) else None
            raise ValueError(f"{message}; --data.bad_images skip leaves such images out") from cause
        self._count += 1
        if message in self._known:
            return
        self._known.add(message)
        if len(self._known) <= MOST_REPORTED:
            self.report(f"left out: {printable(message)}")
        elif len(self._known) == MOST_REPORTED + 1:
            self.report("left out: more images, which are counted and no longer named")

    def say_once(self, message: str) -> None:
        """Report a message that would recur every epoch, the first time only."""
        if message not in self._said:
            self._said.add(message)
            self.report(message)

    def take(self) -> int:
        """Return how often an image was left out since the previous call, and reset the count."""
        count, self._count = self._count, 0
        return count

    @property
    def num_different(self) -> int:
        """Number of different images left out so far."""
        return len(self._known)
