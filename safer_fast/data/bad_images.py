"""Images that cannot be used: an error, or left out, counted and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from safer_fast.config.messages import printable

MOST_REPORTED = 10


class BadImages:
    """What is done about images that cannot be used, for all splits of a run.

    policy: error raises at the first one; skip leaves them out. report: told of every image that is
    left out, once, up to ten of them.
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

    def refuse(self, message: str) -> None:
        """Leaves out what `message` names, or raises it as ValueError, with what would help."""
        if self.policy == "error":
            raise ValueError(f"{message}; --data.bad_images skip leaves such images out")
        self._count += 1
        if message in self._known:
            return
        self._known.add(message)
        if len(self._known) <= MOST_REPORTED:
            self.report(f"left out: {printable(message)}")
        elif len(self._known) == MOST_REPORTED + 1:
            self.report("left out: more images, which are counted and no longer named")

    def say_once(self, message: str) -> None:
        """Reports what is no image but comes again with every epoch."""
        if message not in self._said:
            self._said.add(message)
            self.report(message)

    def take(self) -> int:
        """How many times an image was left out since this was last asked."""
        count, self._count = self._count, 0
        return count

    @property
    def num_different(self) -> int:
        """How many different images were left out so far."""
        return len(self._known)
