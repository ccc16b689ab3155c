"""The arms, starts and scales of the CIFAR-10 experiment, as settings of safer_fast.train.

An arm is a handful of settings on top of what all arms of a scale have in common, so that any of
them can be typed: `safer_fast.train --model.checkpoint START <common> <arm>`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

Settings = dict[str, object]

EPSILON, STEP_SIZE, STEPS = "8/255", "2/255", 10
_ALL: Settings = {"selection.criterion": "all", "selection.every_epochs": 0}
_SAFER: Settings = {"selection.criterion": "sharpness", "sam.rho": 0.05}
_BLOCKS: Settings = {**_SAFER, "selection.candidates": "blocks.*"}
_TRADES: Settings = {"objective.name": "trades"}

ARMS: dict[str, Settings] = {
    "PGD-AT": {**_ALL, "sam.rho": 0},
    "SAFER": _SAFER,
    "random, SAM": {**_SAFER, "selection.criterion": "random"},
    "SAM on all": {**_ALL, "sam.rho": 0.05},
    "PGD-AT, low rate": {**_ALL, "sam.rho": 0},
    "PGD-AT, EMA": {**_ALL, "sam.rho": 0, "optim.ema_decay": 0.998},
    "sharpest, no SAM": {**_SAFER, "sam.rho": 0},
    "SAFER, relative radius": {**_SAFER, "selection.radius": "relative"},
    "SAFER, blocks, fraction 25 %": {**_BLOCKS, "selection.fraction": 0.25},
    "least sharp, SAM": {**_SAFER, "selection.criterion": "least-sharp"},
    "criticality, SAM": {**_SAFER, "selection.criterion": "criticality"},
    "AWP": {**_ALL, "sam.rho": 0.005, "sam.layerwise": True, "selection.radius": "relative"},
    "TRADES": {**_ALL, **_TRADES, "sam.rho": 0},
    "TRADES, SAFER": {**_SAFER, **_TRADES},
}
"""From the most important on. CLAT is `criticality` with SAM in place of plain training, so that
its criterion is what differs. AWP: Wu et al. (2020) with their gamma of 0.005."""
BASELINE = "PGD-AT"
"""The arm that differences are taken to."""
MAIN = ("PGD-AT", "SAFER", "random, SAM", "SAM on all")
"""Arms that have all seeds before any other has its first."""
UPPER = ("SAFER, blocks", "SAFER, upper half", "SAFER, last quarter")
"""SAFER with candidates from the blocks alone, without patch embedding and head; or upper ones."""
STEPS_ARMS: dict[str, Settings] = {
    f"{name}, {what}": {**ARMS[name], "attack.steps": steps, "attack.step_size": None}
    for name in ("PGD-AT", "SAFER")
    for what, steps in (("PGD-10", STEPS), ("auto", "auto"))
}
"""Arms against PGD-10 and against as many iterations as `attack.steps auto` finds enough."""
RATES = {"low rate": 0.1, "a third of the rate": 1 / 3, "three times the rate": 3.0}
"""Learning rates as factors of that of the other arms, by how an arm's name ends."""
FIRST_HALF = "blocks.0.*,blocks.1.*"
"""Layers of the first half of four blocks."""

_CHANGES: dict[str, Settings] = {
    "rho 0.02": {"sam.rho": 0.02},
    "rho 0.1": {"sam.rho": 0.1},
    "rho 0.2": {"sam.rho": 0.2},
    "fraction 25 %": {"selection.fraction": 0.25},
    "relative radius, fraction 25 %": {"selection.radius": "relative", "selection.fraction": 0.25},
    "blocks, fraction 25 %, no SAM": {**_BLOCKS, "selection.fraction": 0.25, "sam.rho": 0},
    "blocks, fraction 25 %, rho 0.1": {**_BLOCKS, "selection.fraction": 0.25, "sam.rho": 0.1},
    "blocks, fraction 25 %, rho 0.2": {**_BLOCKS, "selection.fraction": 0.25, "sam.rho": 0.2},
    "fraction 10 %": {"selection.fraction": 0.1},
    "fraction 2 %": {"selection.fraction": 0.02},
    "selected once": {"selection.every_epochs": 0},
    "low rate": {},
}
SENSITIVITY = {f"SAFER, {what}": {**_SAFER, **settings} for what, settings in _CHANGES.items()}
"""SAFER with one setting changed; `Scale.arms` adds those that hang on the scale."""
_OPTIMIZERS: dict[str, Settings] = {
    "Muon": {"optim.name": "muon"},
    "SGD": {"optim.name": "sgd", "optim.learning_rate": 0.1, "optim.weight_decay": 1e-4},
}
OPTIMIZER_ARMS: dict[str, Settings] = {
    f"{name}, {what}": {**ARMS[name], **settings}
    for name in ("PGD-AT", "SAFER")
    for what, settings in _OPTIMIZERS.items()
}
"""Arms with another optimizer than AdamW: Muon with AdamW's rate, SGD with that of the recipes."""

