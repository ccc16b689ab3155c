"""Tables of final accuracies: in short, in full, and class by class.

A figure stands beside others only with what it depends on: attack, norm, radius, number of images,
and the model whose images they are. What a whole column shares its heading says, else each cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safer_fast.attacks.masking import suspicions
from safer_fast.runs.accuracies import interval
from safer_fast.runs.report.reading import ReportedRun
from safer_fast.runs.report.tables import NOTHING, Cell, Table, percent, radius

_WEIGHTS = ("start", "best", "last")
_KINDS = ("clean", "fgsm", "pgd")
_NORMS = {"linf": "Linf", "l2": "L2"}
_HEADLINE = {"clean": "clean", "pgd": "PGD", "autoattack": "AutoAttack"}


@dataclass(frozen=True)
class Evaluation:
    """An accuracy, or an embedding distance as `loss`; equality compares all that it depends on."""

    weights: str
    split: str
    attack: str
    norm: str
    epsilon: float
    source: str
    restarts: int
    seed: int | None
    num_images: int
    of_images: int
    is_distance: bool
    text_embeddings: str
    accuracy: float | None = field(compare=False)
    loss: float | None = field(compare=False)
    num_not_finite: int = field(compare=False)
    num_zero_gradients: int = field(compare=False)
    start_accuracy: float | None = field(compare=False)
    per_class: Sequence[float | None] = field(compare=False)
    gradient_masking: Sequence[str] = field(compare=False, default=())

    @property
    def kind(self) -> str:
        """The attack without its number of steps."""
        return self.attack if self.num_steps == math.inf else self.attack.partition("-")[0]

    @property
    def num_steps(self) -> float:
        """K of an attack named pgd-K, infinity for others."""
        steps = self.attack.partition("-")[2]
        return int(steps) if steps.isascii() and steps.isdigit() and len(steps) < 10 else math.inf


def weights_and_splits(run: ReportedRun) -> list[tuple[str, str]]:
    """Weights and splits that were evaluated, start first."""
    return _places(_evaluations(run))


def strongest(
    run: ReportedRun, kind: str, weights: str, split: str, *, of_distances: bool = False
) -> Evaluation | None:
    """The hardest test by a kind of attack: on the model itself, in training's ball, most steps."""
    found = [one for one in _evaluations(run) if one.is_distance is of_distances]
    return _strongest(run, found, kind, weights, split)


def has_distances(run: ReportedRun) -> bool:
    """True for a run of which embedding distances were measured."""
    return any(one.is_distance for one in _evaluations(run))


def meaning_of_weights(runs: Sequence[ReportedRun]) -> str:
    """A sentence on the weights that rows are named by."""
    chosen = {
        "smallest embedding distance under attack"
        if any(value is not None for value in run.series("embedding_distance"))
        else "best robust accuracy"
        for run in runs
    }
    return (
        "start: the weights that SAFER began with; best: those of the "
        f"{' or '.join(sorted(chosen))} on the validation split; last: those after the last epoch."
    )


def headline(runs: Sequence[ReportedRun], *, of_distances: bool = False) -> Table:
    """A row for each run, weights and split: clean, under the strongest PGD, and AutoAttack.

    Rows of one split stand together, and name it in a column where there are several.
    of_distances: embedding distances in place of accuracies.
    """
    found = [[one for one in _evaluations(r) if one.is_distance is of_distances] for r in runs]
    places = [(i, *place) for i, ones in enumerate(found) for place in _places(ones)]
    has_splits = len({split for _, _, split in places}) > 1
    places.sort(key=lambda place: place[2] if has_splits else "")
    columns = [
        _column(title, [_strongest(runs[i], found[i], kind, *place) for i, *place in places])
        for kind, title in _HEADLINE.items()
        if any(one.kind == kind and not one.source for ones in found for one in ones)
    ]
    names = ["split"] * has_splits + ["run"] * (len(runs) > 1) + ["weights"]
    rows = []
    for number, (index, weights, split) in enumerate(places):
        own = [Cell(runs[index].name)] * (len(runs) > 1) + [Cell(weights, f"{split} split")]
        rows.append([*[Cell(split)] * has_splits, *own, *(cells[number] for _, cells in columns)])
    return Table([*names, *(heading for heading, _ in columns)], rows, len(names))


def all_evaluations(runs: Sequence[ReportedRun]) -> Table:
    """All accuracies: a row for each attack and setting; a column for each run, or its weights."""
    is_alone = len(runs) == 1
    columns = _columns_of_weights(runs[0]) if is_alone else [(r.name, _by_key(r)) for r in runs]
    keys = sorted({key for _, column in columns for key in column}, key=_order)
    rows = []
    for key in keys:
        own = [Cell(key.split), Cell(key.attack, ", ".join(facts_of(key).values()))]
        own = own if is_alone else [Cell(key.weights), *own]
        rows.append([*own, *(_accuracy(column.get(key), has_loss=True) for _, column in columns)])
    named = ["split", "attack"] if is_alone else ["weights", "split", "attack"]
    return Table([*named, *(name for name, _ in columns)], rows, len(named))


