"""Audits of a cheaper attack: every so often it is compared with a dearer one on a few images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from safer_fast.attacks.adaptive import STRONG_STEPS, AdaptiveSteps, Strength
from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.float8 import LowPrecision
from safer_fast.attacks.pgd import frozen, pixel_gradient, random_start
from safer_fast.attacks.radii import radii_at
from safer_fast.attacks.replayed import CROSS_ENTROPY, PixelLoss, ReplayedAttack
from safer_fast.config.schema import AttackConfig
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.seeds import derive_seed
from safer_fast.runtime.timing import DeviceTime

AGREEMENT, RATIO = "attack_sign_agreement", "attack_loss_ratio"
SHARE = 4
"""An audit of the number of iterations looks at one image of so many of a batch."""
PARTS = 2
"""Of a batch, where such an audit begins a phase or is in doubt."""
MOST_PARTS = 16
"""Of images in one audit of the precision. Where the network is nearly always right, the losses of
64 images give a ratio that scatters by 0.02 about 1: too much to judge an attack by one part."""


class Part(NamedTuple):
    """A few images of a batch, and what attacks on them start from and raise the loss to.

    targets: labels, or clean logits where the attack raises the loss against those.
    """

    start: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor


class Audit:
    """Comparisons of the training attack with dearer ones, which say how cheap it may be.

    `steps` chooses its number of iterations by comparisons with PGD-20, None with a fixed one. A
    precision that is too weak beside amp is not used any more. `attack.audited` holds the figures
    of the last audit of the precision: the share of pixels whose gradient has the same sign at the
    start of the attack, and the loss of the network as it is evaluated after the attack over that
    after the attack in amp. Steps are numbered from 0. Audits wait for the device; all ranks find
    the same.
    """

    def __init__(
        self,
        attack: ReplayedAttack,
        config: AttackConfig,
        ranks: Ranks | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.attack, self.config, self.ranks = attack, config, ranks or Ranks()
        self.steps = AdaptiveSteps(config) if config.steps == "auto" else None
        self.seconds = 0.0
        """Time that audits have taken on this rank since `take_seconds`."""
        self._report = report
        self._own = ReplayedAttack(
            attack.model,
            norm=attack.norm,
            micro_batch=MicroBatch("attack.audit_images"),
            replays=attack.replays,
            name="audit",
        )

    @property
    def attack_steps(self) -> int:
        """Iterations that training attacks take now."""
        return self.config.most_steps if self.steps is None else self.steps.steps

    def take_seconds(self) -> float:
        """Return the seconds of audits since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def begin_phase(self) -> None:
        """Attack at full strength until the next audit: other weights are trained from now on."""
        if self.steps is not None:
            self.steps.begin_phase()

    def sound_alarm(self) -> None:
        """Attack at full strength for a while: the sentinel sees catastrophic overfitting."""
        if self.steps is not None:
            self.steps.sound_alarm()
            self._report(
                f"attack.steps: {self.attack_steps} for the next audits, after a sign of "
                "catastrophic overfitting"
            )

    def choose_steps(
        self,
        num_steps: int,
        images: Tensor,
        labels: Tensor,
        epochs_done: float,
        loss: PixelLoss = CROSS_ENTROPY,
    ) -> None:
        """Audit the number of iterations on images of a batch [B, C, H, W], where that is due.

        A quarter of the batch is enough, `audit_images` at most, where it accepts the number of
        now; else up to `PARTS` times as many decide. epochs_done: see `radii_at`.
        """
        chosen, (epsilon, _) = self.steps, radii_at(self.config, epochs_done)
        if chosen is None or not chosen.is_due(epsilon, num_steps):
            return
        with self._timed(images.device):
            size = min(self.config.audit_images, -(-len(images) // SHARE))
            radius = torch.full((), epsilon, device=images.device)
            cut = self._cut(images, labels, radius, num_steps, size, loss)
            parts = list(islice(cut, PARTS))
            is_search = not chosen.is_audited
            found = self._strengths(parts if is_search else parts[:1], epochs_done, loss)
            if not is_search and not self._accepts_now(found):
                found = self._strengths(parts, epochs_done, loss)
            if news := chosen.update(found, epsilon):
                self._report(f"attack.steps: from step {num_steps} on {news}")

    def __call__(
        self,
        num_steps: int,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        loss: PixelLoss = CROSS_ENTROPY,
    ) -> None:
        """Audit the precision on images of a batch [B, C, H, W] every `audit_every` steps.

        The first `audit_images` of them are enough where the ratio is not below `audit_ratio`. Else
        the next ones are attacked too, each time from another random start, over and over up to
        `MOST_PARTS` times, until the ratio of all losses is not below.
        """
        attack = self.attack
        if attack.precision is None or not attack.steps or num_steps % self.config.audit_every:
            return
        with self._timed(images.device):
            sums = torch.zeros(4, dtype=torch.float64, device=images.device)
            cut = self._cut(images, labels, epsilon, num_steps, self.config.audit_images, loss)
            for part in islice(cut, MOST_PARTS):
                sums += self.ranks.sum_(self._agreement(part, (epsilon, step_size), loss))
                alike, count, own, in_amp = sums.tolist()
                ratio = own / in_amp if in_amp > 0 else 1.0
                if ratio >= self.config.audit_ratio:
                    break
        if self._take_figures({AGREEMENT: alike / count, RATIO: ratio}):
            self._report(
                f"attack.precision: amp from step {num_steps} on (after the attack in "
                f"{self.config.precision} the loss is {ratio:.3f} of that after one in amp, less "
                "than attack.audit_ratio)"
            )

    def state_dict(self) -> dict[str, float]:
        """Return everything that audits have found, as numbers by name."""
        return dict(self.attack.audited) | ({} if self.steps is None else self.steps.state_dict())

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set everything to what `state_dict` returned."""
        figures = {name: state[name] for name in (AGREEMENT, RATIO) if name in state}
        self._take_figures(figures)
        if self.steps is not None:
            self.steps.load_state_dict(state)

    def _take_figures(self, figures: Mapping[str, float]) -> bool:
        """Take over figures of the precision; return True if they end its use."""
        self.attack.audited = dict(figures)
        is_weak = RATIO in figures and not figures[RATIO] >= self.config.audit_ratio
        if is_weak:
            self.attack.precision = None
        return is_weak

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        """Add the time within to `seconds`, eager and with the model frozen."""
        begin = DeviceTime(device)
        eager = torch.compiler.set_stance("force_eager")
        with self.attack.replays.step(), frozen(self.attack.model), eager:
            yield
        self.seconds += begin.seconds_until(DeviceTime(device))

    def _cut(
        self,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        num_steps: int,
        size: int,
        loss: PixelLoss,
    ) -> Iterator[Part]:
        """Parts of `size` images, over and over, each time from another random start.

        Starts are drawn from a generator of their own. Targets are as the network gives them in amp
        for all attacks on a part.
        """
        model, firsts = self.attack.model, range(0, len(images), size)
        for number in count():
            first = firsts[number % len(firsts)]
            own, own_labels = images[first : first + size], labels[first : first + size]
            seed = derive_seed(0, "audit", num_steps, number, self.ranks.rank)
            generator = torch.Generator(images.device).manual_seed(seed)
            start = random_start(own, epsilon, self.attack.norm, generator)
            targets = own_labels
            if loss.against_clean:
                with torch.no_grad():
                    targets = model(model.arrange(own))
            yield Part(start, own, own_labels, targets)

    def _accepts_now(self, found: Mapping[int, Strength]) -> bool:
        """Return true if the number of now is among those found, and high enough."""
        chosen, now = self.steps, self.attack_steps
        return chosen is not None and now in found and chosen.accepts(now, found[now])

    def _strengths(
        self, parts: Sequence[Part], epochs_done: float, loss: PixelLoss
    ) -> dict[int, Strength]:
        """Measure candidates in turn, to the first of now or above that is accepted."""
        chosen = self.steps
        assert chosen is not None
        strong = self._after(parts, STRONG_STEPS, epochs_done, loss, in_amp=True)
        found: dict[int, Strength] = {}
        for steps in chosen.candidates():
            own = self._after(parts, steps, epochs_done, loss)
            both = torch.stack([own[0], strong[0], own[1], strong[1], own[2]])
            found[steps] = Strength(*self.ranks.sum_(both).tolist())
            is_enough = steps >= chosen.steps or not chosen.is_audited
            if is_enough and chosen.accepts(steps, found[steps]):
                break
        return found

    def _after(
        self,
        parts: Sequence[Part],
        steps: int,
        epochs_done: float,
        loss: PixelLoss,
        in_amp: bool = False,
    ) -> Tensor:
        """Loss, number of images right, and number of images after an attack: float64 [3]."""
        config = self.config
        if in_amp and config.step_size is not None:
            config = replace(config, step_size=None)  # PGD-20 reaches everywhere in the ball
        radii = radii_at(config, epochs_done, steps)
        precision = None if in_amp else self.attack.precision
        sums = [self._attack_part(part, radii, steps, precision, loss) for part in parts]
        return torch.stack(sums).sum(0)

    def _attack_part(
        self,
        part: Part,
        radii: tuple[float, float],
        steps: int,
        precision: LowPrecision | None,
        loss: PixelLoss,
    ) -> Tensor:
        """Loss, number of images right, and number of images of a part after an attack."""
        model, own = self.attack.model, self._own
        own.precision = precision
        start, images, labels, targets = part
        attacked = own.attack_images(
            images, targets, *radii, steps=steps, start=start, loss=loss.function
        )
        with torch.no_grad():
            logits = model(model.arrange(attacked))
            num_right = is_right(logits, labels).sum() * loss.counts
            values = loss.function(logits, targets), num_right
        sums = [value.double() for value in values]
        return torch.stack([*sums, sums[0].new_tensor(len(images))])

    def _agreement(self, part: Part, radii: tuple[Tensor, Tensor], loss: PixelLoss) -> Tensor:
        """Pixels of one sign, all pixels, losses after both attacks: float64 [4]."""
        attack, model = self.attack, self.attack.model
        epsilon, step_size = (float(value) for value in radii)
        gradients, losses = [], []
        for precision in (attack.precision, None):
            self._own.precision = precision
            with self._own.in_precision():
                places = model.arrange(part.start)
                gradients.append(pixel_gradient(model, places, part.targets, loss.function))
            sums = self._attack_part(part, (epsilon, step_size), attack.steps, precision, loss)
            losses.append(sums[0])
        first, second = (gradient.sign() for gradient in gradients)
        alike = (first == second).sum()
        return torch.stack([alike.double(), alike.new_tensor(first.numel()).double(), *losses])
