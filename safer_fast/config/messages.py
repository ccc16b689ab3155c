"""Messages for a user's mistakes: what was expected, what was given, which flag was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from safer_fast.config.help_text import dashed

MOST_SHOWN = 80
"""Most characters of a value that a message shows."""
LONGEST_WORD = 255
"""Characters of the longest word that a message shows whole: a file's name may have as many."""
LONGEST_LINE = 1200
# Characters that control a terminal, change the direction of text, or are no text.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Names of settings in other projects, and their names here, in order of preference.
_USUAL: dict[str, tuple[str, ...]] = {
    "alpha": ("attack.step_size",),
    "arch": ("model.name",),
    "augment": ("data.augmentation",),
    "bf16": ("amp",),
    "bs": ("batch_size",),
    "checkpoint": ("model.checkpoint",),
    "checkpoint_path": ("model.checkpoint",),
    "ckpt": ("model.checkpoint",),
    "clip_grad": ("optim.clip_norm",),
    "data": ("data.path", "path"),
    "data_dir": ("data.path", "path"),
    "dataset": ("data.path", "path"),
    "drop_path": ("model.drop_path_rate",),
    "ema": ("optim.ema_decay",),
    "eps": ("attack.epsilon", "epsilon"),
    "evaluation": ("evaluation.attacks", "attacks"),
    "fp16": ("amp",),
    "gpu": ("runtime.device", "device"),
    "img_size": ("data.image_size",),
    "initial_checkpoint": ("model.checkpoint",),
    "input_size": ("data.image_size",),
    "iterations": ("attack.steps", "steps"),
    "iters": ("attack.steps", "steps"),
    "learning_rate": ("optim.learning_rate",),
    "lr": ("optim.learning_rate",),
    "max_epochs": ("epochs",),
    "min_lr": ("optim.min_learning_rate",),
    "mixed_precision": ("amp",),
    "model": ("model.name",),
    "n_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "num_samples": ("num_images", "data.max_images"),
    "objective": ("objective.name",),
    "opt": ("optim.name",),
    "optim": ("optim.name",),
    "optimizer": ("optim.name",),
    "out": ("output",),
    "output_dir": ("output",),
    "precision": ("amp",),
    "sam": ("sam.rho",),
    "save_dir": ("output",),
    "selection": ("selection.criterion", "criterion"),
    "smoothing": ("objective.label_smoothing",),
    "warmup": ("optim.warmup_epochs",),
    "wd": ("optim.weight_decay",),
    "weight_decay": ("optim.weight_decay",),
    "workers": ("data.num_workers",),
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "names with values such as {depth: 4}",
    "tuple": "numbers such as [0.9, 0.95]",
    "Radius": "a number or a fraction such as 8/255",
    "Names": "names, separated by commas",
}


def printable(text: str) -> str:
    """Replace control characters and marks of text direction by ?."""
    return UNPRINTABLE.sub("?", text)


def shortened(value: str, most: int = MOST_SHOWN) -> str:
    """The value on one line, if it has at most `most` characters, else its beginning."""
    value = re.sub(r"\s*\n\s*", " ", value)
    return value if len(value) <= most else value[: most - 3] + "..."


def as_line(message: str) -> str:
    """The message on one line that a terminal shows as it stands, without endless words."""
    words = (shortened(word) if len(word) > LONGEST_WORD else word for word in message.split())
    return shortened(printable(" ".join(words)), LONGEST_LINE)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def typed(flag: str) -> str:
    """The flag of a setting as users type it: --batch-size, but --attack.step_size."""
    return f"--{flag}" if "." in flag else dashed(f"--{flag}")


def usual(name: str, known: Sequence[str]) -> str | None:
    """The setting among `known` that other projects, or few letters, call so; None for none."""
    return next((other for other in _USUAL.get(name, ()) if other in known), None)


def suggested(name: str, known: Sequence[str]) -> str | None:
    """The setting among `known` that `name` probably means; None if none is similar.

    Names that other projects use come first, then settings of the same name in another group,
    similar ones, in the same group before others, and those of which it is a word.
    """
    group, _, own = name.rpartition(".")
    same = [other for other in known if other.rpartition(".")[2] == own]
    holding = [other for other in known if own in re.split(r"[._]", other)]
    # the groups would make all names of one similar
    within = {o.rpartition(".")[2]: o for o in known if o.rpartition(".")[0] == group}
    anywhere = {other.rpartition(".")[2]: other for other in reversed(known)}
    close = [within[other] for other in get_close_matches(own, within, n=1)]
    close += [
        o for usual in get_close_matches(own, _USUAL, n=1, cutoff=0.75) for o in _USUAL[usual]
    ]
    close += [] if within else get_close_matches(name, known, n=1)
    close += [anywhere[other] for other in get_close_matches(own, anywhere, n=1)]
    found = [*_USUAL.get(own, ()), *_in_group_like(group, own, known), *same, *close, *holding]
    return next((other for other in found if other in known), None)


