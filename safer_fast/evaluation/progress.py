"""Progress of an evaluation: a bar on a terminal, a line now and then without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from safer_fast.runtime.terminal import progress_bar, shows_bars

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
    """Display of the accuracy under each attack so far, and of the time that is left.

    num_images: all that come, of this process. say: shows a line. is_shown: this process
    shows it. A context manager.
    """

    def __init__(
        self, names: list[str], num_images: int, say: Callable[[str], None], is_shown: bool = True
    ) -> None:
        self._tallys = {name: AttackTally() for name in names}
        self._num_images, self._say, self._is_shown = num_images, say, is_shown
        self._bar: tqdm[Any] | None = None
        if is_shown and shows_bars():
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            total = num_images * len(names)
            self._bar = progress_bar(total=total, desc="evaluating", bar_format=form)
        self._shown_at = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, name: str, num_images: int, num_right: int, seconds: float | None) -> None:
        """Count images that have been under the attack; seconds: None if measured earlier."""
        tally = self._tallys[name]
        tally.num_images += num_images
        tally.num_right += num_right
        if seconds is not None:
            tally.num_measured += num_images
            tally.seconds += seconds
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(num_images)
        self.tick()

    def tick(self) -> None:
        """Show the figures if the last time was long enough ago; call it as often as possible."""
        now, pause = time.monotonic(), BETWEEN_LINES_S if self._bar is None else BETWEEN_REFRESHES_S
        if not self._is_shown or now - self._shown_at < pause:
            return
        self._shown_at = now
        if self._bar is None:
            self._say(f"evaluating: {self.share_done:.0%}, {self._figures()}")
        else:
            self._bar.refresh()

    @property
    def share_done(self) -> float:
        """Share of the images that have been under an attack, over all attacks."""
        done = sum(tally.num_images for tally in self._tallys.values())
        return min(1.0, done / max(1, self._num_images * len(self._tallys)))

    def seconds_left(self) -> float | None:
        """Estimate from the time of each attack for an image; None until all have been measured."""
        left = 0.0
        for tally in self._tallys.values():
            num_left = max(0, self._num_images - tally.num_images)
            if num_left and not tally.num_measured:
                return None
            left += num_left * tally.seconds / max(1, tally.num_measured)
        return left

    def _figures(self) -> str:
        left = self.seconds_left()
        words = [] if left is None else [f"{timedelta(seconds=round(left))} left"]
        words += [
            f"{name} {tally.num_right / tally.num_images:.3f} of {tally.num_images}"
            for name, tally in self._tallys.items()
            if tally.num_images
        ]
        return ", ".join(words)
