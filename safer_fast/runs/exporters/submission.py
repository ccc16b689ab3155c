"""Submission to RobustBench: the claim in its format, the text of its issue, what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.commands import ExportConfig
from safer_fast.config.messages import printable
from safer_fast.runs.exporters.claimed_data import (
    DATASETS,
    dataset_of,
    describe_claimed,
    name_claimed,
    of_claimed_data,
)
from safer_fast.runs.exporters.facts import evaluations
from safer_fast.runs.trained_on import TRAINED_ON, was_trained_on

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

CLAIM, ISSUE, LOG = "claim.json", "submission.md", "autoattack.jsonl"
NORMS = {"linf": "Linf", "l2": "L2"}


def write_submission(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write claim.json, submission.md and autoattack.jsonl, if there is a claim; return a line.

    A claim needs an evaluation of these weights under AutoAttack in Linf or L2, of the run's test
    split or of the data that `--claim-data` names: one of the run's own radius first, then that of
    the most images, the last of several. Raises ValueError for named data that nothing can claim.
    """
    norm, epsilon = loaded.config.attack.norm, float(loaded.config.attack.epsilon)
    events = [event for event in evaluations(config) if not event.get("corruption")]

    def rank(event: Mapping[str, Any]) -> tuple[bool, int]:
        own = _norm(event, norm) == norm and abs(event["epsilon"] - epsilon) < 1e-9
        return own, event["num_images"]

    candidates = [
        event
        for event in events
        if event["attack"] == "autoattack"
        and _norm(event, norm) in NORMS
        and _clean(events, event) is not None
    ]
    claimed = of_claimed_data(candidates, config.claim_data)
    if not claimed:
        return f"no {CLAIM}: the {config.weights} weights were not evaluated {_needs(candidates)}"
    robust = max(reversed(claimed), key=rank)
    if was_trained_on(loaded, robust):
        place = name_claimed(robust)
        if config.claim_data is None:
            return f"no {CLAIM}: the {place} holds training images"
        raise ValueError(
            "--claim-data: expected images that the run was not trained on, got training images: "
            f"{place}"
        )
    clean = _clean(events, robust)
    assert clean is not None
    claim = _claim(loaded, clean, robust)
    (folder / CLAIM).write_text(json.dumps(claim, indent=2) + "\n", encoding="utf-8")
    threat = NORMS[_norm(robust, norm)]
    (folder / ISSUE).write_text(_issue(claim, threat, robust, config.license), encoding="utf-8")
    public = [{k: v for k, v in event.items() if k != "path"} for event in (clean, robust)]
    lines = [json.dumps(event) + "\n" for event in public]
    (folder / LOG).write_text("".join(lines), encoding="utf-8")
    note = ""
    if claim["dataset"] not in DATASETS:
        known = ", ".join(DATASETS)
        note = f"note: RobustBench has no leaderboard of {claim['dataset']}, only of {known}\n"
    return (
        f"{CLAIM} is of {describe_claimed(robust)}\n{note}"
        f"submit it: {ISSUE} has the fields of RobustBench's issue New Model(s)"
    )


def _needs(candidates: Sequence[Mapping[str, Any]]) -> str:
    """The words for the evaluation that a claim needs, and for others that a flag can claim."""
    names = [str(event["split"]) for event in candidates]
    others = dict.fromkeys(printable(name) for name in names if not name.endswith(TRAINED_ON))
    if not others:
        return "under clean,autoattack"
    return (
        "under clean,autoattack on the run's test split, but on other data, which --claim-data "
        f"names: {', '.join(others)}"
    )


def radius(epsilon: float) -> str:
    """A radius as the leaderboards write it: 8/255, 0.5."""
    levels = epsilon * 255
    is_whole = levels >= 1 and abs(levels - round(levels)) < 1e-4
    return f"{round(levels)}/255" if is_whole else f"{epsilon:.6g}"


def _norm(event: Mapping[str, Any], own: str) -> str:
    return str(event.get("norm") or own)


def _clean(events: list[dict[str, Any]], robust: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last event of the same images without an attack."""
    same = [
        event
        for event in events
        if event["attack"] == "clean"
        and all(event.get(n) == robust.get(n) for n in ("split", "path", "num_images", "of_images"))
    ]
    return same[-1] if same else None


def _claim(
    loaded: LoadedRun, clean: Mapping[str, Any], robust: Mapping[str, Any]
) -> dict[str, Any]:
    """A claim with the names of `model_info`; texts that only its authors know are empty."""
    model, data = loaded.config.model, loaded.config.data
    has_extra = data.extra_path is not None or bool(loaded.known_data.num_extra)
    has_more = has_extra or model.pretrained or model.checkpoint is not None
    accuracy = f"{100 * robust['accuracy']:.2f}"
    return {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": has_more,
        "number_forward_passes": 1,
        "dataset": dataset_of(loaded, robust),
        "venue": "",
        "architecture": model.name,
        "eps": radius(robust["epsilon"]),
        "clean_acc": f"{100 * clean['accuracy']:.2f}",
        "reported": accuracy,
        "autoattack_acc": accuracy,
        "n_examples": robust["num_images"],
    }


def _issue(claim: Mapping[str, Any], threat: str, robust: Mapping[str, Any], license: str) -> str:
    """The fields of the issue `New Model(s)`; those of the paper are to be filled in."""
    images = f"{robust['num_images']} of {robust.get('of_images') or robust['num_images']}"
    method = f"AutoAttack, standard version, {images} images of split {printable(robust['split'])}"
    fields = {
        "# Paper Information": {"Paper Title": "", "Paper URL": "", "Paper authors": ""},
        "# Leaderboard Claim(s)\n\n## Model 1": {
            "Architecture": claim["architecture"],
            "Threat Model": threat,
            "eps": claim["eps"],
            "Clean accuracy": claim["clean_acc"],
            "Robust accuracy": claim["autoattack_acc"],
            "Additional data": str(claim["additional_data"]).lower(),
            "Evaluation method": method,
            "Checkpoint and code": "",
        },
        "# Model Zoo": {"License": "" if license == "other" else printable(license)},
    }
    parts = []
    for title, values in fields.items():
        lines = [f"- **{name}**: {value}".rstrip() for name, value in values.items()]
        parts.append("\n".join([title, "", *lines]))
    return "\n\n".join(parts) + "\n"