def per_class(runs: Sequence[ReportedRun]) -> list[tuple[str, Table]]:
    """Accuracy by class under each attack, of runs that measured it; the lowest is marked."""
    tables = []
    for run in runs:
        columns = sorted((one for one in _evaluations(run) if one.per_class), key=_order)
        if columns:
            tables.append((run.name, _class_table(columns, _class_names(run))))
    return tables


def alarms(runs: Sequence[ReportedRun]) -> list[str]:
    """Warnings, one for each run with accuracies that are suspected to be too high."""
    sentences = []
    for run in runs:
        if found := sorted((one for one in _evaluations(run) if one.gradient_masking), key=_order):
            name = f"{run.name}: " if len(runs) > 1 else ""
            places = ", ".join(f"{one.weights} {one.split} {one.attack}" for one in found[:8])
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            sentences.append(
                f"{name}gradient masking suspected under {places}{more}. These attacks found no "
                "gradients to follow, or another one did far better: their figures are upper "
                "bounds of the robust accuracy."
            )
    return sentences


def _evaluations(run: ReportedRun) -> list[Evaluation]:
    """The newest accuracy of each attack and setting, with its signs of gradient masking."""
    return list(_by_key(run).values())


def _by_key(run: ReportedRun) -> dict[Evaluation, Evaluation]:
    found = {}
    for event in run.evaluations:
        one = _evaluation(event, run)
        found[one] = one
    signs = suspicions([vars(one) for one in found.values()])
    return {
        one: replace(one, gradient_masking=reasons)
        for one, reasons in zip(found.values(), signs, strict=True)
    }


def _columns_of_weights(run: ReportedRun) -> list[tuple[str, dict[Evaluation, Evaluation]]]:
    """Accuracies by everything that they depend on except the weights, for each weights."""
    columns: dict[str, dict[Evaluation, Evaluation]] = {}
    for one in sorted(_evaluations(run), key=_order):
        columns.setdefault(one.weights, {})[replace(one, weights="")] = one
    return list(columns.items())


def _evaluation(event: Mapping[str, Any], run: ReportedRun) -> Evaluation:
    """The accuracy in an event; where it names no norm, with the norm of the run."""
    attack = str(event.get("attack"))
    is_distance = event.get("accuracy") is None and event.get("embedding_distance") is not None
    own = run.setting("attack.norm")
    norm = event.get("norm") or (own if isinstance(own, str) else "")
    return Evaluation(
        weights=str(event.get("weights")),
        split=str(event.get("split")),
        attack=attack,
        norm="" if attack == "clean" else norm,
        epsilon=0.0 if attack == "clean" else float(event.get("epsilon") or 0.0),
        source=event.get("source") or "",
        restarts=1 if attack == "clean" else int(event.get("restarts") or 1),
        seed=None if attack == "clean" or event.get("seed") is None else int(event["seed"]),
        num_images=int(event.get("num_images") or 0),
        of_images=int(event.get("of_images") or event.get("num_images") or 0),
        is_distance=is_distance,
        text_embeddings=str(event.get("text_embeddings") or ""),
        accuracy=event.get("accuracy"),
        loss=event["embedding_distance"] if is_distance else event.get("loss"),
        num_not_finite=int(event.get("num_not_finite") or 0),
        num_zero_gradients=int(event.get("num_zero_gradients") or 0),
        start_accuracy=event.get("start_accuracy"),
        per_class=event.get("per_class_accuracy") or (),
    )


def _strongest(
    run: ReportedRun, evaluations: Sequence[Evaluation], kind: str, weights: str, split: str
) -> Evaluation | None:
    own = run.setting("attack.norm"), run.number("attack.epsilon") or 0.0

    def strength(one: Evaluation) -> tuple[Any, ...]:
        is_own = one.norm == own[0] and math.isclose(one.epsilon, own[1], rel_tol=1e-6)
        return is_own, one.num_steps, one.restarts, one.num_images

    fitting = [
        one
        for one in evaluations
        if (one.weights, one.split, one.kind, one.source) == (weights, split, kind, "")
        and (one.is_distance or one.accuracy is not None)
    ]
    return max(reversed(fitting), key=strength, default=None)


