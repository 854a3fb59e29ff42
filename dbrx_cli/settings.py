"""The settings there are: every flag with a variable DBRX_NAME is one, with the key `name`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from model.errors import InputError

PREFIX = "DBRX_"
TOO_LARGE = 2**63  # of whole numbers: TOML has no larger ones


@dataclass(frozen=True)
class Setting:
    """One key of the settings file."""

    key: str
    flag: str
    kind: type  # str, int, float, bool, or list (of texts)
    choices: tuple[str, ...]  # the only values, if not empty
    default: Any
    help: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return PREFIX + self.key.upper()

    def check(self, value: Any) -> Any:
        """A value of the file as the flag takes it; `ValueError` says what is wrong with it."""
        if type(value) is int and abs(value) >= TOO_LARGE:
            raise ValueError("must be a number of at most 64 bits")
        accepted = {float: (int, float), list: (list, str)}.get(self.kind, (self.kind,))
        if type(value) not in accepted:  # True is an int to isinstance
            raise ValueError(f"must be {_NAMES[self.kind]}, not {value!r}")
        if self.kind is list:
            value = [value] if isinstance(value, str) else value
            if not all(isinstance(item, str) for item in value):
                raise ValueError(f"must be {_NAMES[list]}, not {value!r}")
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}, not {value!r}")
        return value

    def read(self, words: list[str]) -> Any:
        """The value that was typed, as the file holds it; `ValueError` says what is wrong with it."""
        if self.kind is list:
            return words
        if len(words) != 1:
            raise ValueError("takes one value")
        if self.kind is str:
            return self.check(words[0])
        try:
            return _READERS[self.kind](words[0])
        except (ValueError, KeyError):
            raise ValueError(f"must be {_NAMES[self.kind]}, not {words[0]!r}") from None


_NAMES = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
}
_READERS: dict[type, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda word: {"true": True, "false": False}[word],
}

SETTINGS: dict[str, Setting] = {}  # by key; filled as the commands are defined


def register(annotation: Any, default: Any) -> None:
    """Note a parameter of a command, if it is a flag with a variable."""
    if get_origin(annotation) is not Annotated:
        return
    kind, info, *_ = get_args(annotation)
    variable = getattr(info, "envvar", None)
    if not variable:
        return
    key = variable.removeprefix(PREFIX).lower()
    # In Annotated, the first positional argument of typer.Option, its default otherwise, is a flag.
    flag = next(flag for flag in (info.default, *info.param_decls) if str(flag).startswith("--"))
    setting = Setting(key, flag, *_kind(kind), default, info.help or "")
    assert SETTINGS.setdefault(key, setting).kind is setting.kind, f"two flags share the setting {key}"


def _kind(annotation: Any) -> tuple[type, tuple[str, ...]]:
    """Of an annotation: the type of one value, and its choices."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    kind = get_origin(annotation) or annotation
    return (kind if kind in _NAMES else str), ()


@dataclass(frozen=True)
class Found:
    """A value that is set, and where."""

    value: Any
    origin: str  # as it is told: "DBRX_SEED", "~/.config/dbrx/config.toml, line 3"


def suggestion(word: str, known: list[str], otherwise: str) -> str:
    """The likeliest of the known words, as a hint."""
    from difflib import get_close_matches

    near = get_close_matches(word.replace("-", "_").lower(), known, 1) or get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def setting(key: str) -> Setting:
    """A setting by its key; `InputError` names the likeliest if there is none."""
    if key not in SETTINGS:
        raise InputError(f"there is no setting {key!r}", suggestion(key, list(SETTINGS), "see dbrx config show"))
    return SETTINGS[key]
