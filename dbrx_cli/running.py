"""Servers of this program that run on this machine: a record of each, locked as long as it runs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import DbrxError, InputError

from .private import data_folder, open_private, private_folder

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Record:
    """A server that has loaded its model."""

    pid: int
    url: str
    name: str  # of the model, as it lists it
    settings: dict[str, Any]  # all that decides what it computes
    needs_key: bool

    @property
    def path(self) -> Path:
        """Where it lies: one server a port."""
        return record_path(int(self.url.rpartition(":")[2]))


def record_path(port: int) -> Path:
    return private_folder(data_folder() / "servers") / f"{port}.json"


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a command line's model options decides what is computed; folders and files by their whole path."""
    settings = {key: options[key] for key in sorted(options)}
    for key in ("model", "adapter"):
        if settings[key] and os.path.exists(settings[key]):
            settings[key] = os.path.realpath(settings[key])
    return settings


@contextmanager
def recorded(record: Record) -> Iterator[None]:
    """Others can find the server inside; however it ends, they see that it has."""
    path = record.path
    with open(open_private(path), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        json.dump(asdict(record), file)
        file.flush()
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                path.unlink()


def running() -> list[Record]:
    """Those that run now."""
    found = []
    for path in sorted(private_folder(data_folder() / "servers").glob("*.json")):
        with suppress(OSError, ValueError, TypeError, DbrxError):  # one that ends just now
            with open(open_private(path, os.O_RDWR), encoding="utf-8") as file:
                if _is_locked(file.fileno()):
                    found.append(Record(**json.load(file)))
    return found


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def serving(settings: Mapping[str, Any], has_key: bool) -> Record | None:
    """One that computes the same as would be computed here."""
    wanted = json.loads(json.dumps(settings_of(settings)))
    fits = (each for each in running() if each.settings == wanted and (has_key or not each.needs_key))
    return next(fits, None)


def stop(port: int | None) -> Record:
    """End one, and wait until it has; `InputError` if it is not clear which."""
    found = [each for each in running() if port is None or each.path == record_path(port)]
    if not found:
        where = "" if port is None else f" at port {port}"
        raise InputError(f"no server of this program runs{where}", "start one with dbrx serve --background")
    if len(found) > 1:
        ports = ", ".join(each.path.stem for each in found)
        raise InputError(f"servers run at the ports {ports}", "say which with --port")
    (record,) = found
    os.kill(record.pid, signal.SIGTERM)
    while record in running():
        time.sleep(LOOK_SECONDS)
    return record
