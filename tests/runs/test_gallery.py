"""The gallery: what an attack did to a few images, kept in a file that anybody may have made."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from safer_fast.runs.gallery import (
    Gallery,
    gallery_strip,
    make_gallery,
    picture_of,
    read_gallery,
    write_gallery,
)
from safer_fast.runs.layout import GALLERY
from safer_fast.runs.report.page import write_report
from safer_fast.runtime.tensor_files import write_tensors
from tests.support.galleries import new_gallery

NAMES = ["cat", "dog", "bird"]
FACTS: dict[str, Any] = {
    "class_names": NAMES,
    "attack": "pgd-20",
    "epsilon": 8 / 255,
    "weights": "last",
    "split": "test",
}


def tensors_of(gallery: Gallery) -> dict[str, Tensor]:
    return {field.name: getattr(gallery, field.name) for field in fields(gallery)}


class Brightness(nn.Module):
    """Sees class 0 in dark images and class 1 in bright ones, in training always class 2."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        offset = torch.tensor([0.0, 0.0, 100.0 if self.training else -100.0])
        return torch.stack([1 - mean, mean, 0 * mean], dim=1) + offset


def test_predictions_are_those_of_the_model_in_eval_mode() -> None:
    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.25, 0.75)])
    adversarial = images + torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    model = Brightness().train()
    gallery = make_gallery(model, images, torch.tensor([0, 1]), adversarial)
    assert model.training
    assert gallery.predicted_before.tolist() == [0, 1]
    assert gallery.predicted_after.tolist() == [1, 1]
    expected = 1 / (1 + torch.tensor(-0.5).exp())
    assert torch.allclose(gallery.confidence_before, expected.expand(2))
    assert torch.equal(gallery.images, images)
    assert torch.equal(gallery.adversarial, adversarial)
    assert not gallery.confidence_after.requires_grad


@pytest.mark.parametrize(
    ("count", "labels", "side"), [(0, 0, 4), (65, 65, 4), (2, 3, 4), (2, 2, 5)]
)
def test_what_is_no_gallery_is_not_made(count: int, labels: int, side: int) -> None:
    images, classes = torch.zeros(count, 1, 4, 4), torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected 1 to 64 of one shape, got "):
        make_gallery(Brightness(), images, classes, torch.zeros(count, 1, 4, side))


def test_perturbations_are_amplified_to_the_whole_range_and_the_factor_is_told() -> None:
    gallery = new_gallery(2)
    same = replace(gallery, adversarial=gallery.images)
    assert gallery.amplifications == pytest.approx([5.0, 2.5])
    assert gallery.perturbations.flatten(1).amax(1).tolist() == pytest.approx([1.0, 1.0])
    undone = (gallery.perturbations - 0.5) / torch.tensor([5.0, 2.5]).view(-1, 1, 1, 1)
    assert torch.allclose(gallery.images + undone, gallery.adversarial, atol=1e-6)
    assert same.amplifications == [1.0, 1.0]
    assert (same.perturbations == 0.5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gallery_is_read_as_it_was_written(tmp_path: Path, channels: int) -> None:
    gallery = new_gallery(channels=channels)
    swapped = replace(gallery, images=gallery.images.transpose(2, 3))
    write_gallery(swapped, tmp_path / GALLERY, **FACTS)
    read, facts = read_gallery(tmp_path / GALLERY)
    for name, tensor in tensors_of(swapped).items():
        assert torch.equal(getattr(read, name), tensor), name
    assert vars(facts) == FACTS
    assert os.listdir(tmp_path) == [GALLERY]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path / 'none' / GALLERY}: "):
        write_gallery(new_gallery(), tmp_path / "none" / GALLERY, **FACTS)


WRONG_TENSORS: dict[str, Callable[[Gallery], dict[str, Tensor]]] = {
    "half precision": lambda one: {"images": one.images.half()},
    "integers": lambda one: {"adversarial": one.adversarial.long()},
    "no batch": lambda one: {"images": one.images[0], "adversarial": one.adversarial[0]},
    "two channels": lambda one: {
        name: tensors_of(one)[name][:, :2].contiguous() for name in ("images", "adversarial")
    },
    "other sizes": lambda one: {"adversarial": torch.zeros(3, 3, 6, 7)},
    "no images": lambda one: {name: value[:0] for name, value in tensors_of(one).items()},
    "too many": lambda one: tensors_of(new_gallery(65)),
    "too wide": lambda one: {
        name: torch.zeros(3, 1, 1, 1025) for name in ("images", "adversarial")
    },
    "too high": lambda one: {
        name: torch.zeros(3, 1, 1025, 1) for name in ("images", "adversarial")
    },
    "beyond white": lambda one: {"images": one.images + 1},
    "not a number": lambda one: {"adversarial": one.adversarial / 0 * 0},
    "unknown class": lambda one: {"labels": one.labels + 1},
    "negative class": lambda one: {"predicted_after": -one.labels},
    "classes as floats": lambda one: {"predicted_before": one.labels.float()},
    "fewer labels": lambda one: {"labels": one.labels[:2]},
    "confidence": lambda one: {"confidence_after": one.confidence_after * 3},
    "confidences of nobody": lambda one: {"confidence_before": torch.zeros(3, 2)},
    "one more": lambda one: {"more\x1b[2J": torch.zeros(1)},
}


@pytest.mark.parametrize("change", WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_tensors_of_no_gallery_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[Gallery], dict[str, Tensor]]
) -> None:
    gallery = new_gallery()
    tensors = tensors_of(gallery) | change(gallery)
    write_tensors(tmp_path / GALLERY, tensors, {"gallery": json.dumps(FACTS)})
    refuse(tmp_path / GALLERY)


