"""Settings of the commands that take a run: typed dataclasses like those of schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.hints import hinting
from safer_fast.config.ranges import above_zero, at_least, ranged
from safer_fast.config.schema import DataConfig, Names, Radius

_MACHINE_FIELDS = {"runtime.device": "device"}
DATA_FIELDS = _MACHINE_FIELDS | {
    f"data.{name}": name for name in ("path", "image_column", "label_column")
}
"""Settings of a run's data and machine that evaluations call by names of their own."""
SELECTION_FIELDS = _MACHINE_FIELDS | {
    f"selection.{name}": name for name in ("candidates", "criterion", "from_block", "radius")
}
"""Settings of a run's selection and machine that `safer_fast.select` calls by names of its own."""


@hinting
@dataclass
class EvaluateConfig:
    """Model, attacks and data of an evaluation.

    >>> EvaluateConfig(run="runs/x", attacks="clean,pgd-20,autoattack", epsilon="4/255").weights
    'last'
    """

    run: str
    """Run folder."""
    attacks: Names | None = None
    """Attacks, comma-separated: clean, fgsm, pgd-K, cw, cw-K, apgd-ce, apgd-dlr, square,
    autoattack; docs/evaluation.md; default: clean,fgsm,pgd-20, in l1 clean,apgd-ce, of a tower
    without text embeddings clean and the pgd-K of its evaluation.attacks."""
    norm: Literal["linf", "l2", "l1"] | None = None
    """Norm of the ball; l1: for attacks of AutoAttack alone; default: the run's."""
    epsilon: Radius | None = ranged(None, ranges.EPSILON)
    """Radius of the ball; default: the run's."""
    threat_models: Names = field(default_factory=Names)
    """Several balls in one table, such as linf:8/255,l2:0.5,l1:12, in place of norm and epsilon."""
    restarts: int = ranged(1, at_least(1, ranges.ITERATIONS))
    """Random starts of pgd and cw; an image that any of them fools counts as wrong."""
    weights: str = "last"
    """last or best."""
    source: str | None = None
    """Transfer: run folder of the model that adversarial images are made with; default: RUN."""
    source_weights: str = "last"
    """last or best, of --source."""
    path: str | None = None
    """Data to evaluate on, in any format of train's --data.path, which may be written here too;
    default: the run's test split."""
    other_data: Names = field(default_factory=Names)
    """More data in the same table, paths separated by commas, attacked alike."""
    corruptions: Names = field(default_factory=Names)
    """Corruptions of ImageNet-C, made on the fly at five severities: all, or names such as
    fog,snow; clean accuracy (pip install "safer_fast[corruptions]")."""
    json: str | None = None
    """File for all figures, a JSON list of objects."""
    image_column: str | None = None
    """Column of images in parquet files, with --path; default: the run's."""
    label_column: str | None = None
    """Column of labels in parquet files, with --path; default: the run's."""
    num_images: int | None = ranged(None, at_least(1, ranges.IMAGES))
    """Use only this many images, a fixed subset stratified by class; default: all."""
    batch_size: int = ranged(256, at_least(1, ranges.IMAGES))
    """Images per batch, at most; an evaluation that was stopped resumes at the next batch."""
    seed: int = ranged(0, ranges.SEED)
    """Seed of the random numbers of attacks."""
    amp: Literal["run", "off", "bf16"] = "run"
    """Precision; run: the one that RUN was trained in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    text_embeddings: str | None = None
    """Zero-shot accuracy of a tower that fare or tecoa trained: file with text embeddings of the
    classes (docs/towers.md), or none for the embedding distance; default: the run's."""
    fresh: bool = False
    """Measure again what has already been measured."""


def attacks_of(config: EvaluateConfig) -> Names:
    """The attacks of an evaluation, when those that were not named have been chosen."""
    assert config.attacks is not None
    return config.attacks


@hinting
@dataclass
class SelectConfig:
    """Model, criteria and attack of a comparison of scores."""

    run: str
    """Run folder."""
    criterion: str = "sharpness"
    """Score that ranks the layers: sharpness, gradient-norm, criticality, random, least-sharp, or
    one of your own (docs/extending.md)."""
    criteria: Names = field(
        default_factory=lambda: Names(
            ["sharpness-absolute", "sharpness-relative", "gradient-norm", "criticality"]
        )
    )
    """Criteria to compare it with, comma-separated: sharpness-absolute, sharpness-relative,
    gradient-norm, criticality, or those of your own; fewer take less time."""
    fraction: float | None = ranged(None, ranges.FRACTION)
    """Share of the layers that is selected, in (0, 1], at least one layer; default: the run's."""
    rho: float | None = ranged(None, above_zero(ranges.FACTOR))
    """Radius of the perturbation that measures sharpness; default: the run's."""
    radius: Literal["absolute", "relative"] | None = None
    """absolute: rho; relative: rho times the norm of the layer's weights; default: the run's."""
    from_block: int | None = ranged(None, at_least(0, ranges.EDGE))
    """Only layers of this block and above (and the head) are candidates; default: the run's."""
    candidates: Names | None = None
    """Only layers of these names or patterns, such as `blocks.*` or `*`, are candidates; default:
    the run's."""
    epsilon: Radius | None = ranged(None, ranges.EPSILON)
    """Radius of the attack; default: the run's."""
    steps: int | None = ranged(None, at_least(0, ranges.ITERATIONS))
    """Steps of the attack, 0 for none; default: the run's."""
    num_images: int = ranged(512, at_least(1, ranges.IMAGES))
    """Number of training images that the scores are measured on."""
    weights: str = "last"
    """last or best."""
    seed: int = ranged(0, ranges.SEED)
    """Seed of the images, the attack and the random criterion."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    amp: Literal["run", "off", "bf16"] = "run"
    """Precision; run: the one that RUN was trained in."""
    output: str | None = None
    """File to write; default: selection.json in the run folder."""
    plot: str | None = None
    """Draw a map of the layers for each criterion: a .svg or .png file; --plot alone:
    selection.svg in the run folder."""


@hinting
@dataclass
class ExportConfig:
    """Model and format of an export."""

    run: str
    """Run folder."""
    format: str = "timm"
    """timm: a folder for timm's local-dir:. hub: the same with a model card, ready to upload.
    robustbench: a module that takes pixels in [0, 1], and what a submission needs. onnx: pixels in,
    logits out. open_clip: weights of an image tower with its names."""
    weights: str = "last"
    """last or best."""
    output: str | None = None
    """New or empty folder to write; default: export-FORMAT in the run folder."""
    license: str = "other"
    """License of the weights for the model card; other: none is named."""
    name: str | None = None
    """Name in the model card; default: that of the run folder."""
    claim_data: str | None = None
    """Data that the claim of robustbench is of: a name or path that was evaluated under
    clean,autoattack; default: the run's own test split."""


@dataclass
class DoctorConfig:
    """Data and disk to check besides the machine."""

    output: str | None = None
    """Folder that a run would write to, for its disk; default: the current folder."""
    batch_size: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images per batch in the check of the data, if a path is given."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    build_native: bool = False