def _in_group_like(group: str, own: str, known: Sequence[str]) -> list[str]:
    """The setting of this name in the group that an unknown group probably means, if any."""
    groups = {name.rpartition(".")[0] for name in known} - {""}
    if not group or group in groups:
        return []
    usual = [name.rpartition(".")[0] for name in _USUAL.get(group, ())]
    close = [*usual, *get_close_matches(group, groups, n=1)]
    return [f"{other}.{own}" for other in close if f"{other}.{own}" in known]


def meant(value: object, known: Iterable[str]) -> str:
    """The words `, did you mean ...?` for a value that is none of the known names.

    Empty if none is similar, in any case and with - for _. The number of a GPU is no name.
    """
    known = list(known)
    if "cuda" in known and (number := re.fullmatch(r"cuda:(\d+)", str(value))):
        return f": CUDA_VISIBLE_DEVICES={number[1]} chooses the GPU"
    close = nearest(value, known)
    return f", did you mean {printable(close)}?" if close else ""


def nearest(value: object, known: Iterable[str]) -> str | None:
    """The known name that is most like a value, which is none of them; None if none is similar."""
    names = {_folded(name): name for name in known}
    if value in names.values():
        return None
    close = get_close_matches(_folded(str(value)[:LONGEST_WORD]), names, n=1)
    return names[close[0]] if close else None


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-")


def explained(message: str, known: Sequence[str]) -> str:
    """Rewrite a message of jsonargparse as `--flag: expected ..., got ...`.

    known: names of all settings.
    """
    message = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        flag = found[1].partition("=")[0]
        close = suggested(flag.lstrip("-"), known)
        flag = typed(flag[2:]) if flag.startswith("--") else flag
        return f"unknown flag {shortened(flag)}" + (
            f", did you mean {typed(close)}?" if close else ""
        )
    if found := re.match(r"(?:Group '(.+?)' does not accept option|Option) '(.+?)'", message):
        name = f"{found[1]}.{found[2]}" if found[1] else found[2]
        close = suggested(name, known)
        hint = f", did you mean {close!r}?" if close else ""
        return f"--config: unknown setting {shortened(name)!r}{hint}"
    if found := re.match(r"argument (--\S+): (.*)", message):
        return f"{found[1]}: {found[2]}"
    if not (found := re.match(r'Parser key "(.+?)": *(.*)', message)):
        return message
    flag, text = typed(found[1]), found[2]
    if text.startswith(("Unable to load config", "Importing ")):
        return no_group(found[1], "another value", known)
    if value := re.search(r"(?:Got|Given) value: (?:type: .*?Given value: )?(.*)$", text):
        expected, got = _expected(text), "null" if value[1] == "None" else value[1]
        hint = "; a space follows each colon" if re.match(r"\{.*:[^ ]", got) else ""
        hint = hint or meant(got, _choices(text))
        return f"{flag}: expected {expected}, got {shortened(got)}{hint}"
    return f"{flag}: {text}"


def no_group(group: str, got: str, known: Sequence[str]) -> str:
    """The message for a value in place of a group of settings."""
    close = usual(group, known)
    hint = f", did you mean {typed(close)}?" if close else ""
    return f"--{group}: expected names with values such as {{name: value}}, got {got}{hint}"


def of_kind(kind: Any) -> str:
    """The words for a value of a setting's type."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _WORDS.get(getattr(get_origin(kind) or kind, "__name__", ""), "a value")


def _expected(text: str) -> str:
    if "fraction such as" in text:
        return _WORDS["Radius"]
    if f"Expected {_WORDS['Names']}" in text:
        return _WORDS["Names"]
    text = re.sub(r"Given value type: <class '[^']+'>", "", text)
    kinds = [kind for kind in re.findall(r"<class '([^']+)'>", text) if kind != "NoneType"]
    types = [kind.rpartition(".")[2] for kind in kinds]
    expected = list(dict.fromkeys(_WORDS.get(kind, kind) for kind in types))
    if choices := _choices(text):
        names = ", ".join(choices)
        expected.insert(0, names if expected else f"one of {names}")
    if expected:
        return " or ".join(expected)
    return re.sub(r"^Expected (.*?)\. Got value.*", r"\1", text)


def _choices(text: str) -> list[str]:
    """The names among which a setting is chosen, in a message of jsonargparse."""
    choices = re.search(r"Literal\[(.*?)\]", text)
    return choices[1].replace("'", "").split(", ") if choices else []
