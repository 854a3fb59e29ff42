"""Private files for what an engine keeps: opened for the user alone, replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dbrx_cli.private import open_private, refuse_link
from model.errors import InputError, ResourceError
from model.saved_cache import starts_like_one
from model.trust import untrusted

HEAD = 64


@contextmanager
def reading(path: Path) -> Iterator[tuple[BinaryIO, int] | None]:
    """A private file and its size, None if there is none; `InputError` if it is something else's."""
    refuse_foreign(path)
    with faults(path):
        if not path.exists():
            yield None
            return
        with os.fdopen(open_private(path, os.O_RDONLY), "rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A private file that gets its name when it is whole. What has the name already must be one of ours."""
    refuse_foreign(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with faults(path):
        try:
            with os.fdopen(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            refuse_link(path)
            os.replace(new, path)
        finally:
            with suppress(FileNotFoundError):
                new.unlink()


def refuse_foreign(path: Path) -> None:
    """`DbrxError` if what has this name is none of ours: it might be something that nobody wants to lose, or that
    somebody else put there.

    It is not touched, and may be asked before a model is loaded.
    """
    with faults(path):
        refuse_link(path)
        no_file = path.is_dir() or not path.parent.is_dir()  # told below
        if not no_file and (reason := untrusted(path.parent.resolve() / path.name)):
            raise InputError(f"saved keys and values are not kept in {path}: {reason}", "name a file in another folder")
        if not path.exists() and path.parent.is_dir():
            return
        with path.open("rb") as file:
            head = file.read(HEAD)
            ours = not head or starts_like_one(head) or _is_blank(file)
    if not ours:
        raise InputError(f"{path} is no file of saved keys and values", "remove it, or name another file")


def _is_blank(file: BinaryIO) -> bool:
    """Whether a file is all zeros, as a crash of the machine may leave one."""
    file.seek(0)
    return not any(map(any, iter(partial(file.read, 1 << 16), b"")))


@contextmanager
def faults(path: Path) -> Iterator[None]:
    """Turn what the system says about a file into a `DbrxError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
            raise InputError(f"{path}: {reason}", "name a file that can be written") from None
        raise ResourceError(f"{path} cannot be written: {reason}", "free some space, or name another file") from None
