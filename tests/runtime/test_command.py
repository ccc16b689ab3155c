"""Commands import what they need without a search for garbage."""

import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from safer_fast.runtime.command import drop_defaults_of_triton, import_all

COMMANDS = {
    "train": [],
    "evaluate": ["RUN"],
    "select": ["RUN"],
    "export": ["RUN"],
    "doctor": [],
}


def write_module(folder: Path, name: str, text: str) -> str:
    folder.joinpath(f"{name}.py").write_text(text)
    return name


def test_garbage_is_not_looked_for_while_modules_are_imported_nor_later_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text = "import gc\nIS_ON = gc.isenabled()\nLISTS = [[] for _ in range(1000)]\n"
    name = write_module(tmp_path, "many_lists", text)
    frozen = gc.get_freeze_count()
    import_all("gc", name)
    module = importlib.import_module(name)
    assert not module.IS_ON
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + 1000
    frozen = gc.get_freeze_count()
    more = [[] for _ in range(1000)]
    import_all(name)  # there already: what a caller has made meanwhile is not frozen
    assert gc.get_freeze_count() <= frozen
    assert len(more) == 1000


def test_garbage_is_looked_for_again_after_an_import_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = write_module(tmp_path, "broken_module", "raise ValueError('broken')\n")
    with pytest.raises(ValueError, match="broken"):
        import_all(name)
    assert gc.isenabled()
    gc.disable()
    try:
        import_all(write_module(tmp_path, "another_module", ""))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_methods_that_triton_would_complain_of_at_the_end_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = type("attribute", (), {"__module__": "triton._C.bound.ir"})()
    defaults = {"loads": [None, own], "adds": [None, 1], "stores": None}
    methods = {
        name: SimpleNamespace(__nb_signature__=((f"def {name}(self)", None, values),))
        for name, values in defaults.items()
    }
    module = ModuleType("triton._C.bound")
    module.Builder = type("Builder", (), {**methods, "plain": 1})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    drop_defaults_of_triton()
    assert {"adds", "stores", "plain"} <= set(vars(module.Builder))
    assert "loads" not in vars(module.Builder)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_imports_so_after_it_has_read_its_flags(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module(f"safer_fast.{name}")

    def imported(*names: str) -> None:
        for each in names:
            importlib.import_module(each)
        raise EOFError

    monkeypatch.setattr(command, "import_all", imported)
    with pytest.raises(ValueError, match="--wrong"):
        command.main([*COMMANDS[name], "--wrong=1"])
    with pytest.raises(EOFError):
        command.main(COMMANDS[name])
