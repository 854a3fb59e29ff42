"""Where dbrx keeps what is yours, and how it is kept from others: files 0600, folders 0700, no links followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from model.errors import DbrxError

DATA, CACHE = "DBRX_DATA", "DBRX_CACHE"


def data_folder() -> Path:
    """Where sessions and history are kept: DBRX_DATA, or the platform's folder for a user's data."""
    given = os.environ.get(DATA)
    if given:
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("dbrx", appauthor=False)


def cache_folder() -> Path:
    """Where lies what can be made again: DBRX_CACHE, or the platform's folder for a user's caches."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("dbrx")


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
    if path.stat().st_mode & 0o002:
        raise DbrxError(f"everybody can write to {path}", f"chmod o-w '{path}', or set {setting} to another folder")
    return path


def open_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file for the user alone, made if need be; its folder must be there. Gives the descriptor.

    Raises `DbrxError` for a link or anything else that is no plain file: it may lead to a file of somebody else's.
    Raises `OSError` if the file cannot be opened.
    """
    refuse_link(path)
    # Without waiting: a planted pipe has no other end. O_NOFOLLOW closes the moment since the look above.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DbrxError(f"{path} is not a plain file", "move it away")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def refuse_link(path: Path) -> None:
    """`DbrxError` if there is a symbolic link in the place of a file."""
    if path.is_symlink():
        raise DbrxError(f"{path} is a link, which is not followed", "move it away")
