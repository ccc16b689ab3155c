"""The model of a run on its machine."""

from typing import Any

import pytest

from safer_fast.config.command_line import parse_config
from safer_fast.data import load_data
from safer_fast.runtime.device import prepare_runtime
from safer_fast.runtime.ranks import Ranks
from safer_fast.training import engine


@pytest.mark.parametrize(
    ("num_ranks", "limit", "expected"), [(1, "auto", 16), (3, "auto", 6), (3, 4, 4), (1, 40, 16)]
)
def test_attention_is_timed_with_as_many_images_as_a_rank_attacks_at_a_time(
    num_ranks: int, limit: int | str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AskedError(Exception):
        """Raised with the number of images, so that nothing else is built."""

    def ask(model: Any, image_size: int, num_images: int, wanted: str) -> None:
        raise AskedError(num_images)

    monkeypatch.setattr(engine, "pin_for", ask)
    flags = ["--batch-size=16", "--data.max_images=64", "--runtime.device=cpu"]
    config = parse_config([*flags, f"--runtime.attack_micro_batch={limit}"])
    runtime = prepare_runtime(config.runtime)
    data = load_data(config.data, batch_size=16, seed=0, device=runtime.device)
    with pytest.raises(AskedError) as asked:
        engine.Engine(config, runtime, data, Ranks(num_ranks=num_ranks))
    assert asked.value.args == (expected,)
