"""Schedule of image sizes in training: smaller images first, the full size in the end."""

from __future__ import annotations

from dataclasses import dataclass

from safer_fast.config import ranges
from safer_fast.config.messages import shortened
from safer_fast.config.schema import Config

FLAG = "--data.resolution_schedule"


@dataclass(frozen=True)
class Resolution:
    """Edges of images in pixels, each with the last epoch that trains on it, from 1.

    Without any, all epochs train on images as they are loaded.
    """

    parts: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config) -> Resolution:
        """Read the schedule of a run; raises ValueError for words that are none.

        `112@0.8,224`: 112 pixels for the first 80 % of all epochs, rounded down, then 224.
        """
        text = config.data.resolution_schedule
        if text is None:
            return cls()
        words = [word.strip().partition("@") for word in text.split(",")]
        try:
            sizes = [int(size) for size, _, _ in words]
            shares = [float(share) for _, _, share in words[:-1]]
        except ValueError:
            raise _mistake(text) from None
        is_rising = all(map(_is_less, [0.0, *shares], [*shares, 1.0]))
        is_growing = all(map(_is_less, [0, *sizes], [*sizes, ranges.EDGE + 1]))
        if words[-1][1] or not is_rising or not is_growing:
            raise _mistake(text)
        lasts = [int(share * config.epochs + 1e-9) for share in (*shares, 1.0)]
        resolution = cls(tuple(zip(sizes, lasts, strict=True)))
        if config.data.image_size is not None:
            resolution.check_full(config.data.image_size)
        return resolution

    @classmethod
    def always(cls, size: int | None) -> Resolution:
        """Make the schedule of images of one size in all epochs; None: as they are loaded."""
        return cls() if size is None else cls(((size, ranges.EPOCHS),) * 2)

    def check_full(self, image_size: int) -> None:
        """Raise ValueError unless the last size is that of the loaded images."""
        if self.parts and self.parts[-1][0] != image_size:
            raise ValueError(
                f"{FLAG}: expected {image_size}, the size of the images, as the last one, got "
                f"{self.parts[-1][0]}; --data.image_size sets both"
            )

    @property
    def smaller(self) -> list[int]:
        """All sizes but the full one."""
        return [size for size, _ in self.parts[:-1]]

    def __str__(self) -> str:
        firsts = [1, *(last + 1 for _, last in self.parts)]
        used = [
            f"{size} pixels from epoch {first} on"
            for (size, last), first in zip(self.parts, firsts, strict=False)
            if first <= last
        ]
        return ", ".join(used)

    def at(self, epoch: int) -> int | None:
        """The edge of images in an epoch, from 1; None: as they are loaded."""
        return next((size for size, last in self.parts[:-1] if epoch <= last), None)

    def begins_at(self, epoch: int) -> bool:
        """Return true if the epoch's images are of another size than those of the one before."""
        return epoch > 1 and self.at(epoch) != self.at(epoch - 1)


def _is_less(first: float, second: float) -> bool:
    return first < second


def _mistake(text: str) -> ValueError:
    return ValueError(
        f"{FLAG}: expected growing sizes, each but the last with the share of epochs at which it "
        f"ends, such as 112@0.8,224, got {shortened(repr(text))}"
    )
