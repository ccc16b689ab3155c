"""Commands that end with one line of error."""

import sys
from collections.abc import Callable, Sequence

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


def last_line(
    capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], None], *words: str
) -> str:
    """The one line, fit for a terminal, that a command writes which ends with status 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *words])
        with pytest.raises(SystemExit) as caught:
            runtime_command.run(main)
    text = capsys.readouterr().err
    assert caught.value.code == 2
    assert text.startswith("error: ")
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    return text