WRONG_FACTS: list[Any] = [
    [],
    {},
    FACTS | {"more": 1},
    FACTS | {"class_names": "abc"},
    FACTS | {"class_names": []},
    FACTS | {"class_names": NAMES[:2]},
    FACTS | {"class_names": [1, 2, 3]},
    FACTS | {"class_names": ["a"] * 100_001},
    FACTS | {"epsilon": "0.1"},
    FACTS | {"epsilon": True},
    FACTS | {"epsilon": -0.1},
    FACTS | {"epsilon": 10**400},
    FACTS | {"attack": None},
    FACTS | {"split": ["test"]},
]


@pytest.mark.parametrize("facts", WRONG_FACTS, ids=range(len(WRONG_FACTS)))
def test_facts_of_no_gallery_are_refused_in_one_line(tmp_path: Path, facts: Any) -> None:
    write_tensors(tmp_path / GALLERY, tensors_of(new_gallery()), {"gallery": json.dumps(facts)})
    refuse(tmp_path / GALLERY)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"epsilon": NaN}', "\x1b[2J\n"])
def test_facts_that_are_no_json_object_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    write_tensors(tmp_path / GALLERY, tensors_of(new_gallery()), {"gallery": text})
    refuse(tmp_path / GALLERY)


@pytest.mark.parametrize("what", ["folder", "empty", "text", "cut", "changed", "no facts", "huge"])
def test_a_file_that_holds_no_gallery_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / GALLERY
    write_gallery(new_gallery(), path, **FACTS)
    content = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "no facts":
        write_tensors(path, tensors_of(new_gallery()), {})
    else:
        changed = content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]  # of the last fraction
        new = {"empty": b"", "text": b"x" * 1000, "cut": content[:-8], "changed": changed}
        path.write_bytes(new.get(what, content))
    if what == "huge":
        os.truncate(path, (128 << 20) + 1)
    message = refuse(path)
    assert ("at most 134,217,728 bytes" in message) == (what == "huge")


def refuse(path: Path) -> str:
    """The line that names the file, which is refused by itself and with the report of its run."""
    (path.parent / "metrics.jsonl").touch()
    for read in (read_gallery, lambda path: write_report([path.parent])):
        with pytest.raises(ValueError, match=f"^{path}: expected a gallery ") as caught:
            read(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(str(path)) + 300
    return str(caught.value)


@pytest.mark.parametrize(("channels", "side", "times"), [(1, 8, 8), (3, 6, 10), (3, 100, 1)])
def test_the_strip_shows_images_perturbations_and_attacked_images(
    channels: int, side: int, times: int
) -> None:
    gallery = new_gallery(2, channels, side)
    png, width, height = gallery_strip(gallery)
    strip = Image.open(io.BytesIO(png))
    assert strip.format == "PNG"
    assert strip.size == (width, height) == (2 * side * times, 3 * side * times)
    rows = (gallery.images, gallery.perturbations, gallery.adversarial)
    for number, row in enumerate(rows):
        for index in range(2):
            left, top = index * side * times, number * side * times
            tile = strip.crop((left, top, left + side * times, top + side * times))
            expected = picture_of(row[index]).resize(tile.size, Image.Resampling.NEAREST)
            assert tile.tobytes() == expected.tobytes(), (number, index)


def report_of(folder: Path, gallery: Gallery, **facts: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    write_gallery(gallery, folder / GALLERY, **FACTS | facts)
    return write_report([folder]).read_text(encoding="utf-8")


def test_the_report_shows_three_pictures_of_each_image_and_how_it_ended(tmp_path: Path) -> None:
    gallery = new_gallery(3)
    wrong = replace(gallery, predicted_before=torch.tensor([0, 1, 0]))
    source = report_of(tmp_path / "run", wrong)
    assert source.count('src="data:image/png;base64,') == 9
    words = re.sub(r"[ \n]+", " ", source)
    assert (
        '<b class="verdict held">held</b> <b>cat</b>: cat (50\xa0%) &rarr; cat (40\xa0%)' in words
    )
    assert '<b class="verdict fooled">fooled</b> <b>dog</b>: dog (75\xa0%) &rarr; bird' in words
    assert '<b class="verdict wrong-before">wrong before</b> <b>bird</b>: cat' in words
    assert "\N{MULTIPLICATION SIGN}5" in source
    assert "ε = 8/255" in source
    assert "2 of 3 were classified rightly before, 1 of these no longer after" in source


def test_small_images_keep_their_pixels_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    small = report_of(tmp_path / "small", new_gallery(1, side=96))
    large = report_of(tmp_path / "large", new_gallery(1, side=600))
    assert '<ul class="cards pixelated">' in small
    assert '<ul class="cards">' in large
    assert len(large) < 1_500_000


def test_a_large_gallery_is_cut_short(tmp_path: Path) -> None:
    assert report_of(tmp_path / "run", new_gallery(20)).count("<img ") == 24


def test_texts_of_a_gallery_are_texts_on_the_page(tmp_path: Path) -> None:
    names = ['"><script>x</script>', "\x1b[2J\u202e", "b"]
    facts = dict.fromkeys(("attack", "weights", "split"), "<i>\x07</i>")
    source = report_of(tmp_path / "run", new_gallery(3), class_names=names, **facts)
    assert "<script" not in source
    assert "<i>" not in source
    assert source.count("&lt;i&gt;?&lt;/i&gt;") == 3
    assert not {"\x1b", "\x07", "\u202e"} & set(source)


def test_each_of_several_runs_has_its_gallery(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders[:2]:
        report_of(folder, new_gallery(1))
    folders[2].mkdir()
    (folders[2] / "metrics.jsonl").touch()
    source = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Attacked images of a" in source
    assert "Attacked images of b" in source
    assert "Attacked images of c" not in source
