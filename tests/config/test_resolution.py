"""A schedule of image sizes is read, and refused in one line."""

import re

import pytest

from safer_fast.config.command_line import parse_config
from safer_fast.config.resolution import Resolution


def read(schedule: str, *flags: str, epochs: int = 10) -> Resolution:
    words = [f"--data.resolution_schedule={schedule}", f"--epochs={epochs}", *flags]
    return Resolution.of(parse_config(["--selection.warmup_epochs=0", *words]))


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("112@0.8,224", 10, [112] * 8 + [None] * 2),
        (" 112 @ 0.8 , 224 ", 5, [112] * 4 + [None]),
        ("96@0.3,128@0.6,224", 10, [96] * 3 + [128] * 3 + [None] * 4),
        ("112@0.8,224", 3, [112] * 2 + [None]),
        ("112@0.8,224", 1, [None]),
        ("112@0.99,224", 3, [112] * 2 + [None]),
        ("224", 2, [None] * 2),
    ],
)
def test_each_epoch_has_the_size_of_its_share(
    schedule: str, epochs: int, expected: list[int | None]
) -> None:
    resolution = read(schedule, epochs=epochs)
    assert [resolution.at(epoch) for epoch in range(1, epochs + 1)] == expected
    begins = [epoch for epoch in range(1, epochs + 1) if resolution.begins_at(epoch)]
    assert begins == [n + 1 for n in range(1, epochs) if expected[n] != expected[n - 1]]


def test_without_a_schedule_all_images_are_as_they_are_loaded() -> None:
    resolution = Resolution.of(parse_config([]))
    assert (resolution.at(1), resolution.smaller, str(resolution)) == (None, [], "")
    resolution.check_full(8)


def test_a_schedule_is_said_in_words() -> None:
    words = "112 pixels from epoch 1 on, 224 pixels from epoch 9 on"
    assert str(read("112@0.8,224")) == words
    assert str(read("112@0.8,224", epochs=1)) == "224 pixels from epoch 1 on"


def test_a_size_whose_share_is_less_than_an_epoch_is_known() -> None:
    assert read("96@0.1,112@0.8,224", epochs=5).unused == [96]
    assert read("112@0.8,224", epochs=5).unused == []


@pytest.mark.parametrize(
    ("schedule", "wrong"),
    [
        ("112@80%,224", "112@80%"),
        ("112@0.5,224@1", "224@1"),
        ("96@0.6,128@0.3,224", "128@0.3"),
        ("112@1.5,224", "112@1.5"),
    ],
)
def test_the_word_that_is_wrong_is_named(schedule: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf", got '{re.escape(wrong)}' in '"):
        read(schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        "",
        "112@0.8",
        "112,224",
        "112@0.8,224@1",
        "112@1,224",
        "112@0,224",
        "112@nan,224",
        "224@0.5,112",
        "112@0.5,112",
        "96@0.6,128@0.3,224",
        "0@0.5,224",
        "112@80%,224",
        "112@0.5;224",
        "112@0.5,99999",
    ],
)
def test_other_words_are_a_mistake(schedule: str) -> None:
    with pytest.raises(
        ValueError, match=r"^--data\.resolution_schedule: expected .*, got "
    ) as told:
        read(schedule)
    assert "\n" not in str(told.value)


def test_the_last_size_is_that_of_the_images() -> None:
    message = r"--data\.resolution_schedule: expected 192, the size of the images, .* got 224"
    with pytest.raises(ValueError, match=message):
        read("112@0.8,224", "--data.image_size=192")
