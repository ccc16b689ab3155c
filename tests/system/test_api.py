"""Public names are there, documented, and import nothing heavy before they are used."""

import doctest
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import safer_fast
from safer_fast.attacks.named import LOSSES
from safer_fast.config.attack_names import ATTACKS
from safer_fast.config.schema import ModelConfig
from safer_fast.selection.criteria import CRITERIA
from safer_fast.training.objectives import FORMULAS
from tests.support import small_runs


@pytest.mark.parametrize("name", safer_fast.__all__)
def test_public_names_are_documented(name: str) -> None:
    item = getattr(safer_fast, name)
    assert inspect.getdoc(item)
    signature = inspect.signature(item)
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_runs.run(tmp_path_factory.mktemp("api") / "run", *small_runs.TINY))


@pytest.fixture
def tables() -> Iterator[None]:
    """What examples register is forgotten."""
    tables: list[dict[str, Any]] = [ATTACKS, LOSSES, CRITERIA, FORMULAS]
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without what it prints, which no example shows."""

    def call(*arguments: Any, **settings: Any) -> Any:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return function(*arguments, **settings)

    return call


def is_settings(name: str) -> bool:
    return name.endswith("Config") and name not in ("Config", "EvaluateConfig")


@pytest.mark.parametrize("name", [n for n in safer_fast.__all__ if not is_settings(n)])
@pytest.mark.usefixtures("tables")
def test_the_example_of_every_public_name_runs(
    name: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ModelConfig(name="vit_tiny_patch16_224", patch_size=8, arguments={"depth": 2})
    model = safer_fast.build_model(settings, num_classes=3, image_size=16)
    world = {item: getattr(safer_fast, item) for item in safer_fast.__all__}
    for speaker in ("evaluate_run", "train_model"):
        world[speaker] = quietly(world[speaker])
    world |= {"torch": torch, "RUN": run, "model": model}
    world |= {"images": torch.rand(4, 3, 16, 16), "labels": torch.arange(4) % 3}
    item = getattr(safer_fast, name)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(item) or "", world, name, None, 0)
    assert test.examples, f"{name} has no example"
    output = StringIO()
    failures = doctest.DocTestRunner().run(test, out=output.write).failed
    assert not failures, output.getvalue()


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(("item", "name"), [("Formula", "focal"), ("register_objective", "plain")])
def test_objectives_of_examples_read_the_labels(item: str, name: str) -> None:
    world = {each: getattr(safer_fast, each) for each in ("Formula", "register_objective")}
    text = inspect.getdoc(getattr(safer_fast, item)) or ""
    example = doctest.DocTestParser().get_doctest(text, world | {"torch": torch}, name, None, 0)
    doctest.DocTestRunner().run(example, clear_globs=False)
    config = safer_fast.ObjectiveConfig()
    logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    right, wrong = FORMULAS[name].losses(logits, logits, labels, config).tolist()
    assert right < 0.2 < 1.5 < wrong


def test_groups_may_be_dictionaries_and_recipes_paths(run: str) -> None:
    config = safer_fast.Config(attack={"epsilon": "4/255"})  # type: ignore[arg-type]
    config.attack.steps = 3
    assert config.attack == safer_fast.AttackConfig(epsilon="4/255", steps=3)  # type: ignore[arg-type]
    assert safer_fast.Config.from_recipe(Path(run) / "run.yaml").epochs == 1


def test_a_model_says_what_shape_it_takes(run: str) -> None:
    model = safer_fast.load_model(run, device="cpu")
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got \[1, 8, 8\]"):
        model(torch.rand(1, 8, 8))
    with pytest.raises(ValueError, match=r"images: expected floats in \[0, 1\], got torch.uint8"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    for wrong, message in (
        (torch.rand(1, 1, 9, 9), r"images: expected 8x8 pixels, .* got 9x9"),
        (torch.rand(1, 1, 16, 16), r"images: expected 8x8 pixels, .* got 16x16"),
        (torch.rand(1, 1, 8, 4), r"images: expected 8x8 pixels, .* got 8x4"),
        (torch.rand(1, 3, 8, 8), r"images: expected \[B, 1, H, W\], .* got \[1, 3, 8, 8\]"),
        (torch.rand(1, 1, 8, 8).double(), "expected torch.float32 .*, got torch.float64"),
        (torch.rand(1, 1, 8, 8).numpy(), r"expected a tensor \[B, C, H, W\], got ndarray"),
        (torch.rand(1, 1, 8, 8, device="meta"), "images: expected on cpu .*, got meta"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(wrong)
        assert "\n" not in str(caught.value)
    assert model(torch.rand(2, 1, 8, 8).half()).shape == (2, 10)
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'xx'"):
        safer_fast.load_model(run, device="xx")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap
def test_a_loaded_model_refuses_bytes_as_floats_and_normalised_pixels(run: str) -> None:
    model = safer_fast.load_model(run, device="cpu")
    images = torch.rand(2, 1, 8, 8)
    for wrong, range_ in ((255 * images, "0"), ((images - 0.5) / 0.2, "-2")):
        wrong[0, 0, 0, :2] = torch.tensor([float(range_), wrong.max()])
        message = rf"images: expected pixels in \[0, 1\], got values from {range_}.* to [\d.]+ \("
        with pytest.raises(ValueError, match=message):
            model(wrong)
    halved = images * 2 - 1  # mean and deviation of 0.5, as many networks of timm have
    halved[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    with pytest.raises(ValueError, match=r"got values from -1 to 1 \("):
        model(halved)
    outside = (images * 1.5 - 0.25).requires_grad_()  # as a search has it before it clips
    torch.autograd.grad(model(outside).sum(), outside)
    batched = torch.func.vmap(lambda image: model(image[None])[0])(images)
    assert torch.allclose(batched, model(images), atol=1e-5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), model(images), atol=1e-5)
    torch.export.export(model, (images,))


def test_the_names_of_the_package_are_its_public_ones() -> None:
    shown = {name for name in dir(safer_fast) if not name.startswith("__")}
    assert shown == set(safer_fast.__all__)


def test_devices_of_torch_are_taken_and_the_number_of_a_gpu_is_explained(run: str) -> None:
    cpu: Any = torch.device("cpu")
    assert safer_fast.load_model(run, device=cpu).mean.device == cpu
    quietly(safer_fast.evaluate_run)(run, attacks="clean", device=cpu)
    first: Any = torch.device("cuda:0")
    message = "^device: expected .*, got '?cuda:0'?: CUDA_VISIBLE_DEVICES=0 chooses the GPU$"
    for call in (safer_fast.load_model, safer_fast.evaluate_run):
        for given in (first, "cuda:0"):
            with pytest.raises(ValueError, match=message):
                call(run, device=given)
    with pytest.raises(ValueError, match=r"^device: expected .*, got 'meta'$"):
        safer_fast.load_model(run, device=torch.device("meta"))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_gpu_that_there_is_not_is_named_by_the_argument(run: str) -> None:
    message = "^device: expected cpu or auto on a machine without a GPU, got cuda$"
    with pytest.raises(ValueError, match=message):
        safer_fast.load_model(run, device="cuda")
    for given in ("cuda", torch.device("cuda")):
        with pytest.raises(ValueError, match=message):
            safer_fast.evaluate_run(run, attacks="clean", device=given)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fgsm'"):
        safer_fast.fgsm  # noqa: B018


def test_importing_the_package_and_its_settings_does_not_import_torch() -> None:
    code = "import sys, safer_fast, safer_fast.config.command_line; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_pieces_work_together_on_a_model_of_ones_own() -> None:
    model = safer_fast.build_model(
        ModelConfig(name="vit_tiny_patch16_224", patch_size=8, arguments={"depth": 2}),
        num_classes=3,
        image_size=16,
    )
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    attacked = safer_fast.pgd(model, images, labels, epsilon=0.03, step_size=0.01, steps=2)
    scores = safer_fast.rank_layers(model, [(attacked, labels)], rho=0.05)
    names = safer_fast.select_layers(scores, fraction=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = safer_fast.SharpnessAware(model, names, optimizer, rho=0.05)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(attacked), labels)
        losses.append(float(loss.detach()))
        sam.ascend(loss)
        sam.descend(torch.nn.functional.cross_entropy(model(attacked), labels))
    assert losses[-1] < losses[0]
