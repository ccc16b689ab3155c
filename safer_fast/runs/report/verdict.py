"""The verdict of a report: what was gained against the start, at which threat model, how sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path

from safer_fast.config.messages import shortened
from safer_fast.runs.accuracies import interval
from safer_fast.runs.report.evaluations import (
    Evaluation,
    attack_name,
    facts_of,
    has_distances,
    strongest,
    weights_and_splits,
)
from safer_fast.runs.report.reading import ReportedRun, flatten
from safer_fast.runs.report.tables import percent, progress

_ROBUST = ("autoattack", "pgd")
_MINUS = "\N{MINUS SIGN}"


def title(runs: Sequence[ReportedRun]) -> str:
    """Method and data, as far as they are known."""
    methods = {method_name(run) for run in runs}
    data = {data_name(run) for run in runs}
    names = [next(iter(methods))] if len(methods) == 1 else []
    names += [f"on {next(iter(data))}"] if len(data) == 1 and "" not in data else []
    name = " ".join(names)
    if len(runs) == 1:
        return name
    return f"{len(runs)} runs compared" + (f": {name}" if name else "")


def verdict(runs: Sequence[ReportedRun]) -> str:
    """One sentence on what the runs reached, empty where nothing under attack was measured."""
    return _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)


def method_name(run: ReportedRun) -> str:
    """A short name of the way in which the run trains."""
    criterion, rho = run.setting("selection.criterion"), run.setting("sam.rho")
    if run.setting("attack.steps") == 0:
        return "Clean training"
    objective = str(run.setting("objective.name") or "pgd-at")
    base = shortened(objective.upper())
    if objective == "pgd-at":
        base = shortened(f"{run.setting('attack.name') or 'pgd'}-at".upper())
    if criterion is None:
        return "Adversarial training"
    if criterion == "all" and not run.setting("selection.layers"):
        if not rho:
            return base
        is_awp = run.setting("sam.layerwise") and run.setting("selection.radius") == "relative"
        own = "AWP" if is_awp else "SAM on all layers"
    elif criterion == "sharpness" and rho and not run.setting("selection.layers"):
        own = "SAFER"
    else:
        layers = "named" if run.setting("selection.layers") else shortened(str(criterion))
        own = f"Fine-tuning of {layers} layers {'with' if rho else 'without'} SAM"
    return own if base == "PGD-AT" else f"{own} with {base}"


def data_name(run: ReportedRun) -> str:
    """A short name of the data; empty where it is not known."""
    if "data.path" not in flatten(run.config):
        return ""
    return shortened(Path(str(run.setting("data.path") or "digits")).stem)


def difference(start: Evaluation, end: Evaluation) -> tuple[float, float, float]:
    """Gain from start to end and its 95 % interval (Newcombe, 1998, of Wilson's intervals).

    It takes the accuracies as those of different images, which is cautious for the same ones.
    """
    first, last = start.accuracy, end.accuracy
    assert first is not None
    assert last is not None
    low_0, high_0 = interval(first, start.num_images)
    low_1, high_1 = interval(last, end.num_images)
    gain = last - first
    below, above = hypot(last - low_1, high_0 - first), hypot(high_1 - last, first - low_0)
    return gain, gain - below, gain + above


def _gain(start: Evaluation, end: Evaluation) -> float:
    """Gain in accuracy, of both as they are shown."""
    return round((end.accuracy or 0.0), 3) - round((start.accuracy or 0.0), 3)


def _distances(run: ReportedRun, split: str) -> str:
    """A sentence on the embedding distances of a tower without classes, empty for others."""
    weights = (*_ends(run), "start")
    found = [strongest(run, "pgd", w, split, of_distances=True) for w in weights]
    start = found[-1]
    end = next((one for one in found if one is not None), None)
    if end is None:
        return ""
    is_comparable = start is not None and replace(start, weights=end.weights) == end != start
    is_comparable &= not _is_from_before(run, end.weights)
    facts = ", ".join(facts_of(replace(end, seed=None)).values())
    change = f"is {end.loss:.3g} {'at the start' if end is start else 'in the end'}"
    if start is not None and is_comparable:
        assert start.loss is not None
        assert end.loss is not None
        gain = "less" if end.loss < start.loss else "more" if end.loss > start.loss else "the same"
        change = f"is {gain} in the end: {start.loss:.3g} at the start, {end.loss:.3g} after it"
    return (
        "The mean squared distance of embeddings of attacked images to the original's of clean "
        f"ones {change}, under {attack_name(end)}, {facts} of the {split} split, {end.weights} "
        f"weights.{_before_safer(run)}"
    )


def _ends(run: ReportedRun) -> tuple[str, str]:
    """Weights to compare with the start: the best, unless they are from before SAFER."""
    return ("last", "best") if _is_from_before(run, "best") else ("best", "last")


def _is_from_before(run: ReportedRun, weights: str) -> bool:
    """True for the best weights where they are those of an epoch before SAFER began."""
    return weights == "best" and run.best_epoch() < run.first_safer_epoch()


def _before_safer(run: ReportedRun, of_run: str = "") -> str:
    """A sentence on best weights that SAFER never touched, empty where it did."""
    if not _is_from_before(run, "best"):
        return ""
    return (
        f" The best weights{of_run} are those of epoch {run.best_epoch():.0f}, before SAFER began "
        f"in epoch {run.first_safer_epoch()}."
    )


def _of_one(run: ReportedRun) -> str:
    begun = "" if run.is_finished else "So far: "
    places = weights_and_splits(run)
    split = "test" if "test" in {split for _, split in places} else next((s for _, s in places), "")
    end = next((w for w in _ends(run) if (w, split) in places), None)
    if distances := _distances(run, split):
        return begun + distances
    if end is None or (robust := _robust(run, end, split)) is None:
        return f"{begun}{progress(run)} epochs, and no accuracy under attack has been measured yet."
    clean, first_clean = (strongest(run, "clean", w, split) for w in (end, "start"))
    start = strongest(run, robust.kind, "start", split)
    where = _where(robust, end, split)
    before = _before_safer(run)
    if start is None or replace(start, weights=end) != robust or _is_from_before(run, end):
        also = f" and {percent(clean.accuracy)} without" if clean and clean.accuracy else ""
        return (
            f"{begun}{method_name(run)} reached {_share(robust)} {where}{also}; "
            f"there is no start to compare with.{before}"
        )
    _, low, high = difference(start, robust)
    gain = _gain(start, robust)
    also = ""
    if clean and first_clean and replace(first_clean, weights=end) == clean:
        also = f"; clean accuracy {_points(_gain(first_clean, clean))} points"
    interval_ = f"95 % interval {_points(low)} to {_points(high)}, one run"
    reached = f"{_bound(robust)}{percent(robust.accuracy or 0.0)}"
    change = f"{percent(start.accuracy or 0.0)} at the start, {reached} after it"
    if low <= 0 <= high:
        what = (
            "made no difference to robust accuracy that can be told from chance: "
            f"{change} ({_points(gain)} points, {interval_})"
        )
    else:
        verb = "gained" if gain > 0 else "lost"
        what = f"{verb} {abs(100 * gain):.1f} points of robust accuracy: {change} ({interval_})"
    return f"{begun}{method_name(run)} {what}, {where}{also}.{before}"


def _of_several(runs: Sequence[ReportedRun]) -> str:
    found = []
    split = "test"
    # data with no test split of their own are measured on the validation split
    if not any(split in {own for _, own in weights_and_splits(run)} for run in runs):
        split = "validation"
    for run in runs:
        places = weights_and_splits(run)
        ends = [(w, split) for w in ("best", "last") if (w, split) in places]
        if not ends or (robust := _robust(run, *ends[0])) is None:
            if names := [run.name for run in runs if has_distances(run)]:
                return (
                    f"Embedding distances, here of {' and '.join(names)}, compare only with those "
                    "of runs that began with the same weights."
                )
            yet = "" if run.is_finished else " yet"
            return f"{run.name} has no accuracy under attack on its {split} split{yet}."
        found.append((run, robust))
    first = found[0][1]
    if any(replace(one, weights=first.weights) != first for _, one in found):
        return "The runs were measured under different attacks: their figures do not compare."
    (best, top), (second, other), *_ = sorted(found, key=lambda pair: -(pair[1].accuracy or 0))
    _, low, high = difference(other, top)
    lead = f"{_points(_gain(other, top))} points over {second.name}"
    sure = f"95 % interval {_points(low)} to {_points(high)}, one run each"
    chance = ", which can be chance" if low <= 0 <= high else ""
    where = _where(top, top.weights, split)
    before = "".join(_before_safer(run, f" of {run.name}") for run, _ in found)
    ahead = f"{lead} ({sure}){chance}"
    return f"{best.name} is the most robust with {_share(top)} {where}: {ahead}.{before}"


def _robust(run: ReportedRun, weights: str, split: str) -> Evaluation | None:
    """The strongest evaluation under attack; of AutoAttack and PGD the one that the start has."""
    found = [strongest(run, kind, weights, split) for kind in _ROBUST]
    known = [one for one in found if one is not None and one.num_images > 0]
    starts = [strongest(run, one.kind, "start", split) for one in known]
    comparable = [
        one
        for one, start in zip(known, starts, strict=True)
        if start is not None and replace(start, weights=weights) == one
    ]
    return next(iter([*comparable, *known]), None)


def _where(one: Evaluation, weights: str, split: str) -> str:
    """The threat model of an accuracy, its images and weights."""
    facts = ", ".join(facts_of(replace(one, seed=None)).values())
    return f"under {attack_name(one)}, {facts} of the {split} split, {weights} weights"


def _share(one: Evaluation) -> str:
    low, high = interval(one.accuracy or 0.0, one.num_images)
    return (
        f"{_bound(one)}{percent(one.accuracy or 0.0)} robust accuracy "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )


def _bound(one: Evaluation) -> str:
    """A word for accuracies of which gradient masking is suspected."""
    return "at most " if one.gradient_masking else ""


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", _MINUS)