def _column(title: str, column: Sequence[Evaluation | None]) -> tuple[str, list[Cell]]:
    """Heading of a column with facts that its accuracies share, and its cells with the others."""
    facts = [_headline_facts(one) for one in column if one is not None]
    first = facts[0] if facts else {}
    shared = [name for name in first if all(other.get(name) == first[name] for other in facts)]
    known = [first[name] for name in shared if name != "attack"]
    heading = ", ".join([first["attack"] if "attack" in shared else title, *known])
    cells = []
    for one in column:
        own = {} if one is None else _headline_facts(one)
        cells.append(_accuracy(one, [own[name] for name in own if name not in shared]))
    return heading, cells


def _headline_facts(one: Evaluation) -> dict[str, str]:
    """Facts that a column must not mix; seeds may: they differ by less than the intervals say."""
    facts = facts_of(replace(one, seed=None))
    return {"attack": attack_name(one)} | facts


def attack_name(one: Evaluation) -> str:
    """The attack as a heading names it: PGD-20."""
    return _HEADLINE.get(one.kind, one.kind) + _steps_note(one)


def _steps_note(one: Evaluation) -> str:
    return "" if one.num_steps == math.inf else f"-{one.num_steps}"


def facts_of(one: Evaluation) -> dict[str, str]:
    """Facts that an accuracy depends on besides weights, split and attack, in words."""
    facts = {}
    if one.epsilon > 0:
        norm = _NORMS.get(one.norm, one.norm)
        facts["ball"] = f"\N{GREEK SMALL LETTER EPSILON} = {radius(one.epsilon)} {norm}".rstrip()
    if one.restarts > 1:
        facts["restarts"] = f"{one.restarts:,} restarts"
    if one.seed is not None:
        facts["seed"] = f"seed {one.seed}"
    if one.source:
        facts["source"] = f"images made for {one.source}"
    if one.text_embeddings:
        facts["texts"] = f"texts of {one.text_embeddings}"
    if one.num_images > 0:
        of_images = f" of {one.of_images:,}" if one.num_images < one.of_images else ""
        facts["images"] = f"{one.num_images:,}{of_images} images"
    return facts


def _accuracy(one: Evaluation | None, facts: Sequence[str] = (), *, has_loss: bool = False) -> Cell:
    """The share with its interval, and these facts in small print."""
    if one is not None and one.is_distance:
        about = ["squared distance of embeddings to the original's"] * has_loss
        return Cell(f"{one.loss:.3g}", ", ".join([*about, *facts]))
    if one is None or one.accuracy is None:
        return Cell(NOTHING)
    notes = []
    if one.num_images > 0:
        low, high = interval(one.accuracy, one.num_images)
        notes.append(f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}")
    notes += facts
    if one.gradient_masking:
        reasons = "; ".join(one.gradient_masking)
        notes.append(f"an upper bound, gradient masking suspected: {reasons}")
    if one.num_not_finite:
        notes.append(f"logits not finite on {one.num_not_finite:,} images, which count as wrong")
    if has_loss and one.loss is not None:
        notes.append(f"loss {one.loss:.3g}")
    bound = "\N{LESS-THAN OR EQUAL TO} " if one.gradient_masking else ""
    return Cell(bound + percent(one.accuracy), ", ".join(notes))


def _class_table(columns: Sequence[Evaluation], names: Sequence[str]) -> Table:
    lowest = [min((v for v in one.per_class if v is not None), default=None) for one in columns]
    rows = []
    for number in range(max(len(one.per_class) for one in columns)):
        cells = []
        for one, low in zip(columns, lowest, strict=True):
            value = one.per_class[number] if number < len(one.per_class) else None
            text = NOTHING if value is None else percent(value)
            cells.append(Cell(text, is_different=value is not None and value == low))
        rows.append([Cell(names[number] if number < len(names) else str(number)), *cells])
    headings = [
        ", ".join([f"{one.weights} {one.split} {one.attack}", *facts_of(one).values()])
        for one in columns
    ]
    return Table(["class", *headings], rows)


def _class_names(run: ReportedRun) -> list[str]:
    about = run.model.get("safer_fast")
    names = about.get("class_names") if isinstance(about, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _places(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    return sorted({(one.weights, one.split) for one in evaluations}, key=_place_order)


def _place_order(place: tuple[str, str]) -> tuple[int, str, str]:
    weights, split = place
    return _weights_order(weights), weights, split


def _weights_order(weights: str) -> int:
    return _WEIGHTS.index(weights) if weights in _WEIGHTS else len(_WEIGHTS)


def _order(one: Evaluation) -> tuple[Any, ...]:
    strength = _KINDS.index(one.kind) if one.kind in _KINDS else len(_KINDS)
    place = (_weights_order(one.weights), one.weights, one.split, one.epsilon > 0, strength)
    ball = (one.num_steps, one.attack, one.norm, one.epsilon, one.source, one.text_embeddings)
    return (*place, *ball, one.restarts, -1 if one.seed is None else one.seed, one.num_images)
