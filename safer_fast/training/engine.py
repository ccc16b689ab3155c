"""The model of a run on its machine: built, compiled, in arenas, with its attack and its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from safer_fast.attacks.audit import Audit
from safer_fast.attacks.float8 import (
    PAYS_FROM,
    LowPrecision,
    check_float8,
    choose_precision,
    fitting,
)
from safer_fast.attacks.float8_timing import Float8Layers, choose_measured
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import Config, ModelConfig, Names
from safer_fast.data import Data
from safer_fast.models.arenas import TrainedWeights
from safer_fast.models.attention import pin_for
from safer_fast.models.build import freeze, prepare
from safer_fast.models.flops import estimate_run
from safer_fast.models.lora import Adapters, check_called
from safer_fast.models.robust_model import compile_blocks, state_of
from safer_fast.models.towers import build_tower, find_text_head
from safer_fast.runtime.attention import Pinned
from safer_fast.runtime.cuda_graphs import Replays
from safer_fast.runtime.device import Runtime, decide_auto
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks
from safer_fast.training.objectives import Objective
from safer_fast.training.optimizers import build_optimizer
from safer_fast.training.step import Step


class Engine:
    """Runtime, model, arenas and attack of one configuration; makes a step for each selection.

    `notes` are lines on fast paths that are off. ranks: the processes that train together.
    resumed_numerics: `numerics_of` the resumed run, whose choices replace those that `auto` would
    make. kept: files of the resumed run with the frozen original and the text embeddings. Raises
    ValueError for settings that do not fit the model.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        data: Data,
        ranks: Ranks | None = None,
        resumed_numerics: Mapping[str, Any] | None = None,
        kept: tuple[Path, Path] | None = None,
    ) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self._resumed_numerics = resumed_numerics or {}
        self.objective = Objective(config.objective, config.attack.loss)
        teacher_file, text_file = kept or (None, None)
        text = find_text_head(config.objective, data.class_names, text_file)
        is_tower = self.objective.is_of_tower
        num_classes = self._resumed_numerics.get("num_classes") if is_tower else data.num_classes
        savings = self._savings()
        torch.manual_seed(config.seed)
        self.model, off = prepare(
            self._model_to_build(),
            runtime.device,
            savings=savings,
            num_classes=num_classes,
            image_size=data.image_size,
            num_channels=data.num_channels,
            compute_dtype=runtime.compute_dtype,
            norms=config.selection.norms,
            normalisation=self._resumed_numerics.get("normalisation"),
        )
        self.new_layers: list[str] = self._resumed_numerics.get("new_layers", self.model.new_layers)
        """Layers whose first weights are random, trained with the selected ones: see `with_new`."""
        notes = [*self.model.notes, *self._note_new(), *off]
        if config.selection.lora_rank:
            notes.append("patch-order, class-token: off (selection.lora_rank)")
            image = torch.zeros(1, data.num_channels, data.image_size, data.image_size)
            check_called(self.model, list(self.model.layers), image.to(runtime.device))
        self.model.take_sizes(Resolution.of(config).smaller)
        self.attention = self._pin_attention(data.image_size)
        work = estimate_run(self.model, config, data.image_size, data.train.images_per_epoch)
        self.runtime = decide_auto(runtime, config.runtime, work)
        self.precision = choose_precision(config.attack.precision, self.model, self._was_amp())
        """Precision of the attack, until an audit ends it."""
        self.float8 = self._choose_float8(data.image_size, notes)
        """Layers whose products the attack computes in FP8; None: it computes as amp does."""
        self.notes = [*self.runtime.notes, *notes]
        if self.attention is not None and self.attention.note is not None:
            self.notes.append(self.attention.note)
        self.replays = self.runtime.replays(self._report)
        self.tower = build_tower(
            self.model,
            text,
            savings,
            file=teacher_file,
            has_teacher=self.objective.needs_teacher,
            micro_batch=self._micro_batch("--batch-size", "auto"),
            replays=self.replays,
            is_compiled=self.runtime.is_compiled,
        )
        if self.runtime.is_compiled:
            compile_blocks(self.model)
        self.arenas = freeze(self.model, savings)
        self.adapters: Adapters | None = None
        """Factors trained beside the layers that were selected last, with `selection.lora_rank`."""
        limits = config.runtime
        self.micro_batch = self._micro_batch("runtime.train_micro_batch", limits.train_micro_batch)
        self.attack = ReplayedAttack(
            self.model,
            norm=config.attack.norm,
            steps=config.attack.most_steps,
            micro_batch=self._micro_batch("runtime.attack_micro_batch", limits.attack_micro_batch),
            replays=self.replays,
            precision=self._low_precision(),
            kind=config.attack.name,
        )
        audited = replace(config.attack, precision=self.precision)
        self.audit = Audit(self.attack, audited, self.ranks, self._report)
        own = self.replays.apart()
        self._evaluation_attack = ReplayedAttack(
            self.tower.classifier,
            norm=config.attack.norm,
            micro_batch=MicroBatch("evaluation", "auto", self._free_for(own), self._report),
            replays=own,
            name="evaluation",
        )

    def step_over(self, names: list[str] | None, rho: float, seed: int = 0) -> Step:
        """Make the step that trains these layers (None: every parameter), with a new optimizer.

        With `selection.lora_rank` it trains factors beside named layers, drawn with the seed;
        earlier factors are merged into the weights.
        """
        config = self.config
        self._fold()
        if self.attack.precision is not None:
            self.attack.precision.move(names)
        selection = self.arenas.select(names) if names is None else self._select(names, seed)
        return Step(
            model=self.model,
            selection=selection,
            optimizer=build_optimizer(config.optim, selection, self.model.inner_layers),
            objective=self.objective,
            sam=replace(config.sam, rho=rho),
            attack=self.attack,
            relative_radius=config.selection.radius == "relative",
            reuses_prefix="prefix" in config.runtime.exact_savings,
            clip_norm=config.optim.clip_norm,
            micro_batch=self.micro_batch,
            replays=self.replays,
            ranks=self.ranks,
        )

    def weights(self) -> Tensor:
        """The weights that the network computes with, merged with factors; fp32, read only.

        They are laid out as the masters.
        """
        if self.adapters is None:
            return self.arenas.master
        merged = self.arenas.master.clone()
        self.adapters.merge_into(self.arenas, merged)
        return merged

    def network_state(self, source: Tensor) -> dict[str, Tensor]:
        """The network's state dict, in timm's names, with weights laid out as the masters.

        Low-rank factors beside its layers are no part of it.
        """
        with nullcontext() if self.adapters is None else self.adapters.away():
            return state_of(self.model.network, self.arenas.state_dict(source))

    @contextmanager
    def reading(self, source: Tensor) -> Iterator[None]:
        """Make the network read these weights, laid out as the masters, without factors."""
        self.arenas.load_compute(source)
        try:
            with nullcontext() if self.adapters is None else self.adapters.away():
                yield
        finally:
            self.arenas.load_compute()

    @contextmanager
    def evaluating(self) -> Iterator[ReplayedAttack]:
        """The attack of evaluations; its memory is free again after the context, for training.

        The weights that the network reads may change within it, its modules may not.
        """
        try:
            yield self._evaluation_attack
        finally:
            self._evaluation_attack.release()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Merge factors into the masters within the context; the network has its own layers."""
        if self.adapters is None:
            yield
            return
        before = self.arenas.master.clone()
        self.adapters.merge_into(self.arenas, self.arenas.master)
        self.arenas.load_compute()
        try:
            with self.adapters.away():
                yield
        finally:
            self.arenas.master.copy_(before)
            self.arenas.load_compute()

    def with_new(self, selected: list[str]) -> list[str]:
        """Add new layers, which nothing has trained and selection may miss, to the selected ones.

        Not after a warm-up, which trains everything, nor to layers that the user names.
        """
        selection = self.config.selection
        if selection.warmup_epochs or selection.layers is not None:
            return selected
        return [*selected, *(name for name in self.new_layers if name not in selected)]

    def _note_new(self) -> list[str]:
        """Lines on new layers, in a run that does not train everything."""
        selection, shown = self.config.selection, ", ".join(self.new_layers)
        if not self.new_layers or selection.warmup_epochs or selection.takes_all:
            return []
        if self.with_new([]):
            return [f"selection: {shown} is new and trained along with the selected layers"]
        return [f"selection.layers: {shown} is new, and stays as drawn unless named"]

    def _savings(self) -> Names:
        """Exact savings of the run, without those that low-rank factors exclude.

        These read weights past the modules that hold them, and would miss the factors.
        """
        off = ("patch-order", "class-token") if self.config.selection.lora_rank else ()
        return Names(name for name in self.config.runtime.exact_savings if name not in off)

    def _model_to_build(self) -> ModelConfig:
        """Settings of the model; a resumed run has weights of its own, and needs no others."""
        if "normalisation" in self._resumed_numerics:
            return replace(self.config.model, pretrained=False, checkpoint=None)
        return self.config.model

    def _fold(self) -> None:
        """Merge factors into the masters, and remove them."""
        if self.adapters is not None:
            self.adapters.merge_into(self.arenas, self.arenas.master)
            self.adapters.detach()
            self.adapters = None
            self.arenas.load_compute()
            self.replays.forget()

    def _select(self, names: list[str], seed: int) -> TrainedWeights:
        """Select the parameters of these layers, or new factors beside their weights."""
        chosen, dtype = self.config.selection, self.arenas.layer_dtype
        if not chosen.lora_rank:
            return self.arenas.select(names)
        layers = {name: self.model.layers[name] for name in names}
        own = chosen.lora_rank, dtype, seed, self.arenas if chosen.adapter == "dora" else None
        self.adapters = Adapters(self.model.network, layers, *own)
        self.replays.forget()  # recordings call the layers without factors
        return self.adapters.selection()

    def _choose_float8(self, image_size: int, notes: list[str]) -> Float8Layers | None:
        """Choose the layers that the attack computes in FP8, on all ranks as rank 0 measures."""
        attack, device = self.config.attack, self.runtime.device
        if self.precision != "fp8":
            return Float8Layers(()) if self.precision == "bf16" else None
        check_float8(device)
        resumed = self._resumed_numerics.get("float8")
        if attack.fp8_from != "auto":
            choice = Float8Layers(fitting(self.model, attack.fp8_from))
        elif resumed is not None:
            names = [name for name in fitting(self.model) if name in resumed]
            choice = Float8Layers(names, self._resumed_numerics.get("float8_rescaled") or ())
        elif device.type != "cuda":
            choice = Float8Layers(fitting(self.model, PAYS_FROM))
        elif self.ranks.is_first:
            batch_size, is_compiled = self._num_attacked_at_once(), self.runtime.is_compiled
            choice = choose_measured(self.model, image_size, batch_size, is_compiled)
            self.ranks.share([list(choice.names), list(choice.rescaled)])
        else:
            choice = Float8Layers(*self.ranks.share(None))
        if not choice.names:
            notes.append(f"attack in FP8: off, in bf16 (attack.fp8_from: {choice.why_none()})")
        elif device.type != "cuda":
            notes.append("attack in FP8: simulated, slower than bf16 (no GPU is used)")
        return choice

    def _was_amp(self) -> bool:
        """Return true for a resumed run whose attack is that of amp."""
        return bool(self._resumed_numerics) and self._resumed_numerics.get("float8") is None

    def _low_precision(self) -> LowPrecision | None:
        """The precision of the attack; None for that of amp."""
        if self.float8 is None:
            return None
        return LowPrecision(self.model, self.float8.names, self.float8.rescaled)

    def _pin_attention(self, image_size: int) -> Pinned | None:
        """Pin the kernel of attention, on all ranks the one that rank 0 finds fastest."""
        wanted, resumed = self.config.runtime.attention, self._resumed_numerics.get("attention")
        if wanted == "auto" and resumed is not None:
            wanted = resumed
        if not self.ranks.is_first:
            wanted = self.ranks.share(None)
        pinned = pin_for(self.model, image_size, self._num_attacked_at_once(), wanted)
        if self.ranks.is_first:
            self.ranks.share(wanted if pinned is None else pinned.backend)
        return pinned

    def _num_attacked_at_once(self) -> int:
        """Images that a rank attacks at a time, unless memory ends: kernels are timed with them."""
        limit, batch_size = self.config.runtime.attack_micro_batch, self.config.batch_size
        own = -(-batch_size // self.ranks.num_ranks)
        return own if limit == "auto" else min(own, limit)

    def _micro_batch(self, flag: str, size: int | Literal["auto"]) -> MicroBatch:
        """A limit of images at a time; CUDA graphs are dropped when memory ends."""
        return MicroBatch(flag, size, self.replays.forget, self._report)

    def _free_for(self, own: Replays) -> Callable[[], bool]:
        """Make the function that frees memory for evaluations: their recordings, not training's.

        It drops training's too where an eighth of a batch does not fit beside them: smaller parts
        would take more time than recording anew does.
        """
        eighth = max(-(-self.config.batch_size // self.ranks.num_ranks) // 8, 1)

        def free() -> bool:
            size = self._evaluation_attack.micro_batch.size
            is_small = size is not None and size <= eighth
            return own.forget() or (is_small and self.replays.forget())

        return free

    def _report(self, line: str) -> None:
        """Print a line on a change during training, above progress bars, on rank 0 alone."""
        if self.ranks.is_first:
            tqdm.write(f"note:       {line}")