_QUARTER: Settings = {**_BLOCKS, "selection.fraction": 0.25}
VARIANT_ARMS: dict[str, Settings] = {
    "PGD-AT, APGD-2": {
        **ARMS["PGD-AT"],
        "attack.name": "apgd",
        "attack.steps": 2,
        "attack.step_size": None,
    },
    "PGD-AT, growing images": {**ARMS["PGD-AT"], "data.resolution_schedule": "16@0.5,32"},
    "SAFER, blocks, fraction 25 %, LoRA": {**_QUARTER, "selection.lora_rank": 8},
    "SAFER, blocks, fraction 25 %, DoRA": {
        **_QUARTER,
        "selection.lora_rank": 8,
        "selection.adapter": "dora",
    },
}
"""Arms with two iterations of Auto-PGD, with half of the epochs at 16 pixels, and with factors of
rank 8 beside the selected layers in place of the layers themselves."""

QUARTER = "SAFER, blocks, fraction 25 %"
"""What the search begins with: the best arm of the reduced experiment."""
_SEARCHES: dict[str, Settings] = {
    "rho 0.2": {"sam.rho": 0.2},
    "fraction 50 %": {"selection.fraction": 0.5},
    "fraction 100 %": {"selection.fraction": 1.0},
    "relative radius": {"selection.radius": "relative"},
    "half of the first half": {"selection.candidates": FIRST_HALF, "selection.fraction": 0.5},
    "all of the first half": {"selection.candidates": FIRST_HALF, "selection.fraction": 1.0},
    "selected every epoch": {"selection.every_epochs": 1},
    "EMA": {"optim.ema_decay": 0.998},
    "Muon": _OPTIMIZERS["Muon"],
    "SGD": _OPTIMIZERS["SGD"],
    "a third of the rate": {},
    "three times the rate": {},
    # changes that alone had a higher sum of both accuracies, together
    "fraction 50 %, Muon": {"selection.fraction": 0.5, **_OPTIMIZERS["Muon"]},
    "fraction 50 %, a third of the rate": {"selection.fraction": 0.5},
    "fraction 50 %, Muon, a third of the rate": {
        "selection.fraction": 0.5,
        **_OPTIMIZERS["Muon"],
    },
}
SEARCH_ARMS: dict[str, Settings] = {
    f"search, {what}": {**_QUARTER, **settings} for what, settings in _SEARCHES.items()
}
"""A quarter of the blocks' layers with one thing changed, or several, to choose from on validation
images."""
SEARCHED = (BASELINE, QUARTER, *SEARCH_ARMS)
CHOSEN = "SAFER, blocks, fraction 50 %, Muon"
CHOSEN_ARMS: dict[str, Settings] = {CHOSEN: SEARCH_ARMS["search, fraction 50 %, Muon"]}
"""The arm of the search that its rule chose (docs/experiment.md)."""
COMPARED = (
    BASELINE,
    "SAFER",
    QUARTER,
    "PGD-AT, low rate",
    "PGD-AT, EMA",
    "AWP",
    "criticality, SAM",
    "PGD-AT, Muon",
    CHOSEN,
)
"""Arms of the comparison at scale `medium`, the one that the search chose last."""


