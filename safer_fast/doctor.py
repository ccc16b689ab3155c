"""Report of the fast paths that are live on this machine, with remedies for the others.

`python -m safer_fast.doctor [--json] [--data.path PATH] [--output DIR]` prints the machine and the
checks, ready to be pasted into an issue; `--build-native` builds the native library first.
"""

from __future__ import annotations

from collections.abc import Sequence

from safer_fast.config.checks import check_ranges
from safer_fast.config.command_line import with_underscores
from safer_fast.config.commands import DoctorConfig
from safer_fast.config.doors import speaking_flags
from safer_fast.config.parser import new_parser, parse
from safer_fast.runtime.command import import_all, run
from safer_fast.runtime.diagnosis import as_block, as_json, without_home
from safer_fast.runtime.fast_paths import build_native, check_disk, diagnose
from safer_fast.runtime.machine import describe_machine


@speaking_flags()
def main(arguments: Sequence[str]) -> None:
    """Print machine and checks as a block for an issue, or as JSON."""
    parser = new_parser("doctor", "Say which fast paths are live here, and why not.")
    parser.first = ("output", "data.path", "batch_size", "json", "build_native")
    parser.add_class_arguments(DoctorConfig, None, skip={"json", "build_native"})
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--build_native",
        action="store_true",
        help="first build the native CPU library for the torch that is installed",
    )
    words = with_underscores(arguments)
    config = parse(parser, words, DoctorConfig)
    check_ranges(config)
    import_all("safer_fast.data.trial")  # --help does not wait for torch
    from safer_fast.data.trial import check_dali, check_data

    if config.build_native:
        build_native()
    checks = [*diagnose(), check_dali(), check_disk(config.output)]
    if config.data.path is not None:
        checks += check_data(config.data, config.batch_size)
    report = as_json if config.json else as_block
    print(without_home(report(describe_machine(), checks)))


if __name__ == "__main__":
    run(main)
