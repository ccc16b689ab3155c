"""A value that is none of the known names gets the nearest one, in commands and from Python."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safer_fast import (
    Config,
    ModelConfig,
    build_model,
    evaluate_run,
    load_model,
    pgd,
    rank_layers,
    train_model,
)
from safer_fast.config.messages import meant
from safer_fast.runs.exporters import ExportConfig, export
from tests.support.commands import refused

WORDS: list[tuple[str, list[str], str]] = [
    ("train", ["--optim.name", "muom"], "got muom, did you mean muon?"),
    ("train", ["--amp", "bf17"], "got bf17, did you mean bf16?"),
    ("train", ["--amp=BF16"], "got BF16, did you mean bf16?"),
    ("train", ["--attack.steps", "atuo"], "got atuo, did you mean auto?"),
    ("train", ["--data.augmentation=random_resized_crop"], "did you mean random-resized-crop?"),
    ("train", ["--config", "cifar10-safr"], "did you mean 'cifar10-safer'?"),
    ("train", ["--model.name=vit_tinny_patch16_224"], "did you mean vit_tiny_patch16_224?"),
    ("train", ["--model.name=vit_smal_patch16_224.dino"], "did you mean vit_small_patch16_224?"),
    ("train", ["--model.name=vit_tinny"], "got 'vit_tinny', did you mean vit_tiny_patch16_224?"),
    ("train", ["--model.name=ViT-Tiny"], "got 'ViT-Tiny', did you mean vit_tiny_patch16_224?"),
    ("train", ["--objective.name", "tardes"], "got 'tardes', did you mean trades?"),
    ("train", ["--selection.criterion", "sharpnes"], "got 'sharpnes', did you mean sharpness?"),
    ("train", ["--selection.layers", "blocks.0.atn.qkv"], "did you mean blocks.0.attn.qkv?"),
    ("train", ["--evaluation.attacks=pdg-5"], "got 'pdg-5', did you mean pgd-5?"),
    ("train", ["--runtime.exact_savings=prefxi"], "got 'prefxi', did you mean prefix?"),
    ("train", ["--data.path", "digts"], "(No such file or directory), did you mean digits?"),
    ("evaluate", ["RUN", "--attacks", "pgd20"], "got 'pgd20', did you mean pgd-20?"),
    ("evaluate", ["RUN", "--attacks", "pgd"], "got 'pgd', did you mean pgd-20?"),
    ("evaluate", ["RUN", "--attacks", "auto-attack"], "did you mean autoattack?"),
    ("evaluate", ["RUN", "--attacks", "cw_50"], "got 'cw_50', did you mean cw-50?"),
    ("evaluate", ["RUN", "--norm", "linff"], "got linff, did you mean linf?"),
    ("evaluate", ["RUN", "--corruptions", "fogg"], "got 'fogg', did you mean fog?"),
    ("evaluate", ["RUN", "--threat-models", "lnf:8/255"], "did you mean linf:8/255?"),
    ("select", ["RUN", "--criterion", "sharpnes"], "got 'sharpnes', did you mean sharpness?"),
    ("select", ["RUN", "--criteria", "critcality"], "did you mean criticality?"),
    ("export", ["RUN", "--format", "onxx"], "got 'onxx', did you mean onnx?"),
]


@pytest.mark.parametrize(("command", "words", "hint"), WORDS, ids=lambda v: str(v)[-40:])
def test_a_misspelt_value_gets_the_nearest_name(
    command: str,
    words: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"safer_fast.{command}").main
    assert refused(main, words, capsys).endswith(f"{hint}\n")
    assert list(tmp_path.iterdir()) == []


def build() -> Any:
    settings = ModelConfig(name="vit_tiny_patch16_224", arguments={"depth": 1})
    return build_model(settings, num_classes=2, image_size=16)


PIXELS = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 2
CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: train_model(Config(amp="bf17")), "amp: .* got bf17, did you mean bf16?"),  # type: ignore[arg-type]
    (lambda: train_model(Config(), data={"trian": PIXELS}), "got trian, did you mean train?"),
    (lambda: load_model("run", device="cudda"), "got 'cudda', did you mean cuda?"),  # type: ignore[arg-type]
    (lambda: load_model("run", amp="bf17"), "amp: .* got 'bf17', did you mean bf16?"),  # type: ignore[arg-type]
    (lambda: load_model("run", "bset"), "weights: .* got 'bset', did you mean best?"),  # type: ignore[arg-type]
    (lambda: evaluate_run("run", attacks="celan"), "attacks: .* did you mean clean?"),
    (
        lambda: rank_layers(torch.nn.Flatten(), [], criterion="gradient_norms"),
        "criterion: expected one of .*, did you mean gradient-norm?",
    ),
    (
        lambda: rank_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), [], names=["o"]),
        "names: expected layers of the model, got o",
    ),
    (
        lambda: rank_layers(build(), [], names=["blocks.0.atn.qkv"]),
        "names: expected layers of .*, did you mean blocks.0.attn.qkv?",
    ),
    (
        lambda: rank_layers(torch.nn.Flatten(), [], radius="relativ"),  # type: ignore[arg-type]
        "radius: expected absolute or relative, got 'relativ', did you mean relative?",
    ),
    (
        lambda: pgd(
            torch.nn.Flatten(),
            torch.zeros(1, 1, 2, 2),
            torch.zeros(1, dtype=torch.int64),
            epsilon=0.1,
            step_size=0.1,
            steps=1,
            norm="Linf",  # type: ignore[arg-type]
        ),
        "norm: expected linf or l2, got 'Linf', did you mean linf?",
    ),
    (
        lambda: Config.from_recipe("cifar10-safr"),
        "recipe: expected .* did you mean 'cifar10-safer'?",
    ),
    (lambda: export(ExportConfig("run", format="robustbnch")), "did you mean robustbench?"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_a_misspelt_value_in_python_gets_the_nearest_name(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*") + "$") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_value_that_is_known_or_unlike_all_names_gets_none() -> None:
    assert meant("bf16", ["off", "bf16"]) == ""
    assert meant("wombat", ["off", "bf16"]) == ""
    assert meant("", ["off", "bf16"]) == ""
