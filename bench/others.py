"""The SAFER step made of torchattacks and pytorch-optimizer, as shipped and tuned."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn import functional
from torchattacks import PGD

from bench.implementation import Implementation
from bench.memory import memory_handed_back
from safer_fast.models.attention import pin_for
from safer_fast.runtime.device import Runtime
from safer_fast.training.reference import PlainModel
from safer_fast.training.step import Step

Attention = dict[str, bool]
TORCHS_CHOICE: Attention = dict.fromkeys(("flash", "mem_efficient", "cudnn", "math"), True)


def peers_as_shipped(
    arguments: argparse.Namespace, runtime: Runtime, step: Step, inputs: tuple[Tensor, ...]
) -> Implementation:
    """As their front pages show them: all weights, autocast, eager, torch's choice of attention."""
    model = _plain(step, arguments)
    return _implementation(
        model,
        list(model.parameters()),
        arguments,
        inputs,
        surroundings=lambda: as_without_us(runtime, TORCHS_CHOICE),
    )


def peers_tuned(
    arguments: argparse.Namespace,
    runtime: Runtime,
    step: Step,
    inputs: tuple[Tensor, ...],
) -> Implementation:
    """Over the selected layers only, the rest frozen, and stored in bf16; compiled block by block.

    The attack differentiates the images alone: selected weights require no gradients meanwhile.
    Attention is the fastest there is without ours' demand that it repeats bit for bit.
    """
    with as_without_us(runtime, TORCHS_CHOICE):
        pin_for(step.model, arguments.image_size, arguments.batch_size, "auto")
        attention = attention_in_use()
    model = _plain(step, arguments)
    names = {name for layer in step.selection.names for name in step.model.layers[layer]}
    layers = {name for own in step.model.layers.values() for name in own}
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
        if arguments.amp == "bf16" and name in layers - names:
            parameter.data = parameter.data.bfloat16()
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = _implementation(
        model,
        chosen,
        arguments,
        inputs,
        surroundings=lambda: as_without_us(runtime, attention),
        freezes_attack=True,
    )
    tuned.compile = lambda: _compile_blocks(model)
    return tuned


@contextmanager
def as_without_us(runtime: Runtime, attention: Attention) -> Iterator[None]:
    """Settings that a run of ours makes for the whole process are what others would run with.

    Kernels need not be deterministic, large blocks of memory go back to the system (CPU), and the
    attention is the one given.
    """
    with ExitStack() as stack:
        stack.enter_context(memory_handed_back(runtime.device))
        stack.callback(use_attention, attention_in_use())
        use_attention(attention)
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        stack.callback(torch.use_deterministic_algorithms, is_deterministic)
        torch.use_deterministic_algorithms(False)
        yield


def attention_in_use() -> Attention:
    """Which kernels torch may choose from for attention, by the names of `TORCHS_CHOICE`."""
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in TORCHS_CHOICE}


def use_attention(attention: Attention) -> None:
    """Torch chooses from these kernels for attention."""
    for name, is_on in attention.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_on)


def _plain(step: Step, arguments: argparse.Namespace) -> PlainModel:
    """Timm's network in fp32 with the weights of our step, under autocast if asked."""
    autocast = torch.bfloat16 if arguments.amp == "bf16" else None
    return PlainModel(step.model, torch.float32, autocast).eval()


def _implementation(
    model: nn.Module,
    parameters: list[nn.Parameter],
    arguments: argparse.Namespace,
    inputs: tuple[Tensor, ...],
    surroundings: Callable[[], AbstractContextManager[None]],
    freezes_attack: bool = False,
) -> Implementation:
    images, labels, epsilon, step_size = inputs
    attacker = PGD(model, eps=float(epsilon), alpha=float(step_size), steps=arguments.steps)
    optimizer = SAM(parameters, torch.optim.AdamW, rho=arguments.rho, lr=1e-3, use_gc=False)
    held: dict[str, Tensor] = {}

    def attack() -> None:
        for parameter in parameters if freezes_attack else ():
            parameter.requires_grad_(False)
        held["adversarial"] = attacker(images, labels)
        for parameter in parameters if freezes_attack else ():
            parameter.requires_grad_(True)

    def loss() -> Any:
        return functional.cross_entropy(model(held["adversarial"]), labels)

    def rest() -> None:
        loss().backward()
        optimizer.first_step(zero_grad=True)
        loss().backward()
        optimizer.second_step(zero_grad=True)

    def step() -> None:
        attack()
        rest()

    return Implementation(step, {"attack": attack, "rest": rest}, surroundings=surroundings)


def _compile_blocks(model: PlainModel) -> None:
    for block in model.network.get_submodule("blocks").children():
        block.compile(dynamic=False)
