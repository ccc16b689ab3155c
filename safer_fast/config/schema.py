"""Every setting of a run: typed dataclasses, one level of groups, each with unit and meaning."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from safer_fast.config import ranges
from safer_fast.config.doors import door
from safer_fast.config.hints import hinting
from safer_fast.config.ranges import at_least, ranged
from safer_fast.config.settings.attack import AttackConfig
from safer_fast.config.settings.data import DataConfig
from safer_fast.config.settings.evaluation import EvaluationConfig
from safer_fast.config.settings.model import ModelConfig
from safer_fast.config.settings.runs import CheckpointConfig, LogConfig
from safer_fast.config.settings.runtime import SAVINGS, RuntimeConfig
from safer_fast.config.settings.selection import SelectionConfig
from safer_fast.config.settings.training import ObjectiveConfig, OptimConfig, SAMConfig
from safer_fast.config.settings.types import Names, Radius

__all__ = [
    "SAVINGS",
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LogConfig",
    "ModelConfig",
    "Names",
    "ObjectiveConfig",
    "OptimConfig",
    "Radius",
    "RuntimeConfig",
    "SAMConfig",
    "SelectionConfig",
]


@hinting
@dataclass(kw_only=True)
class Config:
    """All settings of a run, in groups.

    Groups may be given as dictionaries, numbers and fractions as texts; they are checked where they
    are used, which raises ValueError with one line that names the setting.

    >>> config = Config(amp="bf16", epochs=3, attack={"epsilon": "4/255"})
    >>> config = Config.from_recipe("cifar10-safer", epochs=5, attack={"epsilon": "4/255"})
    >>> config.attack.norm, round(255 * config.attack.epsilon), config.epochs
    ('linf', 4, 5)
    """

    amp: Literal["off", "bf16"] = "off"
    """bf16: matrices are stored and multiplied in bfloat16, masters and sums kept in float32."""
    seed: int = ranged(0, ranges.SEED)
    """Seed of everything random."""
    epochs: int = ranged(40, at_least(1, ranges.EPOCHS))
    """All epochs, selection.warmup_epochs among them."""
    batch_size: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images per step, at most: an epoch is divided into the fewest equal batches."""
    output: str | None = None
    """Run folder; default: runs/<date>-<model>-<data>; an existing non-empty one is refused unless
    resumed."""
    resume: Literal["never", "auto", "must"] = "never"
    """Resume the run in --output from its newest checkpoint. auto: start a new run if there is
    none; must: a missing checkpoint is an error."""
    dry_run: bool = False
    """Take 20 steps of each stage, a minute of them at most, print speed, memory, operations and
    the time the run would need, and write nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    sam: SAMConfig = field(default_factory=SAMConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)

    @classmethod
    @door()
    def from_recipe(cls, name: str | Path, **changes: Any) -> Config:
        """Read a recipe by name, or a YAML file such as a run.yaml, and change some settings.

        changes: settings by name; a dictionary for a group changes what it names and leaves the
        rest. Raises TypeError for a name that is no setting, ValueError, one line, for unknown
        recipes, names within groups and unfit values.
        """
        from safer_fast.config.conversion import converted_to
        from safer_fast.config.recipe_files import find_settings, read_settings

        cls(**changes)  # names are checked there
        settings = read_settings(find_settings(str(name), "recipe"), "recipe")
        for key, value in changes.items():
            group = settings.get(key)
            if isinstance(group, Mapping) and isinstance(value, Mapping):
                value = {**group, **value}
            settings[key] = value
        network = changes.get("model")
        if isinstance(network, Mapping):
            given = {"pretrained", "arguments"} & set(network)
            # arguments of the recipe fit its own network, a checkpoint replaces its weights
            free = {"name": ("arguments", {}), "checkpoint": ("pretrained", False)}
            for name, (other, value) in free.items():
                if network.get(name) is not None and other not in given:
                    settings["model"] = {**settings["model"], other: value}
        return converted_to(cls, settings)

    def _repr_html_(self) -> str:
        """HTML for notebooks: the settings that differ from the defaults, then all of them."""
        ours, defaults = _lines(self), _lines(type(self)())
        changed = [line for line in ours if line not in defaults]
        parts = [html.escape("\n".join(lines)) for lines in (changed or ["all defaults"], ours)]
        return (
            f"<pre>{parts[0]}</pre><details><summary>all settings</summary>"
            f"<pre>{parts[1]}</pre></details>"
        )


def _lines(config: Config) -> list[str]:
    """One line for each setting: `group.name: value`."""
    lines = []
    for item in fields(config):
        value = getattr(config, item.name)
        values = vars(value) if is_dataclass(value) else value
        is_group = isinstance(values, Mapping)
        inner = (
            {f"{item.name}.{key}": v for key, v in values.items()}
            if is_group
            else {item.name: value}
        )
        lines += [f"{name}: {setting!r}" for name, setting in inner.items()]
    return lines
