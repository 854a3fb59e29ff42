"""Where dbrx keeps what is yours, and how it is kept from others: files 0600, folders 0700, no links followed."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.errors import DbrxError, InputError, ResourceError

DATA, CACHE = "DBRX_DATA", "DBRX_CACHE"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_NAME = "take another name"


def data_folder() -> Path:
    """Where sessions, history and counts of experts are kept: DBRX_DATA, or the platform's folder for a user's data."""
    given = os.environ.get(DATA)
    if given:
        return at_home(DATA, given)
    from platformdirs import user_data_path

    return user_data_path("dbrx", appauthor=False)


def cache_folder() -> Path:
    """Where lies what can be made again: DBRX_CACHE, or the platform's folder for a user's caches."""
    given = os.environ.get(CACHE)
    if given:
        return at_home(CACHE, given)
    from platformdirs import user_cache_path

    return user_cache_path("dbrx")


def at_home(variable: str, path: str) -> Path:
    """The path that a variable names, with `~` for a home; `InputError` if there is no such user."""
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise InputError(f"{variable} is {path}, and there is no such user", f"set {variable} to another path")
    return Path(whole)


def make_folder(path: Path) -> None:
    """Make a folder, and parents that are missing, for the user alone; one that is there stays as it is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists() and not folder.is_symlink()]
    for folder in reversed(missing):  # Path.mkdir would give parents what the umask allows
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:  # another process was quicker
            continue
        folder.chmod(0o700)


def private_folder(path: Path, setting: str = DATA) -> Path:
    """A folder where nobody else can plant files, made if need be. Raises `DbrxError` or `OSError`.

    setting: the variable that names another.
    """
    make_folder(path)
    if not path.is_dir():
        raise DbrxError(f"{path} is not a folder", f"move it away, or set {setting} to another folder")
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise DbrxError(f"{path} belongs to another user", f"set {setting} to a folder of your own")
    if found.st_mode & 0o022:
        who = "everybody" if found.st_mode & 0o002 else "a group"
        hint = f"chmod go-w {shlex.quote(str(path))}, or set {setting} to another folder"
        raise DbrxError(f"{who} can write to {path}", hint)
    return path


def write_private(path: Path, text: str, *, over: bool, hint: str = "name a file that can be written") -> None:
    """Write what was said to a file for the user alone, as a whole; `DbrxError` if that cannot be done.

    over: a plain file that is there gives way. A link, a pipe and all else never do.
    """
    if "\0" in str(path):
        raise InputError(f"{path} is no name of a file", hint)
    refuse_link(path)
    if over and path.exists() and not path.is_file():
        raise InputError(f"{path} is not a plain file", "name another file")
    new = path.with_name(f".{path.name[:200]}.{os.getpid()}.new") if over else path
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with write_faults(path, hint), open(open_private(new, flags), "w", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            if over:
                os.replace(new, path)
        except BaseException:
            with suppress(FileNotFoundError):
                new.unlink()
            raise


@contextmanager
def write_faults(path: Path, hint: str) -> Iterator[None]:
    """What the system says about a file that is written, as a `DbrxError`: `ResourceError` if there is no room."""
    try:
        yield
    except FileExistsError:
        raise _present(path) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise ResourceError(f"{path} cannot be written: {reason}", "make room, or name another file") from None
        raise InputError(f"{path} cannot be written: {reason}", hint) from None


def open_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file for the user alone, made if need be; its folder must be there. Gives the descriptor.

    Raises `InputError` for a link or anything else that is no plain file: it may lead to a file of somebody else's.
    Raises `OSError` if the file cannot be opened.
    """
    refuse_link(path)
    # Without waiting: a planted pipe has no other end. O_NOFOLLOW closes the moment since the look above.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is not a plain file", "move it away")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def refuse_present(path: Path, hint: str = OTHER_NAME) -> None:
    """`InputError` if anything has the name of a file that is to be written, told before the work for it."""
    if os.path.lexists(path):
        raise _present(path, hint)


def _present(path: Path, hint: str = OTHER_NAME) -> InputError:
    return InputError(f"{path} is there already", hint)


def refuse_link(path: Path) -> None:
    """`InputError` if there is a symbolic link in the place of a file."""
    if path.is_symlink():
        raise InputError(f"{path} is a link, which is not followed", "move it away")
