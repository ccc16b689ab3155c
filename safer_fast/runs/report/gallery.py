"""Gallery of the report: images, their perturbations, and predictions before and after."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safer_fast.runs.layout import RunFolder
from safer_fast.runs.report.reading import ReportedRun
from safer_fast.runs.report.tables import radius

if TYPE_CHECKING:
    from torch import Tensor

    from safer_fast.runs.gallery import Gallery, GalleryFacts

_MOST_CARDS = 8
_LARGEST = 256  # pixels along a side; larger pictures are made smaller
_SMALL = 96  # pixels along a side, up to which the pixels themselves are worth seeing


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its alternative text."""

    uri: str
    alternative: str
    caption: str


@dataclass(frozen=True)
class ImageCard:
    """One image: three pictures, its label, predictions before and after, and the verdict."""

    pictures: list[Picture]
    label: str
    before: str
    after: str
    verdict: str  # fooled, held, wrong before


@dataclass(frozen=True)
class GallerySection:
    """The gallery of a run with its caption."""

    title: str
    cards: list[ImageCard]
    caption: str
    is_pixelated: bool


def galleries(runs: Sequence[ReportedRun]) -> list[GallerySection]:
    """Galleries of the runs that have one; raise ValueError naming a bad file."""
    sections = []
    for run in runs:
        path = RunFolder(run.folder).gallery
        if path.exists():
            from safer_fast.runs.gallery import read_gallery

            title = f"Attacked images of {run.name}" if len(runs) > 1 else "Attacked images"
            sections.append(_section(title, *read_gallery(path)))
    return sections


def _section(title: str, gallery: Gallery, facts: GalleryFacts) -> GallerySection:
    count = min(len(gallery.images), _MOST_CARDS)
    cards = [_card(gallery, facts, index) for index in range(count)]
    right = [card for card in cards if card.verdict != "wrong before"]
    fooled = [card for card in right if card.verdict == "fooled"]
    ball = f", \N{GREEK SMALL LETTER EPSILON} = {radius(facts.epsilon)}" if facts.epsilon else ""
    caption = (
        f"Images of the {facts.split} split, what {facts.attack}{ball} adds (amplified), and both, "
        f"with {facts.weights} weights: {len(right)} of {count} were classified rightly before, "
        f"{len(fooled)} of these no longer after."
    )
    is_pixelated = max(gallery.images.shape[2:]) <= _SMALL
    return GallerySection(title, cards, caption, is_pixelated)


def _card(gallery: Gallery, facts: GalleryFacts, index: int) -> ImageCard:
    label, before, after = (
        int(classes[index])
        for classes in (gallery.labels, gallery.predicted_before, gallery.predicted_after)
    )
    names, factor = facts.class_names, gallery.amplifications[index]
    shown = (
        (gallery.images, f"image of {names[label]}", "image"),
        (gallery.perturbations, "what the attack adds", f"\N{MULTIPLICATION SIGN}{factor:.3g}"),
        (gallery.adversarial, f"attacked image of {names[label]}", "attacked"),
    )
    return ImageCard(
        pictures=[Picture(_uri(pixels[index]), words, note) for pixels, words, note in shown],
        label=names[label],
        before=_prediction(names, before, float(gallery.confidence_before[index])),
        after=_prediction(names, after, float(gallery.confidence_after[index])),
        verdict=_verdict(label, before, after),
    )


def _prediction(names: Sequence[str], number: int, confidence: float) -> str:
    if number < 0:
        return "no class (logits not finite)"
    return f"{names[number]} ({100 * confidence:.0f}\N{NO-BREAK SPACE}%)"


def _verdict(label: int, before: int, after: int) -> str:
    if before != label:
        return "wrong before"
    return "held" if after == label else "fooled"


def _uri(pixels: Tensor) -> str:
    from PIL import Image

    from safer_fast.runs.gallery import picture_of, png_of

    picture = picture_of(pixels)
    # an average of pixels would hide the perturbation
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.NEAREST)
    return "data:image/png;base64," + base64.b64encode(png_of(picture)).decode()
