"""Commands that end with one line of error."""

import sys
from collections.abc import Sequence

import pytest

from safer_fast.runtime import command as runtime_command


def refused(function: object, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            runtime_command.run(function)  # type: ignore[arg-type]
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err
