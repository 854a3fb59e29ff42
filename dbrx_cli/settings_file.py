"""The settings file: TOML, checked as a whole when it is read, and changed without touching its comments."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_cli.files import read_file
from dbrx_cli.private import FULL, at_home, make_folder
from dbrx_cli.settings import SETTINGS, Found, Setting, suggestion
from dbrx_cli.stdin import check_argument
from model.errors import DbrxError, InputError, ResourceError
from model.trust import untrusted

CONFIG = "DBRX_CONFIG"
PROFILES = "profiles"
LARGEST = 2**20  # bytes of the file


def config_path() -> Path:
    """DBRX_CONFIG, or config.toml in the platform's folder for settings."""
    given = os.environ.get(CONFIG)
    if given:
        return at_home(CONFIG, given)
    from platformdirs import user_config_path

    return user_config_path("dbrx", appauthor=False) / "config.toml"


@dataclass(frozen=True)
class SettingsFile:
    """What is in the file; without a file, nothing."""

    path: Path
    text: str
    top: dict[str, Any]
    profiles: dict[str, dict[str, Any]]

    @classmethod
    def read(cls) -> SettingsFile:
        """Read and check the user's file. `InputError` says which line is wrong."""
        path = config_path()
        _require_own(path)
        try:
            text = read_file(str(path), LARGEST).decode("utf-8-sig") if path.exists() else ""
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8: offset {error.start}", "convert it (iconv -t UTF-8)") from None
        except (InputError, OSError) as error:
            why = error.message if isinstance(error, InputError) else f"{path} cannot be read: {error.strerror}"
            raise InputError(why, f"set {CONFIG} to another file") from None
        return cls.parse(path, text)

    @classmethod
    def parse(cls, path: Path, text: str) -> SettingsFile:
        """Check a text that is, or is to be, in the file."""
        try:
            content = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # not only its own: a number may have too many digits
            raise InputError(f"{path} is not TOML: {error}", "mend that line") from None
        profiles = content.pop(PROFILES, {})
        if not isinstance(profiles, dict) or not all(isinstance(values, dict) for values in profiles.values()):
            raise InputError(f"{path}: profiles are tables", "begin each with [profiles.NAME]")
        file = cls(path, text, content, profiles)
        for profile, values in ((None, content), *profiles.items()):
            for key, value in values.items():
                file._check(profile, key, value)
        return file

    def values(self, profile: str | None) -> dict[str, Found]:
        """The settings in force with this profile, by key."""
        found = self._found(None, self.top)
        if profile is not None:
            if profile not in self.profiles:
                has = (
                    f"there are {', '.join(self.profiles)}" if self.profiles else f"begin one with [profiles.{profile}]"
                )
                hint = suggestion(profile, list(self.profiles), has)
                raise InputError(f"there is no profile {profile!r} in {self.path}", hint)
            found |= self._found(profile, self.profiles[profile])
        return found

    def _found(self, profile: str | None, values: dict[str, Any]) -> dict[str, Found]:
        return {key: Found(SETTINGS[key].check(value), self._where(profile, key)) for key, value in values.items()}

    def _check(self, profile: str | None, key: str, value: Any) -> None:
        where = self._where(profile, key)
        if key not in SETTINGS:
            raise InputError(
                f"{where}: there is no setting {key!r}", suggestion(key, [*SETTINGS, PROFILES], "remove it")
            )
        try:
            SETTINGS[key].check(value)
        except ValueError as error:
            raise InputError(f"{where}: {key} {error}") from None

    def _where(self, profile: str | None, key: str) -> str:
        """The file, and the line where it can be told."""
        table = None if profile is None else (PROFILES, profile)
        line = next((number for number, (at, name) in _keys(self.text) if at == table and name == key), None)
        return f"{self.path}, line {line}" if line else str(self.path)


def _keys(text: str) -> Iterator[tuple[int, tuple[tuple[str, ...] | None, str]]]:
    """The lines on which a key stands: number, table (None at the top), key. Odd spellings may escape it."""
    table: tuple[str, ...] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            parts = tuple(part.strip(" \t\"'") for part in header[1].split("."))
            yield number, (None, parts[0])  # a table that does not belong here is found by its name
            table = parts
        elif key := re.match(r"""\s*["']?([\w-]+)["']?\s*[=.]""", line):
            yield number, (table, key[1])


def change(setting: Setting, value: Any, profile: str | None) -> Path:
    """Set a key, or remove it (`value` None), at the top or in a profile; gives the file.

    The whole outcome is checked before it takes the place of the old file, in one step. Raises `InputError`.
    """
    import tomlkit

    def edit() -> str:
        table = document = tomlkit.parse(SettingsFile.read().text)
        for name in (PROFILES, profile) if profile else ():
            if name not in table:
                table[name] = tomlkit.table(is_super_table=name == PROFILES)
            table = table[name]
        if value is None:
            if setting.key not in table:
                raise InputError(f"{setting.key} is not set in {config_path()}", "see dbrx config show")
            del table[setting.key]
        else:
            table[setting.key] = value
        return tomlkit.dumps(document)

    return _rewrite(edit)


def edited() -> Path:
    """The file as the user's editor leaves it. Raises `InputError` as `change`, also if it was a wrong file before."""
    from dbrx_cli.repl.editor import edit_text

    path = config_path()
    new = edit_text(path.read_text("utf-8").removesuffix("\n") if path.exists() else "", suffix=".toml")
    return _rewrite(lambda: new)


def read_value(setting: Setting, words: list[str]) -> Any:
    """What was typed, as the file is to hold it; `InputError` if it is of another kind."""
    try:
        return setting.read([check_argument(word, setting.key) for word in words])
    except ValueError as error:
        raise InputError(f"{setting.key} {error}") from None


def _rewrite(edit: Callable[[], str]) -> Path:
    """Put a text in the place of the file's, once it is checked; `edit` makes it while nobody else writes."""
    _require_own(config_path())
    path = config_path().resolve()  # people keep such files in one place, under version control
    try:
        make_folder(path.parent)
        with _alone(path.parent):
            text = edit()
            SettingsFile.parse(path, text)
            _replace(path, text)
    except OSError as error:
        kind = ResourceError if error.errno in FULL else DbrxError
        raise kind(f"{path} cannot be written: {error.strerror}", f"set {CONFIG} to another file") from None
    return path


def _require_own(path: Path) -> None:
    """`InputError` for settings that others can write: they say where prompts go. One's own link is followed."""
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        raise InputError(f"{path} is a link of somebody else's", f"move it away, or set {CONFIG} to another file")
    path = path.resolve()
    if path.is_file() and (reason := untrusted(path)):
        raise InputError(f"settings are not taken from {path}: {reason}", f"mend that, or set {CONFIG} to another file")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One change at a time, so that none is lost."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one; mkstemp makes it 0600."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
