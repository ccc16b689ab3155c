"""Stems are compiled with the blocks, and run as written with the same bits as before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import cross_entropy, frozen, pixel_gradient
from safer_fast.models.families import STEM
from safer_fast.models.robust_model import RobustModel, compile_blocks
from tests.support.networks import FAMILIES, UNCUTTABLE, build, images_and_labels


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run as written: compiling them takes long, and has tests of its own."""
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)


def gradients(model: RobustModel) -> tuple[Tensor, Tensor]:
    """The pixel gradient of a frozen network, and its logits without one."""
    images, labels = images_and_labels(4)
    pixels = model.arrange(images)
    with frozen(model):
        gradient = pixel_gradient(model, pixels, labels, cross_entropy)
        with torch.no_grad():
            return gradient, model(pixels)


@pytest.mark.slow
@pytest.mark.usefixtures("without_blocks")
@pytest.mark.parametrize("savings", [(), ("patch-order", "class-token")])
def test_a_compiled_stem_is_near_that_as_written_which_keeps_its_bits(
    savings: tuple[str, ...],
) -> None:
    model = build()
    model.enable_savings(savings, 32)
    written = gradients(model)
    compile_blocks(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for own, other in zip(gradients(model), written, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    # with a gradient, and without
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("force_eager"):
        for own, other in zip(gradients(model), written, strict=True):
            assert torch.equal(own, other)


@pytest.mark.slow
@pytest.mark.usefixtures("without_blocks")
def test_a_compiled_stem_follows_the_dtype_of_features_and_the_cut() -> None:
    model = build(compute_dtype=torch.bfloat16)
    model.enable_savings(("patch-order",), 32)
    pixels = model.arrange(images_and_labels(4)[0])
    wanted = model.prefix(pixels, 0)
    compile_blocks(model)
    for dtype in (None, torch.bfloat16, None):
        model.feature_dtype = dtype
        for features in (model.prefix(pixels, 0), model.block(model.prefix(pixels, STEM), STEM)):
            assert features.dtype == (dtype or wanted.dtype)
            torch.testing.assert_close(features.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", [*FAMILIES, UNCUTTABLE])
def test_a_stem_that_changes_its_modules_runs_as_written(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(function: Any, **_: Any) -> Any:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    compile_blocks(build(family))
    keeps_modules = family.startswith(("vit_tiny", "deit", "swin"))
    assert compiled == (["_features", "_stem"] if keeps_modules else [])
