"""Data given in Python: every form trains the same run, and what is unfit is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from safer_fast import Config, evaluate_run, load_model, train_model
from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import EncodedSource, SkippedFiles, open_splits
from safer_fast.data.formats.given import DatasetSource, giving
from tests.support.given import LABELS, NAMES, PIXELS, hugging_face, pictures


class Named(TensorDataset):
    """A dataset with one name for two of its classes."""

    classes = ("a", "a", *"bcdefghi")


class Items(Dataset[Any]):
    """Items as a function of the row makes them, without a list of labels."""

    targets: list[int]

    def __init__(self, make: Any, count: int = 160) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


def folder_dataset(folder: Path) -> ImageFolder:
    for row, label in enumerate(LABELS):
        (folder / NAMES[label]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(PIXELS[row]).save(folder / NAMES[label] / f"{row:03d}.png")
    return ImageFolder(str(folder), transform=v2.Grayscale())


FORMS = {
    "arrays": lambda: (PIXELS, LABELS),
    "floats": lambda: (PIXELS / 255, LABELS),
    "a list of labels": lambda: (PIXELS, LABELS.tolist()),
    "with gradients": lambda: ((torch.tensor(PIXELS) / 255).requires_grad_(), torch.tensor(LABELS)),
    "tensors": lambda: (torch.tensor(PIXELS)[:, None], torch.tensor(LABELS)),
    "tensor dataset": lambda: TensorDataset(torch.tensor(PIXELS)[:, None], torch.tensor(LABELS)),
    "pictures": lambda: Items(lambda row: (pictures()[row], int(LABELS[row]))),
    "float tensors": lambda: Items(lambda row: (torch.tensor(PIXELS[row]) / 255, LABELS[row])),
    "dictionaries": lambda: Items(lambda row: {"image": PIXELS[row], "label": LABELS[row]}),
    "labels of shape (1,)": lambda: TensorDataset(
        torch.tensor(PIXELS)[:, None], torch.tensor(LABELS)[:, None]
    ),
    "subsets": lambda: ConcatDataset(
        [Subset(Items(lambda row: (PIXELS[row], LABELS[row])), range(a, a + 80)) for a in (0, 80)]
    ),
    "hugging face": hugging_face,
    "its tensors": lambda: hugging_face().with_format("torch"),
    "its own transform": lambda: hugging_face().with_transform(lambda rows: rows),
}


def opened(data: Any) -> dict[str, Any]:
    with giving(data, None) as path:
        return dict(open_splits(path, "data.path"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_pixels_and_labels(form: str) -> None:
    source = opened(FORMS[form]())["all"]
    assert np.array_equal(source.labels, LABELS)
    for row in (0, 7, 159):
        assert np.array_equal(np.asarray(source.read(row).convert("L")), PIXELS[row])


def test_listed_labels_are_taken_only_where_items_agree(tmp_path: Path) -> None:
    plain = folder_dataset(tmp_path / "a")
    assert opened(plain)["all"].class_names == sorted(NAMES)
    assert np.array_equal(opened(plain)["all"].labels, plain.targets)
    turned = ImageFolder(
        str(tmp_path / "a"), v2.Grayscale(), target_transform=lambda number: 9 - number
    )
    assert np.array_equal(opened(turned)["all"].labels, 9 - np.array(plain.targets))
    assert opened(turned)["all"].class_names is None  # they are those of other numbers


def test_names_of_splits_are_words_as_those_of_files() -> None:
    pair = (PIXELS, LABELS)
    assert set(opened({"training": pair, "val": pair})) == {"train", "validation"}


def test_images_of_hugging_face_stay_encoded() -> None:
    source = opened(hugging_face())["all"]
    assert isinstance(source, EncodedSource)
    assert source.class_names == NAMES
    assert bytes(source.encoded(0)[:4]) == b"\x89PNG"


TEXTS = {"label": ["b", "a"] * 80}


def test_texts_are_classes_in_their_order() -> None:
    rows = datasets.Dataset.from_dict({"img": pictures(), **TEXTS})
    source = opened(rows)["all"]
    assert source.class_names == ["a", "b"]
    assert source.labels[:2].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["fine_label", "Class label", "target_labels"])
def test_columns_of_labels_are_found_as_in_parquet_files(name: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"img": pictures(), name: LABELS.tolist(), "number": LABELS})
    source = opened(rows)["all"]
    assert source.labels.tolist() == LABELS.tolist()
    rows.save_to_disk(str(tmp_path / "saved"))
    saved = open_splits(str(tmp_path / "saved"), "data.path", BadImages("error"))["all"]
    assert saved.labels.tolist() == LABELS.tolist()
    twice = rows.add_column("coarse_label", LABELS)
    with pytest.raises(ValueError, match=r"expected one column label, or data\.label_column, got "):
        opened(twice)


def random_flip(row: int) -> tuple[Any, int]:
    return v2.RandomHorizontalFlip(0.5)(torch.tensor(PIXELS[row])[None]), int(LABELS[row])


UNFIT: dict[str, tuple[Any, str]] = {
    "number": (3, "data: expected images and labels as two arrays, or a dataset"),
    "no split": (
        {"unsupervised": (PIXELS, LABELS)},
        "data: expected splits train, validation, test, extra",
    ),
    "twice": ({"val": (PIXELS, LABELS), "dev": (PIXELS, LABELS)}, "got validation twice"),
    "none": ({}, "data: expected splits train, validation, test, extra, got none"),
    "normalised": ((PIXELS / 255 - 0.5, LABELS), r"expected float images in \[0, 1\], got -0.5"),
    "normalised items": (
        Items(lambda row: (torch.tensor(PIXELS[row]) / 255 - 0.5, 0)),
        r"data: expected float images in \[0, 1\]",
    ),
    "names": (
        Named(torch.tensor(PIXELS), torch.tensor(LABELS)),
        "data: expected a name for each class, got 'a' twice",
    ),
    "counts": ((PIXELS, LABELS[:3]), "expected as many images as labels, got 160 and 3"),
    "empty": (Items(lambda row: row, 0), "data: expected at least one image, got none"),
    "random": (Items(random_flip), "data: expected the same image at each reading, got two of row"),
    "nothing": (
        Items(lambda row: (PIXELS[row], int(LABELS[row])) if row != 3 else None),
        r"data: expected items \(image, label\) or .*, got NoneType in row 3$",
    ),
    "alone": (Items(lambda row: PIXELS[row]), r"data: expected items \(image, label\)"),
    "no label": (
        Items(lambda row: {"image": PIXELS[row]}),
        r"data: expected items \(image, label\), or with a key label or the one that "
        "data.label_column names, got keys image in row 0$",
    ),
    "other keys": (
        Items(lambda row: {"pixel_values": PIXELS[row], "labels": 1}),
        "key image or img or the one that data.image_column names, got keys pixel_values, labels "
        "in row 0$",
    ),
    "other columns": (
        datasets.Dataset.from_dict({"pixel_values": [1], "labels": [1]}),
        "expected one column image or img, or data.image_column, got pixel_values, labels",
    ),
    "hidden labels": (
        (PIXELS, 0 * LABELS - 1),
        r"data: expected labels .* got -1: row 0 of data \(all labels are -1, as where they are h",
    ),
    "booleans": ((PIXELS, LABELS > 4), r"data: expected integer labels \[N\], got bool"),
    "boolean items": (
        Items(lambda row: (PIXELS[row], bool(LABELS[row] > 4))),
        "data: expected integers as labels, got bool in row 0",
    ),
    "one-hot": (
        Items(lambda row: (PIXELS[row], np.eye(10)[LABELS[row]])),
        r"data: expected integers as labels, got ndarray \[10\] in row 0",
    ),
    "fractions": (
        Items(lambda row: (PIXELS[row], 0.5)),
        "data: expected integers as labels, got float in row 0",
    ),
    "text image": (Items(lambda row: ("a", 1)), "expected a PIL image, an array or a tensor"),
    "no columns": (
        datasets.Dataset.from_dict({"text": ["a"]}),
        "data: expected one column image or img, or data.image_column, got text",
    ),
    "no images": (
        datasets.Dataset.from_dict({"image": [1], "label": [1]}),
        "data: expected a column of images, got Value in column image",
    ),
    "gaps": (
        datasets.Dataset.from_dict({"image": pictures()[:2], "label": [1, None]}),
        "data: expected integers or texts without gaps as labels",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_data_are_one_line_and_no_folder(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = UNFIT[case]
    with pytest.raises(ValueError, match=message) as caught:
        train_model(CONFIG, data=data)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def broken_at(number: int) -> Items:
    """Items of which one raises an error of the user's code."""

    def item(row: int) -> tuple[Any, int]:
        return (PIXELS[row], int(LABELS[row])) if row != number else {}["no such key"]

    return Items(item)


