"""Number of iterations of the training attack, chosen by audits: `attack.steps auto`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

from safer_fast.config.schema import AttackConfig

STRONG_STEPS = 20
"""Iterations of the attack that strength is measured against."""
FIRST = 2
"""Fewest iterations right after a start; one is tried only after several audits."""
PATIENCE = {1: 5}
"""Audits in a row that must find fewer iterations enough before they are used, by their number."""
USUAL_PATIENCE = 3
MEMORY = 7 / 8
"""Share that an audit keeps of the counts of those before it: about the last eight count."""
MOST_LOST = 0.005
"""Robust accuracy that fewer iterations may overstate, as a share of the audited images."""
CATASTROPHE = 0.5
"""Strength below which an attack has ceased to work: training overfits to it. FGSM-RS at 0.1 on
digits has 0.64 in good health."""
GROWTH = 2.0
"""Factor by which epsilon may grow in a ramp until the next audit."""
HELD = 10
"""Audits for which iterations stay at their most after a sign of catastrophic overfitting."""


@dataclass
class Strength:
    """Sums over attacked images: losses, and images classified correctly, after two attacks.

    own: after an attack of few iterations. strong: after one of `STRONG_STEPS`, from the same
    start.
    """

    own_loss: float = 0.0
    strong_loss: float = 0.0
    own_right: float = 0.0
    strong_right: float = 0.0
    num_images: float = 0.0

    @property
    def ratio(self) -> float:
        """Loss after the attack over that after the strong one; 1 where that has none.

        NaN, which is never enough, where a loss is not finite.
        """
        return 1.0 if self.strong_loss <= 0 else self.own_loss / self.strong_loss

    @property
    def overstates(self) -> bool:
        """True if the attack leaves more images right than it may: half a percent, or one image."""
        return self.own_right - self.strong_right > max(MOST_LOST * self.num_images, 1.0)

    def plus(self, other: Strength, share: float = 1.0) -> Strength:
        """Return `share` of these sums plus those of `other`."""
        both = zip(astuple(self), astuple(other), strict=True)
        return Strength(*(share * mine + new for mine, new in both))


class AdaptiveSteps:
    """Chooses the fewest iterations that attack nearly as well as PGD-20 does.

    A phase begins at `attack.max_steps`. Its first audit searches upward from `FIRST`; each later
    one raises the number at once where it is too low, and lowers it by one where fewer were enough
    in several audits in a row. The state is a handful of numbers, the same on all ranks.
    """

    def __init__(self, config: AttackConfig) -> None:
        self.config, self.steps = config, config.max_steps
        self.is_audited = False
        """False from the beginning of a phase until its first audit."""
        self.audited_epsilon = 0.0
        self.held, self._room, self._least = 0, 0, 1
        self._past: dict[int, Strength] = {}
        self._ratios: dict[int, float] = {}

    @property
    def strength(self) -> float | None:
        """Strength of the current number in the last audit; None before any has measured it."""
        return self._ratios.get(self.steps)

    def begin_phase(self) -> None:
        """Return to the most iterations until the next audit: the weights learn otherwise now."""
        self._least = 1
        self._restart()

    def sound_alarm(self) -> None:
        """Hold the most iterations for a while: the model overfits to the training attack.

        One iteration alone is not tried again in this phase.
        """
        self._restart()
        self._least, self.held = FIRST, HELD

    def _restart(self) -> None:
        self.steps, self.is_audited = self.config.max_steps, False
        self._room, self._past, self._ratios = 0, {}, {}

    def is_due(self, epsilon: float, num_steps: int) -> bool:
        """Return true if the step after `num_steps`, whose attack has radius epsilon, is audited.

        Besides every `audit_every` steps that is at the beginning of a phase, and where epsilon has
        doubled since the last audit.
        """
        if epsilon <= 0:
            return False
        has_grown = epsilon > GROWTH * self.audited_epsilon
        is_news = not self.held and (has_grown or not self.is_audited)
        return is_news or num_steps % self.config.audit_every == 0

    def candidates(self) -> list[int]:
        """Numbers to measure in turn; the search ends at the first that `accepts`."""
        most = self.config.max_steps
        first = max(self.steps - 1, self._least) if self.is_audited else FIRST
        return [most] if self.held else list(range(min(first, most), most + 1))

    def accepts(self, steps: int, found: Strength) -> bool:
        """Return true if the number is high enough by this audit, and by those before it."""
        past = self._past.get(steps, Strength()).plus(found, MEMORY)
        return found.ratio >= self.config.strength and not past.overstates

    def update(self, found: Mapping[int, Strength], epsilon: float) -> str | None:
        """Choose the number for the next steps from an audit; return a line if that is news.

        found: strength of `candidates`, in order, at least up to the first of now or above that is
        accepted.
        """
        before, was_audited = self.steps, self.is_audited
        accepted = [steps for steps in found if self.accepts(steps, found[steps])]
        for steps, strength in found.items():
            self._past[steps] = self._past.get(steps, Strength()).plus(strength, MEMORY)
            self._ratios[steps] = strength.ratio
        self.is_audited, self.audited_epsilon = True, epsilon
        if self.held:
            self.held -= 1
            self.is_audited = self.held > 0
            return None
        if was_audited and before in found and found[before].ratio < CATASTROPHE:
            ratio = found[before].ratio
            self.sound_alarm()
            return (
                f"{before} iterations have ceased to work (strength {ratio:.2f}): "
                f"{self.steps} for the next {HELD} audits"
            )
        enough = [steps for steps in accepted if steps >= before or not was_audited]
        self.steps = min(enough, default=self.config.max_steps)
        fewer = before - 1
        self._room = self._room + 1 if was_audited and fewer in accepted else 0
        if self.steps != before:
            self._room = 0
        elif self._room >= PATIENCE.get(fewer, USUAL_PATIENCE):
            self.steps, self._room = fewer, 0
        return None

    def state_dict(self) -> dict[str, float]:
        """Return the state as numbers by name, for JSON."""
        state: dict[str, float] = {
            "steps": self.steps,
            "is_audited": int(self.is_audited),
            "audited_epsilon": self.audited_epsilon,
            "held": self.held,
            "room": self._room,
            "least": self._least,
        }
        names = [item.name for item in fields(Strength)]
        for steps, past in self._past.items():
            values = zip(names, astuple(past), strict=True)
            state |= {f"{steps} {name}": value for name, value in values}
            state[f"{steps} ratio"] = self._ratios[steps]
        return state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the state to what `state_dict` returned; an empty one begins a phase."""
        if "steps" not in state:
            return self.begin_phase()
        self.steps, self.is_audited = int(state["steps"]), bool(state["is_audited"])
        self.audited_epsilon = state["audited_epsilon"]
        self.held, self._room = int(state["held"]), int(state["room"])
        self._least = int(state["least"])
        measured = sorted({int(name.split()[0]) for name in state if name[0].isdigit()})
        names = [item.name for item in fields(Strength)]
        self._past = {
            steps: Strength(*(state[f"{steps} {name}"] for name in names)) for steps in measured
        }
        self._ratios = {steps: state[f"{steps} ratio"] for steps in measured}
        return None