@dataclass(frozen=True)
class Scale:
    """The size of an experiment.

    models: settings by model name. common: of every run. start: of the shared start alone, which
    ends `patience` epochs after its best or after `start_epochs`. attack_steps with PGD's step size
    of 2/255 where they are 10, else the default of `attack.step_size`. Numbers of images: 0 is all.
    searched: arms that are trained first, for validation images alone. compared: arms of a
    comparison that was fixed before, with AutoAttack of all seeds at the best and the last epoch;
    where there are any, there are no others.
    """

    name: str
    models: dict[str, Settings]
    train_images: int
    validation_images: int
    test_images: int
    autoattack_images: int
    gap_images: int
    """Training images that the gap to validation is measured on."""
    start_epochs: int
    arm_epochs: int
    every_epochs: int
    attack_steps: int | str
    batch_size: int
    learning_rate: float
    clean_epochs: int
    ramp_epochs: int
    num_blocks: int
    evaluation_batch_size: int
    augmentation: str = "crop"
    patience: int = 20
    common: Settings = field(default_factory=dict)
    searched: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()

    def start_settings(self, model: str) -> dict[str, object]:
        """Adversarial training of everything at a constant rate, with a ramp of epsilon."""
        return self._shared(model) | {
            **ARMS[BASELINE],
            "epochs": self.start_epochs,
            "attack.clean_epochs": self.clean_epochs,
            "attack.epsilon_warmup_epochs": self.ramp_epochs,
            "optim.schedule": "constant",
            "optim.warmup_epochs": 1,
            "evaluation.patience": self.patience,
        }

    def arm_settings(self, model: str, arm: str) -> dict[str, object]:
        """An arm from a start: the rate falls to 0 along a cosine, the same for all arms."""
        factors = [factor for name, factor in RATES.items() if arm.endswith(name)]
        rate = self.learning_rate * (factors[0] if factors else 1)
        shared = self._shared(model) | {
            "epochs": self.arm_epochs,
            "selection.fraction": 0.05,
            "selection.every_epochs": self.every_epochs,
            "optim.schedule": "cosine",
            "optim.warmup_epochs": 0.5,
        }
        return shared | {"optim.learning_rate": rate, **self.arms()[arm]}

    def arms(self) -> dict[str, Settings]:
        """All arms by name: those of the table, where candidates begin, and sensitivity."""
        half, last = self.num_blocks // 2, self.num_blocks - max(1, self.num_blocks // 4)
        upper: dict[str, Settings] = {
            name: {**_BLOCKS, "selection.from_block": lowest}
            for name, lowest in zip(UPPER, (0, half, last), strict=True)
        }
        half_time = {**_SAFER, "selection.warmup_epochs": self.arm_epochs // 2}
        half_of_half = {**upper[UPPER[1]], "selection.fraction": 0.5}
        more: dict[str, Settings] = {
            "SAFER, upper half, fraction 50 %": half_of_half,
            "SAFER, after PGD-AT for half the epochs": half_time,
        }
        if self.every_epochs != 5:
            more["SAFER, selected every 5"] = {**_SAFER, "selection.every_epochs": 5}
        found = ARMS | upper | SENSITIVITY | more | OPTIMIZER_ARMS | VARIANT_ARMS | STEPS_ARMS
        if self.compared:
            found |= SEARCH_ARMS | CHOSEN_ARMS
            found = {name: found[name] for name in dict.fromkeys((*self.compared, *self.searched))}
        return found

    def _shared(self, model: str) -> dict[str, object]:
        steps = self.attack_steps
        return {
            "amp": "bf16",
            "batch_size": self.batch_size,
            "attack.epsilon": EPSILON,
            "attack.steps": steps,
            **({"attack.step_size": STEP_SIZE} if steps == STEPS else {}),
            "optim.name": "adamw",
            "optim.learning_rate": self.learning_rate,
            "optim.weight_decay": 0.05,
            "optim.clip_norm": 1.0,
            "data.augmentation": self.augmentation,
            "data.num_workers": 0,
            "evaluation.max_images": None,
            "evaluation.sentinel_images": 0,
            "evaluation.attacks": ["clean"],
            "model.name": model,
            **self.models[model],
            **self.common,
        }


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="full",
            models={
                "deit_tiny_patch16_224": {"model.patch_size": 4},
                "vit_small_patch16_224": {"model.patch_size": 4},
            },
            train_images=0,
            validation_images=2000,
            test_images=0,
            autoattack_images=1000,
            gap_images=2000,
            start_epochs=200,
            arm_epochs=20,
            every_epochs=10,
            attack_steps=STEPS,
            batch_size=128,
            learning_rate=5e-4,
            clean_epochs=2,
            ramp_epochs=8,
            num_blocks=12,
            evaluation_batch_size=1000,
        ),
        Scale(
            name="reduced",
            models={
                "vit_tiny_patch16_224": {
                    "model.patch_size": 8,
                    "model.arguments": {"depth": 4},
                }
            },
            train_images=9000,
            validation_images=1000,
            test_images=1000,
            autoattack_images=1000,
            gap_images=1000,
            start_epochs=100,
            arm_epochs=6,
            every_epochs=3,
            attack_steps=3,
            batch_size=64,
            learning_rate=1e-3,
            clean_epochs=1,
            ramp_epochs=4,
            num_blocks=4,
            evaluation_batch_size=250,
            augmentation="none",  # so that it overfits within an hour
        ),
    )
}
SCALES["small"] = replace(
    SCALES["reduced"],
    name="small",
    models={
        "vit_tiny_patch16_224": {
            "model.patch_size": 8,
            "model.arguments": {"depth": 4, "embed_dim": 96},
        }
    },
    train_images=6000,
    start_epochs=60,
    patience=12,
)
"""So small that a CPU attacks all seeds of a few arms with AutoAttack within hours."""
SCALES["medium"] = replace(
    SCALES["small"],
    name="medium",
    train_images=0,
    validation_images=2000,
    test_images=4000,
    gap_images=2000,
    start_epochs=40,
    patience=10,
    arm_epochs=5,
    every_epochs=0,
    attack_steps="auto",
    batch_size=128,
    ramp_epochs=3,
    evaluation_batch_size=1000,
    augmentation="crop",
    searched=SEARCHED,
    compared=COMPARED,
)
"""All of CIFAR-10 for a CPU with two cores and ten hours, in a network small enough for AutoAttack
of every arm and seed."""
