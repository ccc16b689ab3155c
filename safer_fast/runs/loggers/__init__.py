"""Loggers: metrics.jsonl, and the table of those that show a run beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from safer_fast.config.schema import LogConfig
from safer_fast.runs.loggers.logger import LoggedRun, Logger
from safer_fast.runs.loggers.tensorboard import EventFile
from safer_fast.runs.loggers.wandb import WandbRun, check_wandb


class LoggerKind(NamedTuple):
    """A row of the table: how to open a logger, and a check that raises ValueError if it cannot."""

    open: Callable[[LoggedRun], Logger]
    check: Callable[[], None] = lambda: None


LOGGERS = {
    "tensorboard": LoggerKind(EventFile),
    "wandb": LoggerKind(WandbRun, check_wandb),
}
"""Loggers by name. `log.NAME` asks for a logger; one without such a setting is always on."""


def asked_loggers(config: LogConfig) -> list[LoggerKind]:
    """The rows of the table that the settings ask for."""
    return [kind for name, kind in LOGGERS.items() if getattr(config, name, True)]