@pytest.mark.parametrize("row", [0, 3])
def test_a_row_that_raises_is_named_with_its_cause(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"^data\['train'\]: expected an image and a label in row {row}, got KeyError: 'no s"
    with pytest.raises(ValueError, match=message) as caught:
        train_model(CONFIG, data={"train": broken_at(row), "test": (PIXELS, LABELS)})
    assert isinstance(caught.value.__cause__, KeyError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_row_that_raises_when_it_is_decoded_is_named_or_left_out(policy: str) -> None:
    broken = broken_at(3)
    broken.targets = LABELS.tolist()  # so that only some rows are read at the start
    config = DataConfig(bad_images=policy, num_workers=0)  # type: ignore[arg-type]
    said: list[str] = []
    with giving({"train": broken}, None) as config.path:
        if policy == "skip":
            load_data(config, batch_size=16, seed=0, report=said.append)
            (line,) = said
            assert line.startswith(
                "left out: data['train']: expected an image and a label in row 3"
            )
            return
        with pytest.raises(ValueError, match=r"row 3, got KeyError: .* skip leaves such") as caught:
            load_data(config, batch_size=16, seed=0)
    cause = caught.value.__cause__
    while cause is not None and not isinstance(cause, KeyError):
        cause = cause.__cause__
    assert isinstance(cause, KeyError)


def test_keys_of_items_are_named_by_the_settings_of_columns() -> None:
    items = Items(lambda row: {"pixel_values": PIXELS[row], "labels": LABELS[row]})
    config = DataConfig(image_column="pixel_values", label_column="labels")
    with giving(items, None) as config.path:
        data = load_data(config, batch_size=16, seed=0)
    assert data.num_classes == 10
    config = DataConfig(image_column="pixels")
    message = (
        r"data.image_column: expected a key of the items of data \(pixel_values, labels\), got"
    )
    with giving(items, None) as config.path, pytest.raises(ValueError, match=message):
        load_data(config, batch_size=16, seed=0)


def test_a_test_split_that_hides_its_labels_is_not_used_and_named() -> None:
    config = DataConfig()
    hidden = (PIXELS[:8], 0 * LABELS[:8] - 1)
    with giving({"train": (PIXELS, LABELS), "test": hidden}, None) as config.path:
        data = load_data(config, batch_size=16, seed=0)
    assert data.test is None
    assert data.notes == ["data: data['test'] is not used, all its labels are -1"]


def test_a_test_split_of_a_file_that_hides_its_labels_is_not_used_too(tmp_path: Path) -> None:
    file, skipped = tmp_path / "a.npz", SkippedFiles()
    arrays = {
        "x_train": PIXELS,
        "y_train": LABELS,
        "x_test": PIXELS[:8],
        "y_test": -(LABELS[:8] ** 0),
    }
    np.savez(file, **arrays)
    assert set(open_splits(str(file), "data.path", skipped=skipped)) == {"train"}
    (line,) = skipped.lines()
    assert line == f"data: the test split in {file} is not used, all its labels are -1"


def test_streamed_datasets_are_refused() -> None:
    with pytest.raises(ValueError, match="got a streamed one: load it with streaming=False"):
        opened(hugging_face().to_iterable_dataset())


CONFIG = Config.from_recipe(
    "digits",
    epochs=2,
    selection={"warmup_epochs": 1, "num_images": 32},
    attack={"clean_epochs": 0, "epsilon_warmup_epochs": 0, "steps": 2},
    evaluation={"attacks": "clean,pgd-2", "steps": 2},
    model={"patch_size": 4, "arguments": {"depth": 2, "embed_dim": 16, "num_heads": 2}},
    runtime={"num_threads": 1},
)


def losses(run: Path) -> list[float]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event["train_loss"] for event in events if event["event"] == "epoch"]


NOT_DATA: list[tuple[Any, str]] = [
    ((PIXELS, LABELS, LABELS), r"data: expected images and labels as two arrays.*, got tuple \("),
    (PIXELS, r"data: expected images and labels as two arrays.*, got one array \["),
    ((PIXELS, None), r"data: expected images and labels .*, got tuple \(ndarray, NoneType\)"),
    (([1], [2]), r"data: expected images and labels .*, got tuple \(list, list\)"),
    ("digits", r"data: expected images .*, got the text 'digits'; files are named by data\.path$"),
    ({"train": Path("x.npz")}, r"data\['train'\]: expected images .*, got the text 'x\.npz'"),
    ({"test": (PIXELS, LABELS)}, "data: expected training data, got only test$"),
]


@pytest.mark.parametrize(("data", "message"), NOT_DATA, ids=[m[-20:] for _, m in NOT_DATA])
def test_what_is_no_data_set_is_named_as_it_was_given(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        train_model(CONFIG, data=data)
    assert "\n" not in str(caught.value)


def test_a_tuple_of_pictures_with_labels_is_a_data_set() -> None:
    pairs = tuple((Image.fromarray(PIXELS[row]), int(LABELS[row])) for row in range(4))
    assert len(opened(pairs)["all"]) == 4


def test_no_other_path_is_mixed_with_given_data() -> None:
    config = Config.from_recipe("digits", data={"test_path": "digits"})
    with pytest.raises(ValueError, match=r"data.test_path: expected none beside the data given"):
        train_model(config, data=(PIXELS, LABELS))


@pytest.mark.slow
def test_runs_on_given_data_train_the_same_resume_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = hugging_face()
    data = {"train": rows.select(range(100)), "test": rows.select(range(100, 160))}
    arrays = {"train": (PIXELS[:100], LABELS[:100]), "test": (PIXELS[100:], LABELS[100:])}
    CONFIG.output = str(tmp_path / "run")
    run = train_model(CONFIG, data=data)
    assert load_model(run).class_names == NAMES
    CONFIG.output = str(tmp_path / "other")
    other = train_model(CONFIG, data=arrays)
    assert losses(run) == losses(other)
    # the run's own test images, measured again, are what it measured at its end
    (clean,) = evaluate_run(run, attacks="clean", data=data["test"])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [e for e in last if e["event"] == "evaluation" and e["weights"] == "last"]
    assert clean.accuracy == own[0]["accuracy"]
    keyed = Items(lambda row: {"pixel_values": PIXELS[100 + row], "labels": LABELS[100 + row]}, 60)
    names = {"image_column": "pixel_values", "label_column": "labels"}
    (again,) = evaluate_run(run, attacks="clean", data=keyed, **names)
    assert again.accuracy == clean.accuracy
    CONFIG.output, CONFIG.resume = str(run), "auto"
    capsys.readouterr()
    assert train_model(CONFIG, data=data) == run
    assert "finished already" in capsys.readouterr().out
    others = {"train": (PIXELS[:100], LABELS[:100]), "test": (PIXELS[100:150], LABELS[100:150])}
    for wrong in (others, others["train"], {**others, "extra": arrays["test"]}):
        with pytest.raises(ValueError, match=r"^data: expected the data of the run that is resu"):
            train_model(CONFIG, data=wrong)
    CONFIG.data.path = "digits"
    with pytest.raises(ValueError, match=r"^data.path: expected the data of the run that is resu"):
        train_model(CONFIG)
    CONFIG.data.path = None
    with pytest.raises(ValueError, match="got 'given': the run was trained on data given in Py"):
        evaluate_run(run, attacks="clean", fresh=True)
    with pytest.raises(ValueError, match=r"^path: expected none beside the data given in Python"):
        evaluate_run(run, path="digits", data=data)


def test_pickled_sources_read_the_same_in_workers() -> None:
    source = opened(FORMS["hugging face"]())["all"]
    import pickle

    copied = pickle.loads(pickle.dumps(source))
    assert np.array_equal(np.asarray(copied.read(5)), np.asarray(source.read(5)))
    assert isinstance(opened(FORMS["pictures"]())["all"], DatasetSource)
