"""Large files that appear under their names when they are whole, and not before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, ResourceError


@contextmanager
def scratch_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `target` to write `nbytes` into; what is left in it at the end is removed, come what may.

    `InputError` if the target exists or cannot be written, `ResourceError` if the disk is too small, before or
    while it is written.
    """
    if os.path.lexists(target):
        raise InputError(f"{target} exists already", "name one that does not, or remove it")
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < nbytes:
            raise _full(parent, nbytes)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        yield scratch
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(parent, nbytes) from None
        if error.filename is None:  # of an open file, a write: a limit of files' sizes, a fault of the disk
            raise _unwritable(target, error) from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(scratch: Path, names: dict[str, Path]) -> None:
    """Rename files or folders of `scratch` to their final paths, once they are on the disk."""
    for name in names:
        path = scratch / name
        for each in (*path.iterdir(), path) if path.is_dir() else (path,):
            _sync(each)
    for name, target in names.items():
        os.rename(scratch / name, target)
    for parent in {target.absolute().parent for target in names.values()}:
        _sync(parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(f"{target} cannot be written: {error.strerror}", "name another place")


def _full(folder: Path, nbytes: int) -> ResourceError:
    free = shutil.disk_usage(folder).free
    return ResourceError(
        f"{nbytes / 1e9:.1f} GB are to be written, {folder} has {free / 1e9:.1f} GB free",
        "make room, or name a place on a larger disk",
    )
