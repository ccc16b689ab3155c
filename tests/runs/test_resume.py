"""Settings of a run that is resumed are compared with those given."""

import json

import pytest

from safer_fast.config.schema import Config
from safer_fast.runs.resume import check_settings


def test_settings_that_are_newer_than_a_run_had_their_defaults() -> None:
    stored = json.loads(json.dumps(Config().to_dict()))
    del stored["runtime"]["tf32"], stored["attack"]["precision"]
    config = Config()
    assert check_settings(stored, config) == []
    config.runtime.tf32 = True
    said = "resumed with other rounding: runtime.tf32 False, not True"
    assert check_settings(stored, config) == [said]
    config.evaluation.batch_size = 256
    own = "resumed with other rounding: evaluation.batch_size null, not 256"
    assert check_settings(stored, config) == [said, own]
    config.attack.precision = "bf16"
    with pytest.raises(ValueError, match=r"--resume: .*attack\.precision amp, not bf16"):
        check_settings(stored, config)
