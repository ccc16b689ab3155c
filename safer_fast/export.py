"""Export of a model for timm, the hub, RobustBench, ONNX: `python -m safer_fast.export RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from safer_fast.config.command_line import with_underscores
from safer_fast.config.commands import ExportConfig
from safer_fast.config.doors import speaking_flags
from safer_fast.config.parser import new_parser, parse
from safer_fast.runtime.command import import_all, run


@speaking_flags()
def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.export RUN [flags]`: write a folder, print how to load it."""
    parser = new_parser("export", "Write a run's model in a format that others load.")
    parser.add_class_arguments(ExportConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    config = parse(parser, with_underscores(arguments), ExportConfig)
    import_all("safer_fast.runs.folder")  # --help does not wait for torch
    from safer_fast.runs.exporters import export

    export(config)


if __name__ == "__main__":
    run(main)
