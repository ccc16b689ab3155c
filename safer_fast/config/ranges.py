"""Ranges of all numbers that users give: from the smallest with a meaning to the largest sane."""

from __future__ import annotations

from typing import NamedTuple

EPOCHS = 10**6
STEPS = 10**9
IMAGES = 10**9
ITERATIONS = 10**4
"""Most iterations of an attack: each is a forward and a backward pass."""
EDGE = 2**14
"""Most pixels along an edge of an image."""
CHANNELS = 4
"""Most channels of an image whose data are not known yet."""
FACTOR = 10**3
"""Largest rate, weight or radius of weights; no run is known to need a tenth of it."""


class Range(NamedTuple):
    """An interval of numbers, both ends included, and the words for what lies outside of it.

    too_small, too_large: what is expected in place of a smaller (or NaN), of a larger number.
    """

    smallest: float
    largest: float
    too_small: str
    too_large: str

    def expected(self, value: float) -> str | None:
        """What a message says is expected in place of `value`; None for a value inside."""
        if self.smallest <= value <= self.largest:
            return None
        return self.too_large if value > self.largest else self.too_small


def _count(smallest: float, largest: float, auto: str = "") -> Range:
    return Range(
        smallest, largest, f"{auto}at least {smallest:g}", f"{auto}at most {largest:,.10g}"
    )


def _above(smallest: float, largest: float) -> Range:
    """Numbers above 0; `smallest` is what is told apart from it."""
    return Range(smallest, largest, "above 0", f"at most {largest:,.10g}")


def _between(smallest: float, largest: float, words: str) -> Range:
    return Range(smallest, largest, words, words)


SEED = _between(0, 2**31, "a whole number from 0 to 2^31")
FRACTION = _between(1e-9, 1, "a share above 0, at most 1")
EPSILON = Range(
    0,
    2 * EDGE,
    "a radius of at least 0",
    "a radius for pixels in [0, 1] such as 8/255",
)
"""The ball's own limits follow from the norm and the images: `validation.check_ball`."""
STEP_SIZE = Range(0, 4 * EDGE, "at least 0", EPSILON.too_large)

TRAIN: dict[str, Range] = {
    "seed": SEED,
    "epochs": _count(1, EPOCHS),
    "batch_size": _count(1, IMAGES),
    "model.patch_size": _count(1, EDGE),
    "model.drop_path_rate": _between(0, 0.99, "a share from 0 to 0.99"),
    "data.validation_fraction": _between(0.001, 0.9, "a share from 0.001 to 0.9"),
    "data.max_images": _count(1, IMAGES),
    "data.image_size": _count(2, EDGE),
    "data.randaugment": _between(0, 30, "a magnitude from 0 to 30"),
    "data.random_erasing": _between(0, 1, "a share from 0 to 1"),
    "data.mixup": _count(0, FACTOR),
    "data.cutmix": _count(0, FACTOR),
    "data.num_workers": _count(0, 1024),
    "data.prefetch": _count(1, 1024),
    "attack.epsilon": EPSILON,
    "attack.steps": _count(0, ITERATIONS),
    "attack.step_size": STEP_SIZE,
    "attack.clean_epochs": _count(0, EPOCHS),
    "attack.epsilon_warmup_epochs": _count(0, EPOCHS),
    "attack.fp8_from": _count(0, 2**40, "auto or "),
    "attack.audit_every": _count(1, STEPS),
    "attack.audit_images": _count(1, IMAGES),
    "attack.audit_ratio": _between(0, 1, "a share from 0 to 1"),
    "objective.beta": _count(0, FACTOR),
    "objective.label_smoothing": _between(0, 0.99, "a share from 0 to 0.99"),
    "selection.fraction": FRACTION,
    "selection.every_epochs": _count(0, EPOCHS),
    "selection.warmup_epochs": _count(0, EPOCHS),
    "selection.rho": _above(1e-12, FACTOR),
    "selection.from_block": _count(0, EDGE),
    "selection.num_images": _count(1, IMAGES),
    "selection.lora_rank": _count(0, EDGE),
    "sam.rho": _count(0, FACTOR),
    "optim.learning_rate": _above(1e-12, FACTOR),
    "optim.safer_learning_rate": _above(1e-12, FACTOR),
    "optim.weight_decay": _count(0, FACTOR),
    "optim.momentum": _between(0, 0.9999, "a share from 0 to 0.9999"),
    "optim.warmup_epochs": _count(0, EPOCHS),
    "optim.decay": _between(0, 1, "a factor from 0 to 1"),
    "optim.min_learning_rate": _count(0, FACTOR),
    "optim.clip_norm": _above(1e-12, 10**9),
    "optim.ema_decay": _between(0, 0.999999, "a share from 0 to 0.999999"),
    "runtime.num_threads": _count(1, 4096),
    "runtime.attack_micro_batch": _count(1, IMAGES, "auto or "),
    "runtime.train_micro_batch": _count(1, IMAGES, "auto or "),
    "runtime.log_every_steps": _count(1, STEPS),
    "runtime.max_skipped_steps": _count(1, STEPS),
    "checkpoint.every_steps": _count(1, STEPS),
    "checkpoint.every_minutes": _above(1e-9, 10**7),
    "checkpoint.keep": _count(1, 10**6),
    "checkpoint.grace_s": _above(1e-3, 10**7),
    "evaluation.every_epochs": _count(1, EPOCHS),
    "evaluation.steps": _count(1, ITERATIONS),
    "evaluation.max_images": _count(1, IMAGES),
    "evaluation.patience": _count(1, EPOCHS),
    "evaluation.sentinel_images": _count(0, IMAGES),
}
EVALUATE: dict[str, Range] = {
    "epsilon": EPSILON,
    "restarts": _count(1, ITERATIONS),
    "num_images": _count(1, IMAGES),
    "batch_size": _count(1, IMAGES),
    "seed": SEED,
}
SELECT: dict[str, Range] = {
    "fraction": FRACTION,
    "rho": _above(1e-12, FACTOR),
    "from_block": _count(0, EDGE),
    "epsilon": EPSILON,
    "steps": _count(0, ITERATIONS),
    "num_images": _count(1, IMAGES),
    "seed": SEED,
}
DOCTOR: dict[str, Range] = {
    name: limits
    for name, limits in TRAIN.items()
    if name == "batch_size" or name.startswith("data.")
}
