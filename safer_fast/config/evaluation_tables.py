"""Tables of an evaluation: several threat models, data sets and corruptions in one command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from safer_fast.config.attack_names import LIBRARY_ATTACKS, ThreatModel, fits_norm
from safer_fast.config.checks import check_ball, check_file
from safer_fast.config.commands import EvaluateConfig, attacks_of
from safer_fast.config.messages import meant, shortened

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen corruptions of ImageNet-C (Hendrycks & Dietterich, 2019)."""
SEVERITIES = (1, 2, 3, 4, 5)


def is_table(config: EvaluateConfig) -> bool:
    """True if the settings ask for more than one ball or data set."""
    return bool(config.threat_models or config.other_data or config.corruptions or config.json)


def check_tables(config: EvaluateConfig) -> None:
    """Raise ValueError for tables of several balls, data sets or corruptions that cannot be."""
    threats = parse_threat_models(config.threat_models)
    given = {"--norm": config.norm, "--epsilon": config.epsilon}
    if threats and (beside := [flag for flag, value in given.items() if value is not None]):
        got = " and ".join(beside)
        raise ValueError(f"--threat-models: expected no --norm or --epsilon beside it, got {got}")
    norms = [threat.norm for threat in threats] or [config.norm or "linf"]
    for norm in norms if config.attacks is not None else ():
        if not any(fits_norm(name, norm) for name in attacks_of(config)):
            raise ValueError(
                f"--attacks: expected an attack for {norm}, {', '.join(LIBRARY_ATTACKS)}, "
                f"got {','.join(attacks_of(config))}"
            )
    known = ("all", *CORRUPTIONS)
    for name in config.corruptions:
        if name not in known:
            raise ValueError(
                f"--corruptions: expected all or some of {', '.join(CORRUPTIONS)}, got "
                f"{shortened(repr(name))}{meant(name, known)}"
            )
    check_file(config.json, "--json")


def parse_threat_models(texts: Sequence[str]) -> list[ThreatModel]:
    """Threat models of texts such as linf:8/255; raises ValueError for any other text."""
    found = []
    for text in texts:
        norm, _, radius = text.partition(":")
        try:
            epsilon = float(Fraction(radius))
        except (ValueError, ZeroDivisionError):
            epsilon = math.nan
        norms = ("linf", "l2", "l1")
        if norm not in norms or not epsilon >= 0:
            hint = "" if norm in norms else meant(norm, norms).replace("?", f":{radius}?")
            raise ValueError(
                "--threat-models: expected linf:EPSILON, l2:EPSILON or l1:EPSILON, "
                f"got {shortened(repr(text))}{shortened(hint)}"
            )
        check_ball(norm, epsilon, flags=("--threat-models", ""))
        found.append(ThreatModel(norm, epsilon))  # type: ignore[arg-type]
    return found
