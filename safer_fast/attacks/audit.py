"""Audit of a cheaper attack: every so often it is compared with one in amp on a few images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from safer_fast.attacks.pgd import frozen, pixel_gradient, random_start
from safer_fast.attacks.replayed import CROSS_ENTROPY, PixelLoss, ReplayedAttack
from safer_fast.config.schema import AttackConfig
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.seeds import derive_seed

AGREEMENT, RATIO = "attack_sign_agreement", "attack_loss_ratio"
MOST_PARTS = 16
"""Of images in one audit. Where the network is nearly always right, the losses of 64 images give a
ratio that scatters by 0.02 about 1: too much to judge an attack by one part."""


class Audit:
    """Comparison of an attack with one in amp; ends the use of its precision where it is too weak.

    `attack.audited` holds the figures of the last audit: the share of pixels whose gradient has the
    same sign at the start of the attack, and the loss of the network as it is evaluated after the
    attack over that after the attack in amp. Steps are numbered from 0.
    """

    def __init__(
        self,
        attack: ReplayedAttack,
        config: AttackConfig,
        ranks: Ranks | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.attack, self.config, self.ranks = attack, config, ranks or Ranks()
        self._report = report

    def __call__(
        self,
        num_steps: int,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        loss: PixelLoss = CROSS_ENTROPY,
    ) -> None:
        """Audit the attack on images of a batch [B, C, H, W] every `audit_every` steps.

        The first `audit_images` of them are enough where the ratio is not below `audit_ratio`. Else
        the next ones are attacked too, each time from another random start, over and over up to
        `MOST_PARTS` times, until the ratio of all losses is not below. An audit waits for the
        device. All ranks find the same.
        """
        attack = self.attack
        if attack.precision is None or not attack.steps or num_steps % self.config.audit_every:
            return
        size, ratio = self.config.audit_images, 0.0
        parts = range(0, len(images), size)
        sums = torch.zeros(4, dtype=torch.float64, device=images.device)
        for number in range(MOST_PARTS):
            first = parts[number % len(parts)]
            part = slice(first, first + size)
            start = self._start(images[part], epsilon, num_steps, number)
            found = self._measure(start, images[part], labels[part], (epsilon, step_size), loss)
            sums += self.ranks.sum_(found)
            alike, count, own, in_amp = sums.tolist()
            ratio = own / in_amp if in_amp > 0 else 1.0
            if ratio >= self.config.audit_ratio:
                break
        if self.load({AGREEMENT: alike / count, RATIO: ratio}):
            self._report(
                f"attack.precision: amp from step {num_steps} on (after the attack in "
                f"{self.config.precision} the loss is {ratio:.3f} of that after one in amp, less "
                "than attack.audit_ratio)"
            )

    def load(self, figures: Mapping[str, float]) -> bool:
        """Take over figures of the last audit; return True if they end the use of the precision."""
        self.attack.audited = dict(figures)
        is_weak = RATIO in figures and not figures[RATIO] >= self.config.audit_ratio
        if is_weak:
            self.attack.precision = None
        return is_weak

    def _start(self, images: Tensor, epsilon: Tensor, num_steps: int, number: int) -> Tensor:
        """Start of both attacks of a part, drawn from a generator of its own."""
        seed = derive_seed(0, "audit", num_steps, number, self.ranks.rank)
        generator = torch.Generator(images.device).manual_seed(seed)
        return random_start(images, epsilon, self.attack.norm, generator)

    def _measure(
        self,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        radii: tuple[Tensor, Tensor],
        loss: PixelLoss,
    ) -> Tensor:
        """Pixels of one sign, all pixels, losses after both attacks: float64 [4]."""
        attack, model = self.attack, self.attack.model
        gradients, losses = [], []
        with frozen(model), torch.compiler.set_stance("force_eager"):
            targets = labels
            if loss.against_clean:
                with torch.no_grad():
                    targets = model(model.arrange(images))
            # both attacks are compared by the same targets, as the network computes them in amp
            same = PixelLoss(lambda logits, _: loss.function(logits, targets))
            for precision in (attack.precision, None):
                one = ReplayedAttack(
                    model,
                    norm=attack.norm,
                    steps=attack.steps,
                    micro_batch=MicroBatch("attack.audit_images"),
                    precision=precision,
                )
                with one.in_precision():
                    places = model.arrange(start)
                    gradients.append(pixel_gradient(model, places, targets, loss.function))
                attacked = one(images, labels, *radii, loss=same, start=start)
                with torch.no_grad():
                    losses.append(loss.function(model(attacked), targets).double())
        first, second = (gradient.sign() for gradient in gradients)
        alike = (first == second).sum()
        return torch.stack([alike.double(), alike.new_tensor(first.numel()).double(), *losses])
