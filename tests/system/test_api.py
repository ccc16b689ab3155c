"""Public names are there, documented, and import nothing heavy before they are used."""

import inspect
import subprocess
import sys

import pytest
import torch

import safer_fast
from safer_fast.config.schema import ModelConfig


@pytest.mark.parametrize("name", safer_fast.__all__)
def test_public_names_are_documented(name: str) -> None:
    item = getattr(safer_fast, name)
    assert inspect.getdoc(item)
    signature = inspect.signature(item)
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


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
    network = model.network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sam = safer_fast.SharpnessAware(network, names, optimizer, rho=0.05)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(attacked), labels)
        losses.append(float(loss.detach()))
        sam.ascend(loss)
        sam.descend(torch.nn.functional.cross_entropy(model(attacked), labels))
    assert losses[-1] < losses[0]
