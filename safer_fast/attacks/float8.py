"""An attack that is less exact than amp, as the network is frozen there and only signs count.

Features go from block to block in bf16, and matrices may be multiplied in FP8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import nn

from safer_fast.attacks.float8_layers import FORWARD, Float8Linear, Float8Mlp, multiply
from safer_fast.kernels.float8 import quantise
from safer_fast.models.exact_savings import TokenBlock
from safer_fast.models.robust_model import RobustModel

MULTIPLE = 16
"""Rows and columns of a matrix must be multiples of it for a GPU's FP8 product."""
PAYS_FROM = 2**21
"""Matrices of fewer elements stay as they are where nothing is timed: an estimate, as quantising
would cost what the product gains."""
LEAST_CAPABILITY = (8, 9)


Precision = Literal["amp", "bf16", "fp8"]


def choose_precision(
    wanted: Literal["auto", Precision], model: RobustModel, was_amp: bool = False
) -> Precision:
    """Precision of an attack on the model; auto: bf16 on a GPU, and amp where that is no different.

    was_amp: a resumed run attacks in amp, and auto keeps to it.
    """
    if wanted != "auto":
        return wanted
    is_on_gpu = model.mean.device.type == "cuda"
    has_narrow_features = model.compute_dtype == torch.bfloat16 and model.num_blocks > 0
    return "bf16" if is_on_gpu and has_narrow_features and not was_amp else "amp"


def check_float8(device: torch.device) -> None:
    """Raise ValueError for a GPU that has no FP8 products: those before Ada and Hopper.

    The same holds where PyTorch has none with scales of rows, as for some GPUs newer than it.
    """
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        major, minor = capability
        raise ValueError(
            "--attack.precision: expected amp or bf16 on a GPU without FP8 (compute capability "
            f"8.9 or newer), got fp8 on {name} ({major}.{minor})"
        )
    try:
        values, scales = quantise(torch.ones(MULTIPLE, MULTIPLE, device=device), FORWARD)
        multiply(values, scales, values, scales, torch.ones_like(scales[:, 0]))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--attack.precision: expected amp or bf16 where PyTorch {torch.__version__} has no "
            f"FP8 product with a scale for each row, got fp8 on {name} ({reason})"
        ) from error


def fitting(model: RobustModel, least: int = 0) -> list[str]:
    """Names of the layers that FP8 is for: linear ones of the blocks with `least` elements or more.

    Edges are multiples of 16. A last block that computes class tokens alone has little to gain.
    """
    spared = {m for b in model.blocks if isinstance(b, TokenBlock) for m in b.inner.modules()}
    names = []
    for name in model.layers:
        module = model.network.get_submodule(name)
        in_block = 0 <= model.block_of(name) < model.num_blocks
        fits = type(module) is nn.Linear and all(n % MULTIPLE == 0 for n in module.weight.shape)
        if in_block and fits and module not in spared and module.weight.numel() >= least:
            names.append(name)
    return names


class LowPrecision:
    """Features in bf16, FP8 copies of layers' matrices, and the switch that makes a model use them.

    names: of layers, all of them `fitting`; none: features alone. rescaled: names of those whose
    products are scaled in a pass of their own. Copies of layers that training changes are made anew
    before each attack, the others after `move`.
    """

    def __init__(
        self, model: RobustModel, names: Sequence[str], rescaled: Collection[str] = ()
    ) -> None:
        self.is_on = False
        self._model = model
        self.layers = {
            name: Float8Linear.adopt(
                cast(nn.Linear, model.network.get_submodule(name)),
                self,
                "rescaled" if name in rescaled else "rows",
            )
            for name in names
        }
        parents = [name.removesuffix(".fc1") for name in names if name.endswith(".fc1")]
        for parent in parents:
            if f"{parent}.fc2" in self.layers:
                Float8Mlp.adopt(model.network.get_submodule(parent))
        self._moving: list[str] | None = []
        self._is_valid = False

    def move(self, names: Sequence[str] | None) -> None:
        """Name the layers that training changes from now on, None: all; copy all of them anew."""
        self._moving = None if names is None else [name for name in names if name in self.layers]
        self._is_valid = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights that may have changed since the last call."""
        moving: Iterable[str] = self.layers if self._moving is None else self._moving
        for name in moving if self._is_valid else self.layers:
            self.layers[name].quantise_weight()
        self._is_valid = True

    @contextmanager
    def used(self) -> Iterator[None]:
        """Make the network compute with the copies, on features in bf16, within a `with` block."""
        self.refresh()
        self.switch(True)
        try:
            yield
        finally:
            self.switch(False)

    def switch(self, is_on: bool) -> None:
        """Make the network compute with the copies as they are, or as in amp, from now on."""
        self.is_on = is_on
        self._model.feature_dtype = torch.bfloat16 if is_on else None
