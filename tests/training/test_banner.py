"""The introduction of a run."""

from safer_fast.config.schema import Config, RuntimeConfig
from safer_fast.training.banner import _precision


def test_products_in_tf32_are_named() -> None:
    asked = Config(runtime=RuntimeConfig(tf32=True))
    assert [_precision(asked, is_on_gpu) for is_on_gpu in (False, True)] == [
        "fp32",
        "fp32, products in TF32",
    ]
    assert _precision(Config(), True) == "fp32"
    assert "bf16" in _precision(Config(amp="bf16", runtime=RuntimeConfig(tf32=True)), True)
