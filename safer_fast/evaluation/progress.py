"""How far an evaluation is: a bar on a terminal, a line now and then without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tqdm import tqdm

BETWEEN_LINES_S = 30.0
BETWEEN_REFRESHES_S = 1.0


@dataclass
class AttackTally:
    """One attack so far: images, those that are right, and what was measured in this process."""

    num_images: int = 0
    num_right: int = 0
    num_measured: int = 0
    seconds: float = 0.0


class ProgressDisplay:
    """Shows the accuracy under each attack so far, and when the evaluation will be done.

    num_images: all that come, of this process. say: shows a line. is_shown: whether this process
    is the one to tell. A context manager.
    """

    def __init__(
        self, names: list[str], num_images: int, say: Callable[[str], None], is_shown: bool = True
    ) -> None:
        self._standings = {name: AttackTally() for name in names}
        self._num_images, self._say, self._is_shown = num_images, say, is_shown
        is_terminal = is_shown and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        if is_terminal:
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            total = num_images * len(names)
            self._bar = tqdm(total=total, desc="evaluating", leave=False, bar_format=form)
        self._told = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, name: str, num_images: int, num_right: int, seconds: float | None) -> None:
        """So many images have been under the attack; seconds: None where that was known before."""
        standing = self._standings[name]
        standing.num_images += num_images
        standing.num_right += num_right
        if seconds is not None:
            standing.num_measured += num_images
            standing.seconds += seconds
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(num_images)
        self.tick()

    def tick(self) -> None:
        """Tells if it is time to; called as often as something moves on."""
        now, pause = time.monotonic(), BETWEEN_LINES_S if self._bar is None else BETWEEN_REFRESHES_S
        if not self._is_shown or now - self._told < pause:
            return
        self._told = now
        if self._bar is None:
            self._say(f"evaluating: {self.share_done:.0%}, {self._figures()}")
        else:
            self._bar.refresh()

    @property
    def share_done(self) -> float:
        """Images that have been under an attack, of all, counted for each attack."""
        done = sum(standing.num_images for standing in self._standings.values())
        return min(1.0, done / max(1, self._num_images * len(self._standings)))

    def seconds_left(self) -> float | None:
        """By what each attack took for an image so far; None until all have been measured."""
        left = 0.0
        for standing in self._standings.values():
            num_left = max(0, self._num_images - standing.num_images)
            if num_left and not standing.num_measured:
                return None
            left += num_left * standing.seconds / max(1, standing.num_measured)
        return left

    def _figures(self) -> str:
        left = self.seconds_left()
        words = [] if left is None else [f"{timedelta(seconds=round(left))} left"]
        words += [
            f"{name} {standing.num_right / standing.num_images:.3f} of {standing.num_images}"
            for name, standing in self._standings.items()
            if standing.num_images
        ]
        return ", ".join(words)
