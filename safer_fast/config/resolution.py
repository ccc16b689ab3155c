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
        words = [word.strip() for word in text.split(",")]
        parts = [word.partition("@") for word in words]
        if parts[-1][1]:
            raise _mistake(text, words[-1])
        sizes, shares = [0], [0.0]
        for word, (size, _, share) in zip(words, parts, strict=True):
            is_last = word is words[-1]
            try:
                sizes.append(int(size))
                shares.append(1.0 if is_last else float(share))
            except ValueError:
                raise _mistake(text, word) from None
            is_growing = sizes[-2] < sizes[-1] <= ranges.EDGE and shares[-2] < shares[-1]
            if not is_growing or (shares[-1] >= 1 and not is_last):
                raise _mistake(text, word)
        lasts = [int(share * config.epochs + 1e-9) for share in shares[1:]]
        resolution = cls(tuple(zip(sizes[1:], lasts, strict=True)))
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

    @property
    def unused(self) -> list[int]:
        """Sizes whose share of the epochs is less than one."""
        return [size for size, first, last in self._spans() if first > last]

    def _spans(self) -> list[tuple[int, int, int]]:
        """Sizes with their first and last epoch."""
        firsts = [1, *(last + 1 for _, last in self.parts)]
        return [
            (size, first, last) for (size, last), first in zip(self.parts, firsts, strict=False)
        ]

    def __str__(self) -> str:
        used = (
            f"{size} pixels from epoch {first}"
            for size, first, last in self._spans()
            if first <= last
        )
        return ", ".join(f"{words} on" for words in used)

    def at(self, epoch: int) -> int | None:
        """The edge of images in an epoch, from 1; None: as they are loaded."""
        return next((size for size, last in self.parts[:-1] if epoch <= last), None)

    def begins_at(self, epoch: int) -> bool:
        """Return true if the epoch's images are of another size than those of the one before."""
        return epoch > 1 and self.at(epoch) != self.at(epoch - 1)


def _mistake(text: str, word: str = "") -> ValueError:
    wrong = f"{word!r} in " if word else ""
    return ValueError(
        f"{FLAG}: expected growing sizes, each but the last with the share of epochs at which it "
        f"ends, such as 112@0.8,224, got {shortened(wrong + repr(text))}"
    )
