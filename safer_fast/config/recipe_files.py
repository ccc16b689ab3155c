"""Recipes and YAML files of settings, read as nested dictionaries that are checked later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safer_fast.config.hints import hint
from safer_fast.config.messages import LONGEST_WORD, shortened
from safer_fast.config.untrusted import MOST_YAML, load_yaml, read_text

RECIPES = Path(__file__).parent / "recipes"


def find_settings(name: str, flag: str) -> Path:
    """The file of a recipe, else the file of this name; flag: the setting named in errors."""
    if len(name.rpartition("/")[2]) > LONGEST_WORD - len(".yaml"):  # too long for a file name
        raise ValueError(f"{flag}: expected a YAML file or {recipe_names()}, got {shortened(name)}")
    recipe = RECIPES / f"{name}.yaml"
    return recipe if recipe.is_file() else Path(name)


def read_settings(file: Path, flag: str) -> dict[str, Any]:
    """Read the settings in a file; raises ValueError naming `flag` for a file without settings."""
    if not file.is_file():
        of_run = file / "run.yaml"
        is_run = of_run.is_file()
        found = f", did you mean {str(of_run)!r}?" if is_run else hint(str(file), recipes())
        raise ValueError(
            f"{flag}: expected a YAML file or {recipe_names()}, got {str(file)!r}{found}"
        )
    try:
        content = load_yaml(read_text(file, MOST_YAML))
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{flag}: expected YAML in {file}: line {number}: no UTF-8") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: expected YAML in {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{flag}: expected names with values in {file}, got "
            + ("none" if content is None else shortened(repr(content)))
        )
    # jsonargparse would read other files named by these
    if "config" in content:
        raise ValueError(f"{flag}: unknown setting 'config'")
    return content


def recipe_names() -> str:
    """The names of all recipes, for messages."""
    return f"one of the recipes {', '.join(recipes())}"


def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
